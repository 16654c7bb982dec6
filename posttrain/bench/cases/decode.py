"""rope_cache, paged_attention and sample: what a step of generation does beside its linear layers.

Decoding reads every key and value of every sequence once; with a shared prompt the bytes counted are those of its pages
once. Drawing reads the logits once. Writing the cache reads a step's queries, keys and values and writes them.
"""

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from posttrain import ops
from posttrain.bench import decode_peers as peers
from posttrain.bench.case import FORWARD, Arguments, Case, Problem, Work, randn
from posttrain.bench.cases.elementwise import turned
from posttrain.bench.device import DEVICE, DTYPE, WIDER
from posttrain.bench.peers import Makers, compiled
from posttrain.bench.shapes import ModelShape, Suite

_PAGE = 16
_FILTERS = {"no filter": (0, 1.0), "top-p 0.9": (0, 0.9), "top-k 20, top-p 0.95": (20, 0.95)}
_ROWS = 32
ATTENTION_PEERS: Makers = {
    "SDPA, gathering": peers.sdpa_gathering,
    "FlexAttention": peers.flex_paged,
    "flash-attn 2": peers.flash2_decode,
    "flash-attn 3": peers.flash3_decode,
    "FlashInfer": peers.flashinfer_decode,
}
SAMPLE_PEERS: Makers = {
    "torch.compile": compiled,
    "transformers": peers.warpers_of_transformers,
    "exponential race": peers.race,
    "FlashInfer": peers.flashinfer_sample,
}


def rope_cache(suite: Suite) -> list[Case]:
    """A token of each of 32 sequences, over the heads of the models."""
    named: Makers = {
        "torch.compile": compiled,
        "vLLM": peers.vllm_rope_cache,
        "FlashInfer": peers.flashinfer_rope_cache,
    }
    cases = {}
    for model in suite.models:
        title = f"{_ROWS} tokens, {model.heads}/{model.key_heads} heads of {model.width}"
        need = 64.0 * _ROWS * _PAGE * model.key_heads * model.width * WIDER.itemsize
        size = 1.0 * _ROWS * (model.heads + 2 * model.key_heads) * model.width * DTYPE.itemsize
        work = {FORWARD: Work(0, 2 * size)}
        cases[title] = Case("rope_cache", title, need, partial(_write, model), work, named)
    return list(cases.values())


def _write(model: ModelShape) -> Problem:
    """Sequences write the third token of a page each."""
    slots = torch.arange(_ROWS, device=DEVICE) * _PAGE + 2
    q, k, v = (randn(_ROWS, heads, model.width) for heads in (model.heads, model.key_heads, model.key_heads))
    angle = torch.randn(_ROWS, model.width // 2, device=DEVICE).repeat(1, 2)
    caches = [torch.zeros(_ROWS, _PAGE, model.key_heads, model.width, device=DEVICE, dtype=DTYPE) for _ in range(2)]

    def ours(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        return ops.rope_cache(q, k, v, cos, sin, caches[0], caches[1], slots), *caches

    def plain(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        q, k = turned(q, k, cos, sin)
        for cache, new in zip(caches, (k, v), strict=True):
            cache.view(-1, *cache.shape[2:])[slots] = new
        return q, *caches

    arguments = (q, k, v, angle.cos().to(DTYPE), angle.sin().to(DTYPE), *caches)
    return Problem(arguments, ours, plain, SimpleNamespace(slots=slots))


def paged_attention(suite: Suite) -> list[Case]:
    """32 sequences with keys of their own, and with most of them shared, over the heads of the models."""
    cases = {}
    for model in suite.models:
        for shared in (0, suite.tokens // 4):
            keys = shared + suite.tokens // 16 if shared else suite.tokens // 4
            sharing = f", {shared} of them shared" if shared else ""
            title = f"{_ROWS} x {keys} keys{sharing}, {model.heads}/{model.key_heads} heads of {model.width}"
            size = 2.0 * _ROWS * keys * model.key_heads * model.width * DTYPE.itemsize
            need = size * (4 + 2 * WIDER.itemsize / DTYPE.itemsize)
            make = partial(decode, _ROWS, keys, shared, (model.heads, model.key_heads), model.width)
            work = {FORWARD: _decoding(keys, shared, model)}
            cases[title] = Case("paged_attention", title, need, make, work, ATTENTION_PEERS)
    return list(cases.values())


def _decoding(keys: int, shared: int, model: ModelShape) -> Work:
    pages = shared // _PAGE + _ROWS * -(-(keys - shared) // _PAGE)
    numbers = 2.0 * pages * _PAGE * model.key_heads * model.width + 2.0 * _ROWS * model.heads * model.width
    return Work(4.0 * _ROWS * keys * model.heads * model.width, numbers * DTYPE.itemsize)


def decode(rows: int, keys: int, shared: int, heads: tuple[int, int], width: int) -> Problem:
    """One step's queries of `rows` sequences with `keys` keys each; their tables begin with the pages of the prompt.

    Args:
        rows: sequences.
        keys: of each, those of the prompt among them.
        shared: tokens of the prompt, whole pages.
        heads: Hq and Hkv.
        width: D, of a head.
    """
    common, each = shared // _PAGE, -(-(keys - shared) // _PAGE)
    first = common + torch.arange(rows, dtype=torch.int32)[:, None] * each
    table = torch.cat([torch.arange(common).expand(rows, -1), first + torch.arange(each)], 1).int().to(DEVICE)
    caches = [randn(common + rows * each, _PAGE, heads[1], width) for _ in range(2)]
    lens = torch.full((rows,), keys, dtype=torch.int32, device=DEVICE)
    q = randn(rows, heads[0], width)
    flat = [cache[table.long()].flatten(1, 2)[:, :keys].transpose(1, 2).contiguous() for cache in caches]

    def plain(q: Tensor, _k: Tensor, _v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """SDPA on caches that are contiguous and of one length already."""
        return scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)[:, :, 0]

    def ours(q: Tensor, k: Tensor, v: Tensor, _keys: Tensor, _values: Tensor) -> Tensor:
        return ops.paged_attention(q, k, v, table, lens)

    context = SimpleNamespace(table=table, lens=lens, keys=keys, shared=shared)
    return Problem((q, *caches, *flat), ours, plain, context)


def sample(suite: Suite) -> list[Case]:
    """32 rows over the vocabularies; plain PyTorch draws with transformers' filters and then looks the logprob up."""
    cases = []
    for vocabulary in dict.fromkeys(model.vocabulary for model in suite.models):
        for name, (top_k, top_p) in _FILTERS.items():
            need = 12.0 * _ROWS * vocabulary * WIDER.itemsize
            title = f"[{_ROWS}, {vocabulary}] {name}"
            work = {FORWARD: Work(0, 1.0 * _ROWS * vocabulary * DTYPE.itemsize)}
            cases.append(Case("sample", title, need, partial(draw, vocabulary, top_k, top_p), work, SAMPLE_PEERS))
    return cases


def draw(vocabulary: int, top_k: int, top_p: float) -> Problem:
    """A token of each of 32 rows of logits."""
    logits = randn(_ROWS, vocabulary, scale=2)
    seeds = torch.arange(_ROWS, device=DEVICE)

    def plain(logits: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.multinomial(filtered(logits, top_k, top_p).softmax(-1), 1)
        return tokens[:, 0], logits.log_softmax(-1).gather(-1, tokens)[:, 0]

    def checked(wide: Arguments, result: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Each logprob less the true one of its token, if that is as large as the smallest that the filters leave."""
        tokens, logprobs = result
        (true,) = wide
        kept = filtered(true, top_k, top_p)
        lowest = kept.masked_fill(kept.isinf(), torch.inf).amin(-1)
        left = true.gather(-1, tokens[:, None])[:, 0] >= lowest
        off = logprobs - true.log_softmax(-1).gather(-1, tokens[:, None])[:, 0].to(logprobs.dtype)
        return [torch.where(left, off, torch.inf)]

    def ours(logits: Tensor) -> tuple[Tensor, Tensor]:
        return ops.sample(logits, temperature=1.0, top_k=top_k, top_p=top_p, min_p=0.0, seeds=seeds, offsets=seeds)

    truth = [torch.zeros(_ROWS, device=DEVICE, dtype=WIDER)]
    context = SimpleNamespace(top_k=top_k, top_p=top_p, filtered=partial(filtered, top_k=top_k, top_p=top_p))
    return Problem((logits,), ours, plain, context, checked=checked, truth=lambda: truth)


def filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits after transformers' TopKLogitsWarper and TopPLogitsWarper."""
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, places = logits.sort()
        low = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        low[:, -1:] = False
        logits = logits.masked_fill(low.scatter(1, places, low), -torch.inf)
    return logits
