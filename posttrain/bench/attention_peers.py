"""Adapters to the attention of others, as in peers.py. The context has the layout and its segments' lengths."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from posttrain.bench.case import Arguments, Function, Problem, Unavailable, Way
from posttrain.bench.device import DEVICE, GPU
from posttrain.bench.peers import on_a_gpu


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of `[batch, L, heads, width]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def padded(problem: Problem) -> Way:
    """SDPA on the batch padded on the right, which causal queries don't see; padding is outside the time."""
    lengths = _sequences(problem)

    def pad(x: Tensor) -> Tensor:
        return pad_sequence(x.detach().split(lengths), batch_first=True)

    def unpad(x: Tensor) -> Tensor:
        return torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])

    def prepare(tensors: Arguments) -> Arguments:
        return tuple(pad(x).requires_grad_(x.requires_grad) for x in tensors)

    return Way(sdpa, prepare, into=pad, back=unpad)


def cudnn(problem: Problem) -> Way:
    """`padded` by cuDNN."""
    on_a_gpu()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(q, k, v)

    return padded(problem)._replace(call=call)


def flex(problem: Problem) -> Function:
    """FlexAttention with the layout's mask, compiled; on a CPU with its fastest block size, and without a backward."""
    layout = problem.context.layout
    until = layout.visible_until

    def seen(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < until[k])

    size = layout.num_tokens
    mask = create_block_mask(seen, None, None, size, size, device=DEVICE, BLOCK_SIZE=128 if GPU else 64)
    torch._dynamo.reset()
    fast = torch.compile(flex_attention, dynamic=False)

    def call(*tensors: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in tensors)
        return fast(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return call


def torch_varlen(problem: Problem) -> Function:
    """torch's own packed attention."""
    on_a_gpu()
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = _bounds(problem)
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    options: dict[str, Any] = {"window_size": (-1, 0), **grouped}
    return lambda q, k, v: varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)


def flash2(problem: Problem) -> Function:
    """flash-attn 2."""
    from flash_attn import flash_attn_varlen_func

    return _flash(problem, flash_attn_varlen_func)


def flash3(problem: Problem) -> Function:
    """flash-attn 3, for Hopper."""
    from flash_attn_interface import flash_attn_varlen_func

    return _flash(problem, flash_attn_varlen_func)


def flash4(problem: Problem) -> Function:
    """flash-attn 4."""
    from flash_attn.cute import flash_attn_varlen_func

    return _flash(problem, flash_attn_varlen_func)


def _flash(problem: Problem, function: Function) -> Function:
    """One of flash-attn's functions, some of which also return the log-sum-exp."""
    bounds, longest = _bounds(problem)
    options: dict[str, Any] = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "causal": True}
    names = inspect.signature(function).parameters
    options |= {name: longest for name in ("max_seqlen_q", "max_seqlen_k") if name in names}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v, **options)
        return out if isinstance(out, Tensor) else out[0]

    return call


def prefix_grouper(problem: Problem) -> Function:
    """prefix-grouper over SDPA: one call for the prompt, one for the completions over copies of its keys and values."""
    from prefix_grouper import PrefixGrouper

    prompt, *answers = problem.context.lengths
    length = answers[0]
    grouper = PrefixGrouper([[prompt, *answers]], device=DEVICE)
    late = torch.ones(length, prompt + length, dtype=torch.bool).tril(prompt)
    mask = causal_lower_right(length, prompt + length) if GPU else late

    def attend(q: Tensor, k: Tensor, v: Tensor, _padding: Tensor) -> Tensor:
        own: dict[str, Any] = {"is_causal": True} if q.shape[2] == k.shape[2] else {"attn_mask": mask}
        return scaled_dot_product_attention(q, k, v, enable_gqa=True, **own).transpose(1, 2)

    return lambda *tensors: grouper.forward(attend, *(x.transpose(0, 1)[None] for x in tensors))[0]


def _sequences(problem: Problem) -> list[int]:
    """Lengths of independent sequences. Raises for a shared prompt, which only copies could bring there."""
    if problem.context.shared:
        raise Unavailable("can't share a prompt; plain PyTorch is its time on copies")
    return problem.context.lengths


def _bounds(problem: Problem) -> tuple[Tensor, int]:
    """Cumulative lengths of the sequences, and the longest."""
    lengths = _sequences(problem)
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32), max(lengths)
