"""Adapters to packages that need a GPU, on stand-ins that do on a CPU what the packages' documentation says."""

import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import ModuleType

import pytest
import torch

from posttrain.bench import decode_peers
from posttrain.bench.case import Way, copied, outputs_of
from posttrain.bench.cases import CASES
from posttrain.bench.cases.decode import filtered
from posttrain.bench.cases.elementwise import turned
from posttrain.bench.decode_peers import flashinfer_sample
from posttrain.bench.interleave import alternate
from posttrain.bench.measure import measure
from posttrain.bench.shapes import ModelShape, Suite
from posttrain.ops import reference

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for the CPU")
_SHAPE = ModelShape("tiny", 64, 128, 1, 8, 2, 16, 97)
_TINY = Suite("tiny", (_SHAPE,), (), 128, 2)


def turn_in_place(positions, q, k, width, table, neox=True):
    """`rotary_embedding` of vLLM and `apply_rope_with_cos_sin_cache_inplace` of FlashInfer: rows without heads."""
    cos, sin = (half.repeat(1, 2)[None] for half in table[positions.long()].chunk(2, 1))
    both = (x.view(len(x), -1, width).transpose(0, 1)[None] for x in (q, k))
    for x, y in zip((q, k), turned(*both, cos, sin), strict=True):
        x.copy_(y[0].transpose(0, 1).flatten(1))


def write_slots(k, v, key_cache, value_cache, slots, kind, *scales):
    for cache, new in ((key_cache, k), (value_cache, v)):
        cache.view(-1, *cache.shape[2:])[slots] = new


def append(k, v, rows, positions, caches, indices, starts, last):
    page = caches[0].shape[1]
    own = (indices[starts[:-1].long()] * page + positions).long()[rows.long()]  # all sequences have one page
    assert (starts[1:] - starts[:-1] == 1).all() and (last == positions + 1).all()
    write_slots(k, v, *caches, own, "auto")


def tables_of(starts, indices, last, page):
    """(pages of each sequence, keys of each)."""
    return [indices[a:b] for a, b in pairwise(starts.tolist())], (starts.diff() - 1) * page + last


class Decode:
    """FlashInfer's BatchDecodeWithPagedKVCacheWrapper."""

    def __init__(self, workspace, layout, use_tensor_cores):
        assert layout == "NHD" and use_tensor_cores

    def plan(self, starts, indices, last, heads, key_heads, width, page, q_data_type, data_type):
        tables, self.lens = tables_of(starts, indices, last, page)
        self.table = torch.stack(tables)

    def run(self, q, caches):
        return reference.paged_attention(q, *caches, self.table, self.lens)


class Cascade:
    """FlashInfer's MultiLevelCascadeAttentionWrapper: each level's pages are those of ranges of the queries."""

    def __init__(self, levels, workspace, layout):
        assert (levels, layout) == (2, "NHD")

    def plan(self, queries, starts, indices, last, heads, key_heads, width, page, q_data_type):
        parts, self.lens = [], 0
        for level in range(2):
            tables, lens = tables_of(starts[level], indices[level], last[level], page)
            counts = queries[level].diff()
            parts.append(torch.stack(tables).repeat_interleave(counts, 0))
            self.lens = self.lens + lens.repeat_interleave(counts)
        self.table = torch.cat(parts, 1)

    run = Decode.run


def with_kvcache(q, k, v, cache_seqlens, page_table=None):
    """flash-attn's, on pages or on contiguous caches, which are pages that are as long as they are."""
    table = torch.arange(len(q), dtype=torch.int32)[:, None] if page_table is None else page_table
    return reference.paged_attention(q[:, 0], k, v, table, cache_seqlens)[:, None]


def drawn(probs):
    """FlashInfer's sampling_from_probs: int32 of each row."""
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(probs)))
    return probs.multinomial(1)[:, 0].int()


def drawn_of_top_p(probs, top_p):
    return drawn(filtered(probs.log(), 0, top_p).softmax(-1))


def drawn_of_top_k_top_p(logits, top_k, top_p):
    """FlashInfer's top_k_top_p_sampling_from_logits, whose filters come one after the other unless told otherwise."""
    return drawn(filtered(logits, top_k, top_p).softmax(-1))


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """Stand-ins, and few copies of the arguments."""
    contents = {
        "vllm": {},
        "vllm._custom_ops": {"rotary_embedding": turn_in_place, "reshape_and_cache_flash": write_slots},
        "flashinfer": {"BatchDecodeWithPagedKVCacheWrapper": Decode, "MultiLevelCascadeAttentionWrapper": Cascade},
        "flashinfer.rope": {"apply_rope_with_cos_sin_cache_inplace": turn_in_place},
        "flashinfer.page": {"append_paged_kv_cache": append},
        "flashinfer.sampling": {
            "sampling_from_probs": drawn,
            "top_p_sampling_from_probs": drawn_of_top_p,
            "top_k_top_p_sampling_from_logits": drawn_of_top_k_top_p,
        },
        "flash_attn": {"flash_attn_with_kvcache": with_kvcache},
        "flash_attn_interface": {"flash_attn_with_kvcache": with_kvcache},
    }
    for name, functions in contents.items():
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    for package, name in (("vllm", "_custom_ops"), ("flashinfer", "sampling")):
        vars(sys.modules[package])[name] = sys.modules[f"{package}.{name}"]
    monkeypatch.setattr(decode_peers, "on_a_gpu", lambda: None)
    monkeypatch.setattr("posttrain.bench.measure.cache_bytes", lambda: 1)
    monkeypatch.setattr("posttrain.bench.measure.alternate", partial(alternate, min_seconds=0))


@pytest.mark.parametrize(
    ("op", "names"),
    [("rope_cache", {"vLLM", "FlashInfer"}), ("paged_attention", {"flash-attn 2", "flash-attn 3", "FlashInfer"})],
)
def test_adapters_are_right(op, names):
    for case in CASES[op](_TINY):
        problem = case.make()
        truth = outputs_of(problem.plain(*copied(problem.arguments, torch.float64)))
        for name in names:
            made = case.peers[name](problem)
            way = made if isinstance(made, Way) else Way(made)
            found = [way.back(x) for x in outputs_of(way.call(*way.prepare(copied(problem.arguments))))]
            torch.testing.assert_close(found, [x.float() for x in truth])
        own = {name: case.peers[name] for name in names}
        (table,) = measure(replace(case, peers=own), rounds=2, peers=True).values()
        assert names < set(table.columns), table.missing


@pytest.mark.parametrize("case", CASES["sample"](_TINY), ids=str)
def test_draws_are_within_the_filters_and_have_their_logprobs(case):
    torch.manual_seed(0)
    problem = case.make()
    result = flashinfer_sample(problem)(*problem.arguments)
    (off,) = problem.checked(copied(problem.arguments, torch.float64), result)
    torch.testing.assert_close(off, torch.zeros_like(off))
    assert len(set(result[0].tolist())) > 1
    (table,) = measure(replace(case, peers={"FlashInfer": flashinfer_sample}), rounds=2, peers=True).values()
    assert "FlashInfer" in table.columns, table.missing
