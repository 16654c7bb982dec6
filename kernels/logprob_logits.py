"""Tiles of logits for the Triton kernels of linear_logprob: functions that several of them call.

`m` are targets, `y` their tokens, `row` the rows of hidden that predict them. What depends on which tensors there are
is decided when a kernel is compiled: an absent one is None.
"""

import triton
import triton.language as tl

from posttrain.kernels.math import tanh
from posttrain.ops import logprob_problem

GROUP = tl.constexpr(16)  # blocks of targets that share a split's weights while those are in L2
IGNORED = tl.constexpr(logprob_problem.IGNORED)
LOWEST = tl.constexpr(-1e30)  # stands for a logit of -infinity: products with 0 stay 0, differences stay numbers


@triton.jit
def target_block(targets_ptr, block, M, BLOCK_M: tl.constexpr):
    """(m, which of them there are, y) of a block of targets."""
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < M
    return m, inside, tl.load(targets_ptr + m, mask=inside, other=IGNORED)


@triton.jit
def hidden_rows(rows_ptr, m, inside):
    """The row of hidden that predicts each target, as int64."""
    if rows_ptr is None:
        return tl.where(inside, m, 0).to(tl.int64)
    return tl.load(rows_ptr + m, mask=inside, other=0)


@triton.jit
def slab_place(slab_ptr, row_block, tile, stride, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    """Addresses of a tile of a slab: a 64-bit start and 32-bit offsets."""
    start = slab_ptr + tl.cast(row_block, tl.int64) * BLOCK_M * stride + tile * BLOCK_V
    return start + tl.arange(0, BLOCK_M)[:, None] * stride + tl.arange(0, BLOCK_V)[None, :]


@triton.jit
def logits_tile(
    tensors,
    sizes,
    row,  # [BLOCK_M] int64
    m,  # [BLOCK_M], clamped to those there are
    first_column,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN_H: tl.constexpr,
):
    """A tile of logits z [BLOCK_M, BLOCK_V]; columns past V repeat the last one."""
    hidden_ptr, weight_ptr, bias_ptr, low_ptr, lora_b_ptr = tensors
    V, H, R, hidden_stride, weight_stride, inner, outer = sizes
    column = tl.minimum(tl.arange(0, BLOCK_V), V - 1 - first_column)
    k = tl.arange(0, BLOCK_K)
    x_offset = row[:, None] * hidden_stride + k[None, :]
    w_offset = column[None, :] * weight_stride + k[:, None]
    weight_tile = weight_ptr + tl.cast(first_column, tl.int64) * weight_stride
    raw = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(0, H, BLOCK_K):
        if EVEN_H:
            x = tl.load(hidden_ptr + start + x_offset)
            w = tl.load(weight_tile + start + w_offset)
        else:
            x = tl.load(hidden_ptr + start + x_offset, mask=k[None, :] < H - start, other=0.0)
            w = tl.load(weight_tile + start + w_offset, mask=k[:, None] < H - start, other=0.0)
        raw = tl.dot(x, w, raw, input_precision="ieee")
    if low_ptr is not None:
        rank = tl.arange(0, BLOCK_R)
        for start in range(0, R, BLOCK_R):
            low = tl.load(
                low_ptr + m.to(tl.int64)[:, None] * R + start + rank[None, :], mask=rank[None, :] < R - start, other=0.0
            )
            b_offset = (first_column + column).to(tl.int64)[None, :] * R + start + rank[:, None]
            b = tl.load(lora_b_ptr + b_offset, mask=rank[:, None] < R - start, other=0.0)
            raw = tl.dot(low, b, raw, input_precision="ieee")
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + first_column + column).to(tl.float32)
        raw += tl.maximum(bias, LOWEST)[None, :]
    return scaled(raw, inner, outer, SOFTCAP)


@triton.jit
def scaled(raw, inner, outer, SOFTCAP: tl.constexpr):
    """Logits z from raw logits."""
    if SOFTCAP:
        return outer * tanh(raw * inner)
    return raw * inner


@triton.jit
def slope(z, outer):
    """Derivative of the cap, 1 - tanh^2, from z."""
    th = z * (1.0 / outer)
    return 1.0 - th * th
