"""Adapters to what others have for generation, as in peers.py: rotations into a cache, attention over it, drawing.

flash-attn's `flash_attn_with_kvcache` rotates and writes as well, but only together with its attention, so that nothing
of it is alone what rope_cache does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from posttrain.bench.case import Arguments, Function, Problem, Way
from posttrain.bench.device import DEVICE, DTYPE, GPU
from posttrain.bench.model import twin
from posttrain.bench.peers import on_a_gpu

_WORKSPACE = 128 << 20  # bytes that FlashInfer wants to have


def vllm_rope_cache(problem: Problem) -> Way:
    """vLLM's two kernels. The first turns queries and keys in place, so they are its own."""
    on_a_gpu()
    from vllm import _custom_ops as vllm

    slots = problem.context.slots
    rows, scale = torch.arange(len(slots), device=DEVICE), torch.ones((), device=DEVICE)

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        vllm.rotary_embedding(rows, q, k, v.shape[2], table, True)
        vllm.reshape_and_cache_flash(k.view_as(v), v, *caches, slots, "auto", scale, scale)
        return q.view(len(slots), -1, v.shape[2]), *caches

    return Way(call, partial(_with_table, DTYPE))


def flashinfer_rope_cache(problem: Problem) -> Way:
    """FlashInfer's two kernels. The first turns queries and keys in place, so they are its own."""
    on_a_gpu()
    from flashinfer.page import append_paged_kv_cache
    from flashinfer.rope import apply_rope_with_cos_sin_cache_inplace

    slots = problem.context.slots.int()
    page = problem.arguments[-1].shape[1]
    rows, starts = (torch.arange(len(slots) + more, device=DEVICE, dtype=torch.int32) for more in (0, 1))

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        apply_rope_with_cos_sin_cache_inplace(rows, q, k, v.shape[2], table)
        places = (rows, slots % page, caches, slots // page, starts, slots % page + 1)
        append_paged_kv_cache(k.view_as(v), v, *places)
        return q.view(len(slots), -1, v.shape[2]), *caches

    return Way(call, partial(_with_table, torch.float32))


def _with_table(dtype: torch.dtype, arguments: Arguments) -> Arguments:
    """Queries and keys of their own without heads, and a table of cosines and sines in `dtype`, a row for a token."""
    q, k, v, cos, sin, *caches = arguments
    half = cos.shape[1] // 2
    table = torch.cat([cos[:, :half], sin[:, :half]], 1).to(dtype)
    return (q.flatten(1).clone(), k.flatten(1).clone(), v, table, *caches)


def sdpa_gathering(problem: Problem) -> Function:
    """SDPA on copies of the pages in the order of each sequence's table."""
    table, keys = problem.context.table.long(), problem.context.keys

    def call(q: Tensor, k: Tensor, v: Tensor, *_flat: Tensor) -> Tensor:
        k, v = (x[table].flatten(1, 2)[:, :keys].transpose(1, 2) for x in (k, v))
        return scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    return call


def flex_paged(problem: Problem) -> Function:
    """FlexAttention over the pages where they lie: each sequence's mask has the blocks of its own. Compiled."""
    context, (pages, page) = problem.context, problem.arguments[1].shape[:2]
    rows, size = len(context.table), pages * page
    seen = torch.zeros(rows, size, dtype=torch.bool, device=DEVICE)
    tokens = (context.table.long()[:, :, None] * page + torch.arange(page, device=DEVICE)).flatten(1)
    seen.scatter_(1, tokens[:, : context.keys], True)
    mask = create_block_mask(lambda b, _head, _q, key: seen[b, key], rows, None, 1, size, device=DEVICE, BLOCK_SIZE=128)
    torch._dynamo.reset()
    fast = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor, *_flat: Tensor) -> Tensor:
        k, v = (x.flatten(0, 1).transpose(0, 1)[None].expand(rows, -1, -1, -1) for x in (k, v))
        return fast(q[:, :, None], k, v, block_mask=mask, enable_gqa=True)[:, :, 0]

    return call


def flash2_decode(problem: Problem) -> Way:
    """flash-attn 2 on caches that are contiguous already: its pages would have to have 256 tokens."""
    from flash_attn import flash_attn_with_kvcache

    def prepare(arguments: Arguments) -> Arguments:
        return (arguments[0][:, None], *(x.transpose(1, 2).contiguous() for x in arguments[3:]))

    lens = problem.context.lens
    return Way(lambda q, k, v: flash_attn_with_kvcache(q, k, v, cache_seqlens=lens)[:, 0], prepare)


def flash3_decode(problem: Problem) -> Function:
    """flash-attn 3 on the pages, for Hopper."""
    from flash_attn_interface import flash_attn_with_kvcache

    options = {"cache_seqlens": problem.context.lens, "page_table": problem.context.table}
    return lambda q, k, v, *_flat: flash_attn_with_kvcache(q[:, None], k, v, **options)[:, 0]


def flashinfer_decode(problem: Problem) -> Function:
    """FlashInfer on the pages, planned outside the time; a shared prompt by its cascade, which reads it once."""
    on_a_gpu()
    import flashinfer

    context, (q, cache, *_) = problem.context, problem.arguments
    sizes = (q.shape[1], cache.shape[2], q.shape[2], cache.shape[1])
    workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=DEVICE)
    common, rows, page = context.shared // cache.shape[1], len(context.table), cache.shape[1]
    own = context.table[:, common:]
    starts = torch.arange(rows + 1, device=DEVICE, dtype=torch.int32)
    last = (context.lens - 1) % page + 1
    wrapper: Any
    if not common:
        grouped = q.shape[1] >= 4 * cache.shape[2]
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=grouped)
        wrapper.plan(starts * own.shape[1], own.flatten(), last, *sizes, q_data_type=DTYPE, data_type=DTYPE)
    else:
        first = context.table[0, :common].contiguous()
        whole = starts.new_tensor([page])
        wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
        wrapper.plan(
            [starts[[0, -1]], starts],
            [starts.new_tensor([0, common]), starts * own.shape[1]],
            [first, own.flatten()],
            [whole, last],
            *sizes,
            q_data_type=DTYPE,
        )
    return lambda q, k, v, *_flat: wrapper.run(q, (k, v))


def warpers_of_transformers(problem: Problem) -> Function:
    """The warpers of transformers' `generate` one after the other, and multinomial."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    context = problem.context
    warpers: list[Callable[..., Tensor]] = [TopKLogitsWarper(context.top_k)] if context.top_k else []
    warpers += [TopPLogitsWarper(context.top_p)] if context.top_p < 1 else []

    def call(logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits
        for warper in warpers:
            scores = warper(None, scores)
        return _with_logprob(logits, torch.multinomial(scores.softmax(-1), 1))

    return call


def race(problem: Problem) -> Function:
    """The largest of p / e with e from an exponential distribution, which is a draw from p, as gpt-fast and vLLM do."""

    def call(logits: Tensor) -> tuple[Tensor, Tensor]:
        p = problem.context.filtered(logits).softmax(-1)
        return _with_logprob(logits, (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True))

    return call


def flashinfer_sample(problem: Problem) -> Function:
    """FlashInfer's draws, which need no order of the vocabulary."""
    on_a_gpu()
    from flashinfer import sampling

    top_k, top_p = problem.context.top_k, problem.context.top_p

    def call(logits: Tensor) -> tuple[Tensor, Tensor]:
        if top_k:
            tokens = sampling.top_k_top_p_sampling_from_logits(logits, top_k, top_p)
        elif top_p < 1:
            tokens = sampling.top_p_sampling_from_probs(logits.float().softmax(-1), top_p)
        else:
            tokens = sampling.sampling_from_probs(logits.float().softmax(-1))
        return _with_logprob(logits, tokens.long()[:, None])

    return call


def continuous_batching(problem: Problem) -> Function:
    """transformers' `generate_batch`, with a cache that just holds the sequences, a manager that stays, and graphs."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    context = problem.context
    model = twin(context.model)
    model.set_attn_implementation("sdpa")
    rows = context.rows.tolist()
    options = GenerationConfig(max_new_tokens=context.length, do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0)
    blocks, tokens = len(rows) * (2 * context.length // 32 + 1), 8192 if GPU else 512
    cache = ContinuousBatchingConfig(page_size=32, num_blocks=blocks, max_batch_tokens=tokens, use_cuda_graph=GPU)

    def call() -> tuple[Tensor, None]:
        out = model.generate_batch(rows, options, cache, persistent_manager=True, warmup=GPU)
        drawn = [one.generated_tokens for one in out.values()]
        return torch.tensor(drawn, device=DEVICE), None

    return call


def _with_logprob(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return tokens[:, 0], logits.log_softmax(-1).gather(-1, tokens)[:, 0]
