"""The suites: every op is there, and its functions agree on shapes of a few numbers."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from posttrain.bench.case import BOTH, FORWARD, outputs_of, tensors_of
from posttrain.bench.cases import CASES, attention
from posttrain.bench.interleave import alternate
from posttrain.bench.measure import OURS, PLAIN, measure
from posttrain.bench.shapes import MODELS, SUITES, ModelShape, Suite
from posttrain.ops.backend import SUPPORT
from posttrain.ops.layout import PackedLayout

_SHAPE = ModelShape("tiny", 64, 128, 1, 4, 2, 16, 97, rank=4)
_GEMMA = replace(_SHAPE, name="tiny-gemma", gate="geglu")
_QUICK = {"torch", "torch linear_cross_entropy", "PEFT", "bitsandbytes", "SDPA padded", "prefix-grouper"}
_QUICK |= {"TRL", "TRL padding-free", "SDPA, gathering", "transformers", "exponential race"}
_TINY = Suite("tiny", (_SHAPE, _GEMMA), (_SHAPE,), 256, 2)


def test_every_op_has_cases():
    assert set(SUPPORT) | {"sft", "dpo", "grpo", "rollout"} == set(CASES)


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_titles_tell_cases_apart(suite):
    titles = [str(case) for cases in CASES.values() for case in cases(suite)]
    assert len(set(titles)) == len(titles) > len(CASES)


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_cases_say_what_they_take_before_they_are_made(suite):
    """Of the memory at least what the forward moves, which for generation are the weights of every step."""
    for case in (case for cases in CASES.values() for case in cases(suite)):
        assert all(max(work) > 0 for work in case.work.values()), case
        assert case.op == "rollout" or case.need >= case.work[case.passes[0]].moved > 0 or case.passes == ("step",), (
            case
        )


@pytest.mark.parametrize("op", ["packed_attention", "lora_mlp", "nf4_linear", "linear_logprob", "paged_attention"])
def test_work_is_that_of_the_arguments(op):
    """Bytes of the forward are those of the arguments, of some ops without the repeated ones, and of the result."""
    case = CASES[op](_TINY)[-1]
    problem = case.make()
    arguments = [x for x in tensors_of(problem.arguments) if x.dtype != torch.int64]
    counted = arguments[:3] if op == "paged_attention" else arguments
    results = [] if op == "linear_logprob" else outputs_of(problem.ours(*problem.arguments))
    moved = sum(x.nbytes for x in (*counted, *results))
    work = case.work[BOTH if op == "linear_logprob" else FORWARD]
    assert work.moved == (2 * moved if op == "linear_logprob" else moved)


def test_pairs_of_attention_are_those_of_the_layout():
    for lengths, parents in (([7, 3, 5, 2], [-1, 0, 1, 0]), ([4, 1, 9], [-1, -1, -1])):
        pairs = float((PackedLayout.from_forest(lengths, parents).positions + 1).sum())
        assert attention.work((4, 2), 16, lengths, parents)[FORWARD].flops == 4 * pairs * 4 * 16


def test_weights_are_those_of_the_models():
    """Parameters by the published counts, to 2%: those with tied embeddings have them counted twice here."""
    billions = {"llama-3-8b": 8.03, "llama-3-70b": 70.6, "qwen3-8b": 8.19, "qwen3-14b": 14.8, "qwen3-32b": 32.8}
    billions |= {"qwen3-0.6b": 0.751, "qwen3-1.7b": 2.03, "qwen3-4b": 4.41, "mistral-7b": 7.25}
    billions |= {"mistral-small-24b": 23.6, "gemma-3-1b": 1.30, "gemma-3-4b": 4.55, "gemma-3-12b": 12.8}
    billions |= {"gemma-3-27b": 28.4}
    for shape in MODELS:
        assert shape.weights / 1e9 == pytest.approx(billions[shape.name], rel=0.02), shape.name


@pytest.mark.parametrize("op", CASES)
def test_ours_plain_and_peers_agree(op, monkeypatch):
    """Of the peers those that run on a CPU and compile nothing."""
    monkeypatch.setattr("posttrain.bench.measure.cache_bytes", lambda: 1)
    monkeypatch.setattr("posttrain.bench.measure.alternate", partial(alternate, min_seconds=0))
    for case in CASES[op](_TINY):
        quick = {name: maker for name, maker in case.peers.items() if name in _QUICK}
        tables = measure(replace(case, peers=quick), rounds=2, peers=True)
        assert tuple(tables) == case.passes
        for table in tables.values():
            assert table.flops > 0 or table.moved > 0
            absent = {name for name, why in table.missing.items() if "not installed" in why or "share a prompt" in why}
            assert {OURS, PLAIN, *quick} - absent == set(table.columns), table.missing


@pytest.mark.parametrize(("op", "rows"), [("dpo", 9), ("grpo", 9), ("sft", None)])
def test_plain_pytorch_takes_no_logits_of_prompts(op, rows):
    """Of the 8 tokens of an answer, the one before, and the last one, which has no target."""
    problem, seen = CASES[op](_TINY)[0].make(), []
    plain = problem.plain.args[0]
    plain.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    plain.get_decoder().register_forward_pre_hook(
        lambda _, args, kw: seen.append(kw["input_ids"].shape[1]), with_kwargs=True
    )
    problem.plain()
    length, kept = seen[-2:]
    assert kept == (rows or length) and (rows is None or length == 40)


def test_the_truth_of_a_gpu_goes_head_by_head(monkeypatch):
    q, k, v = (torch.randn(2, 9, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    whole = attention.sdpa(q, k, v)
    monkeypatch.setattr(attention, "GPU", True)
    by_head = attention._plain(q, k, v)
    torch.testing.assert_close(by_head, whole)
    incoming = torch.randn_like(whole)
    torch.testing.assert_close(
        torch.autograd.grad(by_head, (q, k, v), incoming), torch.autograd.grad(whole, (q, k, v), incoming)
    )
