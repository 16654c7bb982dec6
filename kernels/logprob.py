"""linear_logprob on a GPU: GEMM and softmax statistics in one kernel (posttrain/ops/logprob.py has the formulas).

A program owns a block of targets and a *split* of the vocabulary, a fixed number of column tiles. It computes each
tile of logits in registers and folds it into the statistics of the tokens other than the target:

    m = max z_v,   s = sum e^(z_v - m),   t = sum (z_v - m) e^(z_v - m)

A second kernel merges the splits in order. Tiles, splits and that order don't depend on how many targets there are, so
a target's results have the same bits alone and in a batch, and with or without a gradient.

Saved state of a frozen head ("unit"): u = d logprob / dx = q W_y - sum over v != y of p_v W_v, with q = 1 - p_y. The
statistics kernel also writes P = e^(z_v - r) for a slab of the vocabulary, and a library GEMM adds P W to u. The
reference r of a target starts at z_y, which is near the maximum for any model worth training, and rises only if some
logit exceeds it by HEADROOM: then `_align_kernel` rescales that target's rows. At the end u takes the factor
e^(r - lse). Two GEMMs in all.

Backward otherwise: for each slab of the vocabulary one kernel recomputes the logits and writes their gradient in the
dtype of the inputs; then two library GEMMs, dX += D W in float32 and dW = D^T X, rounded once.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.math import tanh
from posttrain.ops.logprob_problem import IGNORED, Grads, Needs, Problem


class Blocks(NamedTuple):
    """Tile sizes of the GEMM kernels: targets, vocabulary columns, and the step along H."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


TILES = 4  # column tiles in a split
GROUP = 16  # blocks of targets that share a split's weights while those are in L2
HEADROOM = {torch.float16: 10.0, torch.bfloat16: 40.0, torch.float32: 40.0}  # e^10 < 65504

# Compute capability -> tiles for half precision. A bias, a softcap or the entropy takes registers: then NARROW.
WIDE = {
    80: Blocks(128, 128, 64, 8, 3),
    86: Blocks(128, 128, 32, 8, 3),
    90: Blocks(128, 256, 64, 8, 3),
    120: Blocks(128, 128, 32, 8, 3),
}
NARROW = {
    80: Blocks(128, 64, 32, 4, 3),
    86: Blocks(64, 64, 32, 4, 3),
    90: Blocks(128, 128, 64, 8, 4),
    100: Blocks(128, 64, 64, 4, 4),
    120: Blocks(64, 64, 32, 4, 3),
}
FLOAT_BLOCKS = Blocks(64, 64, 32, 8, 2)
INTERPRETER_BLOCKS = Blocks(16, 16, 16, 4, 1)

_IGNORED = tl.constexpr(IGNORED)
_LOWEST = tl.constexpr(-1e30)  # stands for a logit of -infinity: products with 0 stay 0, differences stay numbers


@triton.jit
def _log1p(x):
    """log(1 + x) for 0 <= x <= 1, as 2 atanh(x / (2 + x)): tiny x stay exact, which log(1 + x) would round away."""
    w = x / (2.0 + x)
    square = w * w
    series = 1.0 / 15
    series = series * square + 1.0 / 13
    series = series * square + 1.0 / 11
    series = series * square + 1.0 / 9
    series = series * square + 1.0 / 7
    series = series * square + 1.0 / 5
    series = series * square + 1.0 / 3
    return 2.0 * w + 2.0 * w * square * series


@triton.jit
def _scaled(raw, inner, outer, SOFTCAP: tl.constexpr):
    """Logits z from raw logits."""
    if SOFTCAP:
        return outer * tanh(raw * inner)
    return raw * inner


@triton.jit
def _slope(z, outer):
    """Derivative of the cap, 1 - tanh^2, from z."""
    th = z * (1.0 / outer)
    return 1.0 - th * th


@triton.jit
def _place(num_row_blocks, num_columns, GROUP: tl.constexpr):
    """(row block, column) of this program: GROUP row blocks go through all columns together."""
    program = tl.program_id(0)
    group = program // (GROUP * num_columns)
    first = group * GROUP
    size = tl.minimum(num_row_blocks - first, GROUP)
    within = program - group * GROUP * num_columns
    return first + within % size, within // size


@triton.jit
def _slab_tile(slab_ptr, row_block, tile, stride, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    """Addresses of a tile of a slab: a 64-bit start and 32-bit offsets."""
    start = slab_ptr + tl.cast(row_block, tl.int64) * BLOCK_M * stride + tile * BLOCK_V
    return start + tl.arange(0, BLOCK_M)[:, None] * stride + tl.arange(0, BLOCK_V)[None, :]


@triton.jit
def _hidden_rows(rows_ptr, m, inside):
    """The row of hidden that predicts each target, as int64."""
    if rows_ptr is None:
        return tl.where(inside, m, 0).to(tl.int64)
    return tl.load(rows_ptr + m, mask=inside, other=0)


@triton.jit
def _logits(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    low_ptr,
    lora_b_ptr,
    row,  # [BLOCK_M] int64, rows of hidden
    m,  # [BLOCK_M], targets, clamped to those there are
    first_column,
    V,
    H,
    R,
    hidden_stride,
    weight_stride,
    inner,
    outer,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN_H: tl.constexpr,
):
    """A tile of logits z [BLOCK_M, BLOCK_V]; columns past V repeat the last one."""
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
        raw += tl.maximum(bias, _LOWEST)[None, :]
    return _scaled(raw, inner, outer, SOFTCAP)


@triton.jit
def _merge(m1, s1, t1, m2, s2, t2, ENTROPY: tl.constexpr):
    """Statistics of two disjoint sets of tokens, as those of their union. The fma leaves the compiler no choice."""
    top = tl.maximum(m1, m2)
    f1, f2 = tl.exp(m1 - top), tl.exp(m2 - top)
    if ENTROPY:
        t1 = tl.fma(m1 - top, s1, t1)
        t2 = tl.fma(m2 - top, s2, t2)
        t1 = tl.fma(t1, f1, t2 * f2)
    return top, tl.fma(s1, f1, s2 * f2), t1


@triton.jit
def _statistics_kernel(
    hidden_ptr,
    weight_ptr,
    targets_ptr,
    rows_ptr,
    bias_ptr,
    low_ptr,  # [M, R], scaling * x A^T
    lora_b_ptr,
    m_ptr,  # [splits, M], as s and t
    s_ptr,
    t_ptr,
    p_ptr,  # [M rounded up to BLOCK_M, p_stride], one slab of unnormalised probabilities, or None
    reference_ptr,  # [M], the r that each target begins the slab with
    tile_reference_ptr,  # [tiles of the slab, M], the r of each tile
    M,
    V,
    H,
    R,
    hidden_stride,
    weight_stride,
    p_stride,
    inner,
    outer,
    headroom,
    first_split,
    num_splits,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN_H: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    row_block, slab_split = _place(tl.cdiv(M, BLOCK_M), num_splits, GROUP)
    split = first_split + slab_split
    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < M
    y = tl.load(targets_ptr + m, mask=inside, other=_IGNORED)
    counts = y != _IGNORED
    first_tile = split * TILES
    last_tile = tl.minimum(first_tile + TILES, tl.cdiv(V, BLOCK_V))
    if tl.max(counts.to(tl.int32)) > 0:
        row = _hidden_rows(rows_ptr, m, inside)
        top = tl.full((BLOCK_M,), _LOWEST, tl.float32)
        s = tl.zeros((BLOCK_M,), tl.float32)
        t = tl.zeros((BLOCK_M,), tl.float32)
        if p_ptr is not None:
            reference = tl.load(reference_ptr + m, mask=inside, other=0.0)
        for tile in range(first_tile, last_tile):
            z = _logits(
                hidden_ptr,
                weight_ptr,
                bias_ptr,
                low_ptr,
                lora_b_ptr,
                row,
                tl.where(inside, m, 0),
                tile * BLOCK_V,
                V,
                H,
                R,
                hidden_stride,
                weight_stride,
                inner,
                outer,
                BLOCK_M,
                BLOCK_V,
                BLOCK_K,
                BLOCK_R,
                SOFTCAP,
                EVEN_H,
            )
            column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            others = tl.where((column[None, :] == y[:, None]) | (column >= V)[None, :], _LOWEST, z)
            tile_top = tl.max(others, 1)
            e = tl.exp(others - tile_top[:, None])
            tile_s = tl.sum(e, 1)
            tile_t = tl.sum(e * (others - tile_top[:, None]), 1) if ENTROPY else tile_s
            top, s, t = _merge(top, s, t, tile_top, tile_s, tile_t, ENTROPY)
            if p_ptr is not None:
                reference = tl.where(tile_top > reference + headroom, tile_top, reference)
                slab_tile = tile - first_split * TILES
                tl.store(tile_reference_ptr + slab_tile * M + m, reference, mask=inside)
                p = e * tl.where(counts, tl.exp(tile_top - reference), 0.0)[:, None]
                if SOFTCAP:
                    p *= _slope(tl.maximum(others, -outer), outer)
                place = _slab_tile(p_ptr, row_block, slab_tile, p_stride, BLOCK_M, BLOCK_V)
                tl.store(place, p.to(p_ptr.dtype.element_ty))
        partial = split.to(tl.int64) * M + m
        tl.store(m_ptr + partial, top, mask=inside)
        tl.store(s_ptr + partial, s, mask=inside)
        if ENTROPY:
            tl.store(t_ptr + partial, t, mask=inside)
    elif p_ptr is not None:
        nothing = tl.zeros((BLOCK_M, BLOCK_V), p_ptr.dtype.element_ty)
        for tile in range(first_tile, last_tile):
            slab_tile = tile - first_split * TILES
            tl.store(_slab_tile(p_ptr, row_block, slab_tile, p_stride, BLOCK_M, BLOCK_V), nothing)
            unchanged = tl.load(reference_ptr + m, mask=inside, other=0.0)
            tl.store(tile_reference_ptr + slab_tile * M + m, unchanged, mask=inside)


@triton.jit
def _combine_kernel(
    targets_ptr,
    m_ptr,
    s_ptr,
    t_ptr,
    z_target_ptr,
    logprob_ptr,
    entropy_ptr,
    lse_ptr,
    lse_low_ptr,
    is_top1_ptr,
    others_ptr,  # [M], q, or None
    M,
    V,
    num_splits,
    BLOCK: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Merge the splits in order and finish. A target out of range gives NaN."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < M
    y = tl.load(targets_ptr + i, mask=inside, other=_IGNORED)
    counts = y != _IGNORED
    top = tl.full((BLOCK,), _LOWEST, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    t = tl.zeros((BLOCK,), tl.float32)
    for split in range(num_splits):
        partial = tl.cast(split, tl.int64) * M + i
        split_top = tl.load(m_ptr + partial, mask=counts, other=0.0)
        split_s = tl.load(s_ptr + partial, mask=counts, other=0.0)
        split_t = tl.load(t_ptr + partial, mask=counts, other=0.0) if ENTROPY else split_s
        top, s, t = _merge(top, s, t, split_top, split_s, split_t, ENTROPY)
    z = tl.load(z_target_ptr + i, mask=counts & (y >= 0) & (y < V), other=float("nan"))
    s = tl.where(counts, s, 1.0)
    log_s = tl.log(s)
    d = (top - z) + log_s
    small = tl.exp(-tl.abs(d))
    bend = _log1p(small)
    logprob = -(tl.maximum(d, 0.0) + bend)
    q = tl.where(d < 0, small, 1.0) / (1.0 + small)
    anchor, rest = tl.where(d < 0, z, top), tl.where(d < 0, 0.0, log_s) + bend
    lse = anchor + rest
    tl.store(logprob_ptr + i, tl.where(counts, logprob, 0.0), mask=inside)
    tl.store(lse_ptr + i, tl.where(counts, lse, 0.0), mask=inside)
    tl.store(lse_low_ptr + i, tl.where(counts, (anchor - lse) + rest, 0.0), mask=inside)
    tl.store(is_top1_ptr + i, (counts & (z >= top)).to(tl.uint8), mask=inside)
    if ENTROPY:
        log_q = -(tl.maximum(-d, 0.0) + bend)
        entropy = q * (log_s - t / s - log_q) - tl.exp(logprob) * tl.maximum(logprob, _LOWEST)
        tl.store(entropy_ptr + i, tl.where(counts, entropy, 0.0), mask=inside)
    if others_ptr is not None:
        tl.store(others_ptr + i, q, mask=inside)


@triton.jit
def _align_kernel(
    p_ptr,
    u_ptr,
    reference_ptr,
    tile_reference_ptr,
    M,
    H,
    p_stride,
    num_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One reference per target for the whole slab; what was written relative to a lower one is rescaled."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < M
    before = tl.load(reference_ptr + m, mask=inside, other=0.0)
    after = before
    for tile in range(num_tiles):
        after = tl.maximum(after, tl.load(tile_reference_ptr + tile * M + m, mask=inside, other=0.0))
    after = tl.where(inside, after, before)
    for tile in range(num_tiles):
        shift = tl.load(tile_reference_ptr + tile * M + m, mask=inside, other=0.0) - after
        shift = tl.where(inside, shift, 0.0)
        if tl.min(shift) < 0:
            offset = m.to(tl.int64)[:, None] * p_stride + tile * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
            p = tl.load(p_ptr + offset, mask=inside[:, None], other=0.0)
            tl.store(p_ptr + offset, (p * tl.exp(shift)[:, None]).to(p.dtype), mask=inside[:, None])
    if tl.min(before - after) < 0:
        for start in range(0, H, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)
            offset = m.to(tl.int64)[:, None] * H + h[None, :]
            mask = inside[:, None] & (h < H)[None, :]
            u = tl.load(u_ptr + offset, mask=mask, other=0.0)
            tl.store(u_ptr + offset, u * tl.exp(before - after)[:, None], mask=mask)
    tl.store(reference_ptr + m, after, mask=inside)


@triton.jit
def _finish_unit_kernel(
    weight_ptr,
    targets_ptr,
    u_ptr,
    reference_ptr,
    z_target_ptr,
    lse_ptr,
    lse_low_ptr,
    others_ptr,
    M,
    V,
    H,
    weight_stride,
    outer,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """u = scale (q slope_y W_y - e^(r - lse) u)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = m < M
    y = tl.load(targets_ptr + m, mask=inside, other=_IGNORED)
    counts = (y >= 0) & (y < V)
    z = tl.load(z_target_ptr + m, mask=counts, other=0.0)
    reference = tl.load(reference_ptr + m, mask=counts, other=0.0)
    lse = tl.load(lse_ptr + m, mask=counts, other=0.0)
    lse_low = tl.load(lse_low_ptr + m, mask=counts, other=0.0)
    q = tl.load(others_ptr + m, mask=counts, other=0.0)
    toward = scale * q
    if SOFTCAP:
        toward *= _slope(z, outer)
    away = scale * tl.exp((reference - lse) - lse_low)
    offset = m.to(tl.int64)[:, None] * H + h[None, :]
    mask = inside[:, None] & (h < H)[None, :]
    w = tl.load(
        weight_ptr + tl.where(counts, y, 0)[:, None] * weight_stride + h[None, :],
        mask=counts[:, None] & (h < H)[None, :],
        other=0.0,
    )
    u = tl.load(u_ptr + offset, mask=mask, other=0.0)
    u = toward[:, None] * w.to(tl.float32) - away[:, None] * u
    tl.store(u_ptr + offset, tl.where(counts[:, None], u, 0.0), mask=mask)


@triton.jit
def _target_logit_kernel(
    hidden_ptr,
    weight_ptr,
    targets_ptr,
    rows_ptr,
    bias_ptr,
    low_ptr,
    lora_b_ptr,
    z_target_ptr,
    M,
    V,
    H,
    R,
    hidden_stride,
    weight_stride,
    inner,
    outer,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """z_y of every target, 0 for one that is skipped. The reference r begins here, and the sums leave y out."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < M
    y = tl.load(targets_ptr + m, mask=inside, other=_IGNORED)
    counts = (y >= 0) & (y < V)
    row = _hidden_rows(rows_ptr, m, inside)
    k = tl.arange(0, BLOCK_K)
    products = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, H, BLOCK_K):
        mask = counts[:, None] & (k < H - start)[None, :]
        x = tl.load(hidden_ptr + start + row[:, None] * hidden_stride + k[None, :], mask=mask, other=0.0)
        w = tl.load(weight_ptr + start + y[:, None] * weight_stride + k[None, :], mask=mask, other=0.0)
        products += x.to(tl.float32) * w.to(tl.float32)
    if low_ptr is not None:
        for start in range(0, R, BLOCK_K):
            mask = counts[:, None] & (k < R - start)[None, :]
            low = tl.load(low_ptr + start + m.to(tl.int64)[:, None] * R + k[None, :], mask=mask, other=0.0)
            b = tl.load(lora_b_ptr + start + y[:, None] * R + k[None, :], mask=mask, other=0.0)
            products += low.to(tl.float32) * b.to(tl.float32)
    raw = tl.sum(products, 1)
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + y, mask=counts, other=0.0).to(tl.float32)
    tl.store(z_target_ptr + m, _scaled(raw, inner, outer, SOFTCAP), mask=inside)


@triton.jit
def _gradient_kernel(
    hidden_ptr,
    weight_ptr,
    targets_ptr,
    rows_ptr,
    bias_ptr,
    low_ptr,
    lora_b_ptr,
    lse_ptr,  # [M], as the next four
    lse_low_ptr,
    common_ptr,  # g_lse - g_logprob - g_entropy entropy
    grad_target_ptr,  # dz_y
    grad_entropy_ptr,  # or None
    d_ptr,  # [M rounded up to BLOCK_M, d_stride], gradient of one slab of raw logits
    M,
    V,
    H,
    R,
    hidden_stride,
    weight_stride,
    d_stride,
    inner,
    outer,
    first_tile,
    num_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN_H: tl.constexpr,
):
    row_block, slab_tile = _place(tl.cdiv(M, BLOCK_M), num_tiles, GROUP)
    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < M
    y = tl.load(targets_ptr + m, mask=inside, other=_IGNORED)
    counts = y != _IGNORED
    first_column = (first_tile + slab_tile) * BLOCK_V
    column = first_column + tl.arange(0, BLOCK_V)
    place = _slab_tile(d_ptr, row_block, slab_tile, d_stride, BLOCK_M, BLOCK_V)
    if tl.max(counts.to(tl.int32)) > 0:
        z = _logits(
            hidden_ptr,
            weight_ptr,
            bias_ptr,
            low_ptr,
            lora_b_ptr,
            _hidden_rows(rows_ptr, m, inside),
            tl.where(inside, m, 0),
            first_column,
            V,
            H,
            R,
            hidden_stride,
            weight_stride,
            inner,
            outer,
            BLOCK_M,
            BLOCK_V,
            BLOCK_K,
            BLOCK_R,
            SOFTCAP,
            EVEN_H,
        )
        lse = tl.load(lse_ptr + m, mask=counts, other=0.0)
        lse_low = tl.load(lse_low_ptr + m, mask=counts, other=0.0)
        common = tl.load(common_ptr + m, mask=counts, other=0.0)
        at_target = tl.load(grad_target_ptr + m, mask=counts, other=0.0)
        log_p = (z - lse[:, None]) - lse_low[:, None]
        if grad_entropy_ptr is not None:
            grad_entropy = tl.load(grad_entropy_ptr + m, mask=counts, other=0.0)
            d = tl.exp(log_p) * (common[:, None] - grad_entropy[:, None] * log_p)
        else:
            d = tl.exp(log_p) * common[:, None]
        d = tl.where(column[None, :] == y[:, None], at_target[:, None], d)
        if SOFTCAP:
            d *= _slope(z, outer)
        d = tl.where(counts[:, None], d, 0.0)
        tl.store(place, d.to(d_ptr.dtype.element_ty))
    else:
        tl.store(place, tl.zeros((BLOCK_M, BLOCK_V), d_ptr.dtype.element_ty))


@triton.jit
def _project_kernel(
    hidden_ptr,
    rows_ptr,
    lora_a_ptr,
    low_ptr,
    M,
    H,
    R,
    hidden_stride,
    scaling,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """low = scaling x A^T, with an order of summation that doesn't depend on M."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < M
    row = _hidden_rows(rows_ptr, m, inside)
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, H, BLOCK_K):
        x = tl.load(
            hidden_ptr + start + row[:, None] * hidden_stride + k[None, :], mask=k[None, :] < H - start, other=0.0
        )
        a_mask = (rank < R)[None, :] & (k < H - start)[:, None]
        a = tl.load(lora_a_ptr + start + rank[None, :] * H + k[:, None], mask=a_mask, other=0.0)
        low = tl.dot(x, a, low, input_precision="ieee")
    offset = m.to(tl.int64)[:, None] * R + rank[None, :]
    tl.store(low_ptr + offset, (scaling * low).to(low_ptr.dtype.element_ty), mask=inside[:, None] & (rank < R)[None, :])


@triton.jit
def _sum_rows_kernel(
    x_ptr,  # [M, H] float32
    factor_ptr,  # [M] or None
    order_ptr,  # [M], targets sorted by row, or None: row n is target n
    ends_ptr,  # [N], where each row's run in `order` ends
    out_ptr,  # [N, H]
    H,
    BLOCK_H: tl.constexpr,
):
    """out[n] = sum of factor[m] x[m] over the targets of row n, in order."""
    n = tl.program_id(0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_H,), tl.float32)
    if order_ptr is None:
        first, last = n, n + 1
    else:
        first, last = tl.load(ends_ptr + n - 1, mask=n > 0, other=0).to(tl.int32), tl.load(ends_ptr + n).to(tl.int32)
    for i in range(first, last):
        m = tl.cast(i, tl.int64) if order_ptr is None else tl.load(order_ptr + i)
        x = tl.load(x_ptr + m * H + h, mask=h < H, other=0.0)
        if factor_ptr is not None:
            x *= tl.load(factor_ptr + m)
        total += x
    tl.store(out_ptr + n.to(tl.int64) * H + h, total.to(out_ptr.dtype.element_ty), mask=h < H)


def logprob_forward(p: Problem, save: str) -> tuple[Tensor, ...]:
    """(logprob, entropy, lse, what rounding took from lse, is_top1, saved); `save` is "none" or "unit" (no adapter)."""
    p = _row_major(p)
    size = len(p.targets)
    logprob, lse, lse_low = p.hidden.new_empty((3, size), dtype=torch.float32)
    entropy = p.hidden.new_empty(size if p.need_entropy else 0, dtype=torch.float32)
    is_top1 = torch.empty_like(p.targets, dtype=torch.uint8)
    results = (logprob, entropy, lse, lse_low, is_top1)
    unit = p.hidden.new_zeros((size, p.hidden.shape[1]) if save == "unit" else 0, dtype=torch.float32)
    with _device(p):
        if save == "unit":
            for part in _parts(p):
                _forward_with_unit(_part(p, part), unit[part], *(x[part] if len(x) else x for x in results))
        elif size:
            low = _low(p)
            partials = _Partials.empty(p, _target_logits(p, low))
            _statistics(p, partials, low)
            _combine(p, partials, *results)
    return logprob, entropy, lse, lse_low, is_top1.view(torch.bool), unit


def logprob_backward(
    p: Problem,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    logprob: Tensor,
    entropy: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    needs: Needs,
) -> Grads:
    """The gradients, from logits that are computed again slab by slab."""
    p = _row_major(p)
    size, width = len(p.targets), p.hidden.shape[1]
    with _device(p):
        low = _low(p)
        grad_x = p.hidden.new_zeros((size, width), dtype=torch.float32) if needs.hidden else None
        grad_low = None if low is None else low.new_zeros(low.shape, dtype=torch.float32)
        x = _gathered(p) if needs.weight or needs.lora else p.hidden
        grad_weight = torch.empty_like(p.weight) if needs.weight else None
        grad_bias = torch.empty_like(p.bias) if p.bias is not None and needs.bias else None
        grad_b = torch.empty_like(p.lora_b) if p.lora_b is not None and needs.lora else None
        for columns, d in _gradient_slabs(p, low, grad_logprob, grad_entropy, grad_lse, logprob, entropy, lse, lse_low):
            if grad_x is not None:
                _accumulate(grad_x, d, p.weight[columns])
            if grad_weight is not None:
                torch.mm(d.T, x, out=grad_weight[columns])
            if grad_bias is not None:
                grad_bias[columns] = d.sum(0, dtype=torch.float32)
            if low is not None and grad_low is not None and p.lora_b is not None:
                _accumulate(grad_low, d, p.lora_b[columns])
                if grad_b is not None:
                    torch.mm(d.T, low, out=grad_b[columns])
        grad_a = None
        if p.lora_a is not None and grad_low is not None:
            grad_low = (grad_low * p.lora_scaling).to(p.hidden.dtype)
            if grad_x is not None:
                _accumulate(grad_x, grad_low, p.lora_a)
            grad_a = torch.mm(grad_low.T, x) if needs.lora else None
        grad_hidden = None if grad_x is None else _to_rows(p, grad_x)
    return Grads(grad_hidden, grad_weight, grad_bias, grad_a, grad_b)


def unit_backward(grad_logprob: Tensor, unit: Tensor, rows: Tensor | None, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Gradient of hidden `[num_rows, H]` from the saved unit: sum of g u over each row's targets, in order."""
    with torch.cuda.device(unit.device) if unit.is_cuda else nullcontext():
        return _sum_rows(unit, grad_logprob.contiguous(), rows, num_rows, dtype)


class _Partials(NamedTuple):
    """Statistics of every split, and the logit of every target."""

    m: Tensor  # [splits, M]
    s: Tensor  # [splits, M]
    t: Tensor | None  # [splits, M]
    z_target: Tensor  # [M]

    @staticmethod
    def empty(p: Problem, z_target: Tensor) -> "_Partials":
        shape = (triton.cdiv(len(p.weight), _split_width(p)), len(p.targets))
        m, s = z_target.new_empty(shape), z_target.new_empty(shape)
        return _Partials(m, s, torch.empty_like(m) if p.need_entropy else None, z_target)


def blocks(p: Problem) -> Blocks:
    """Tile sizes for a problem: they depend on the device, the dtype and the features, never on M."""
    if not p.hidden.is_cuda:
        return INTERPRETER_BLOCKS
    if p.hidden.dtype == torch.float32:
        return FLOAT_BLOCKS
    major, minor = torch.cuda.get_device_capability(p.hidden.device)
    plain = p.bias is None and p.softcap is None and not p.need_entropy
    return _newest(WIDE if plain else NARROW, 10 * major + minor)


def _newest(table: dict[int, Blocks], capability: int) -> Blocks:
    return table[max(known for known in table if known <= max(capability, 80))]


def _split_width(p: Problem) -> int:
    return TILES * blocks(p).columns


def _slab(p: Problem, columns: int) -> Tensor:
    """Room for all targets, in whole blocks, and some columns of the vocabulary."""
    rows = blocks(p).rows
    return p.hidden.new_empty(triton.cdiv(len(p.targets), rows) * rows, columns)


def _device(p: Problem):
    return torch.cuda.device(p.hidden.device) if p.hidden.is_cuda else nullcontext()


def _row_major(p: Problem) -> Problem:
    """The problem with tensors whose rows are contiguous; hidden and weight may keep a row stride."""
    changed: dict[str, Any] = {}
    for name in ("hidden", "weight"):
        x = getattr(p, name)
        changed[name] = x if x.stride(-1) == 1 else x.contiguous()
    for name in ("targets", "rows", "bias", "lora_a", "lora_b"):
        x = getattr(p, name)
        changed[name] = None if x is None else x.contiguous()
    return replace(p, **changed)


def _parts(p: Problem) -> Iterator[slice]:
    """Runs of targets so short that their probabilities of one split fit in the budget."""
    step = blocks(p).rows
    fitting = p.memory_budget // (_split_width(p) * p.hidden.itemsize)
    step = max(step, fitting // step * step)
    for first in range(0, len(p.targets), step):
        yield slice(first, min(first + step, len(p.targets)))


def _part(p: Problem, part: slice) -> Problem:
    """The problem of some of its targets."""
    if p.rows is None:
        return replace(p, targets=p.targets[part], hidden=p.hidden[part])
    return replace(p, targets=p.targets[part], rows=p.rows[part])


def _scales(p: Problem) -> dict[str, Any]:
    """z = raw inner, or outer tanh(raw inner)."""
    if p.softcap is None:
        return {"inner": p.logit_scale / p.temperature, "outer": 1.0, "SOFTCAP": False}
    return {"inner": p.logit_scale / p.softcap, "outer": p.softcap / p.temperature, "SOFTCAP": True}


def _head(p: Problem, low: Tensor | None) -> dict[str, Any]:
    """The arguments of the kernels that compute logits."""
    return {
        "hidden_ptr": p.hidden,
        "weight_ptr": p.weight,
        "targets_ptr": p.targets,
        "rows_ptr": p.rows,
        "bias_ptr": p.bias,
        "low_ptr": low,
        "lora_b_ptr": p.lora_b,
        "M": len(p.targets),
        "V": len(p.weight),
        "H": p.hidden.shape[1],
        "R": 0 if low is None else low.shape[1],
        "hidden_stride": p.hidden.stride(0),
        "weight_stride": p.weight.stride(0),
        **_scales(p),
    }


def _tiles(p: Problem) -> dict[str, Any]:
    """Block sizes and launch options of the GEMM kernels."""
    b = blocks(p)
    return {
        "BLOCK_M": b.rows,
        "BLOCK_V": b.columns,
        "BLOCK_K": b.depth,
        "BLOCK_R": _rank_block(p),
        "GROUP": GROUP,
        "EVEN_H": p.hidden.shape[1] % b.depth == 0,
        "num_warps": b.warps,
        "num_stages": b.stages,
    }


def _rank_block(p: Problem) -> int:
    return 16 if p.lora_a is None else max(16, min(32, triton.next_power_of_2(len(p.lora_a))))


def _low(p: Problem) -> Tensor | None:
    """scaling x A^T `[M, R]`, in the dtype of hidden."""
    if p.lora_a is None:
        return None
    size, rank = len(p.targets), len(p.lora_a)
    low = p.hidden.new_empty(size, rank)
    if low.numel() == 0:
        return low
    grid = (triton.cdiv(size, 32), triton.cdiv(rank, _rank_block(p)))
    _project_kernel[grid](
        p.hidden,
        p.rows,
        p.lora_a,
        low,
        size,
        p.hidden.shape[1],
        rank,
        p.hidden.stride(0),
        p.lora_scaling,
        BLOCK_M=32,
        BLOCK_K=64,
        BLOCK_R=_rank_block(p),
    )
    return low


def _statistics(
    p: Problem,
    partials: _Partials,
    low: Tensor | None,
    first_split: int = 0,
    num_splits: int | None = None,
    slab: Tensor | None = None,
    reference: Tensor | None = None,
    tile_references: Tensor | None = None,
) -> None:
    num_splits = len(partials.m) if num_splits is None else num_splits
    tiles = _tiles(p)
    grid = (triton.cdiv(len(p.targets), tiles["BLOCK_M"]) * num_splits,)
    _statistics_kernel[grid](
        **_head(p, low),
        m_ptr=partials.m,
        s_ptr=partials.s,
        t_ptr=partials.t,
        p_ptr=slab,
        reference_ptr=reference,
        tile_reference_ptr=tile_references,
        p_stride=0 if slab is None else slab.stride(0),
        headroom=HEADROOM[p.hidden.dtype],
        first_split=first_split,
        num_splits=num_splits,
        TILES=TILES,
        ENTROPY=partials.t is not None,
        **tiles,
    )


def _combine(
    p: Problem,
    partials: _Partials,
    logprob: Tensor,
    entropy: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    is_top1: Tensor,
    others: Tensor | None = None,
) -> None:
    _combine_kernel[(triton.cdiv(len(p.targets), 128),)](
        p.targets,
        *partials,
        logprob,
        entropy,
        lse,
        lse_low,
        is_top1,
        others,
        len(p.targets),
        len(p.weight),
        len(partials.m),
        BLOCK=128,
        ENTROPY=partials.t is not None,
    )


def _forward_with_unit(p: Problem, unit: Tensor, *results: Tensor) -> None:
    """Statistics and u of all targets, slab by slab; `unit` comes in as zeros."""
    size, width = unit.shape
    split_width = _split_width(p)
    partials = _Partials.empty(p, _target_logits(p, None))
    num_splits = len(partials.m)
    step = min(num_splits, max(1, p.memory_budget // (size * split_width * p.hidden.itemsize)))
    slab = _slab(p, step * split_width)
    reference = partials.z_target.clone()
    tile_references = reference.new_empty(step * TILES, size)
    for first_split in range(0, num_splits, step):
        splits = min(step, num_splits - first_split)
        _statistics(p, partials, None, first_split, splits, slab, reference, tile_references)
        weight = p.weight[first_split * split_width : (first_split + splits) * split_width]
        _align(p, slab, unit, reference, tile_references, len(weight))
        _accumulate(unit, slab[:size, : len(weight)], weight)
    others = torch.empty_like(reference)
    logprob, entropy, lse, lse_low, is_top1 = results
    _combine(p, partials, logprob, entropy, lse, lse_low, is_top1, others)
    grid = (triton.cdiv(size, 8), triton.cdiv(width, 256))
    _finish_unit_kernel[grid](
        p.weight,
        p.targets,
        unit,
        reference,
        partials.z_target,
        lse,
        lse_low,
        others,
        size,
        len(p.weight),
        width,
        p.weight.stride(0),
        scale=p.logit_scale / p.temperature,
        outer=_scales(p)["outer"],
        SOFTCAP=p.softcap is not None,
        BLOCK_M=8,
        BLOCK_H=256,
    )


def _align(
    p: Problem, slab: Tensor, unit: Tensor, reference: Tensor, tile_references: Tensor, slab_columns: int
) -> None:
    size, width = unit.shape
    columns = blocks(p).columns
    _align_kernel[(triton.cdiv(size, 16),)](
        slab,
        unit,
        reference,
        tile_references,
        size,
        width,
        slab.stride(0),
        triton.cdiv(slab_columns, columns),
        BLOCK_M=16,
        BLOCK_V=columns,
        BLOCK_H=256,
    )


def _target_logits(p: Problem, low: Tensor | None) -> Tensor:
    z_target = p.hidden.new_empty(p.targets.shape, dtype=torch.float32)
    _target_logit_kernel[(triton.cdiv(len(p.targets), 16),)](
        **_head(p, low), z_target_ptr=z_target, BLOCK_M=16, BLOCK_K=128
    )
    return z_target


def _gradient_slabs(
    p: Problem,
    low: Tensor | None,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    logprob: Tensor,
    entropy: Tensor,
    lse: Tensor,
    lse_low: Tensor,
) -> Iterator[tuple[slice, Tensor]]:
    """Slabs of the vocabulary with the gradient of their raw logits `[M, columns]`; each overwrites the one before."""
    size = len(p.targets)
    if size == 0:
        yield slice(None), p.hidden.new_empty(0, len(p.weight))
        return
    scale = p.logit_scale / p.temperature
    common, at_target = torch.zeros_like(logprob), torch.zeros_like(logprob)
    if grad_logprob is not None:
        common -= grad_logprob
        at_target -= grad_logprob * torch.expm1(logprob)
    if grad_lse is not None:
        common += grad_lse
        at_target += grad_lse * logprob.exp()
    if grad_entropy is not None:
        common -= grad_entropy * entropy
        at_target -= grad_entropy * logprob.exp() * (logprob + entropy)
        grad_entropy = grad_entropy * scale
    common, at_target = common * scale, at_target * scale
    tiles, head = _tiles(p), _head(p, low)
    columns, row_blocks = tiles["BLOCK_V"], triton.cdiv(size, tiles["BLOCK_M"])
    num_tiles = triton.cdiv(len(p.weight), columns)
    step = min(num_tiles, max(1, p.memory_budget // (size * columns * p.hidden.itemsize)))
    slab = _slab(p, step * columns)
    for first_tile in range(0, num_tiles, step):
        slab_tiles = min(step, num_tiles - first_tile)
        _gradient_kernel[(row_blocks * slab_tiles,)](
            **head,
            lse_ptr=lse,
            lse_low_ptr=lse_low,
            common_ptr=common,
            grad_target_ptr=at_target,
            grad_entropy_ptr=grad_entropy,
            d_ptr=slab,
            d_stride=slab.stride(0),
            first_tile=first_tile,
            num_tiles=slab_tiles,
            **tiles,
        )
        first, last = first_tile * columns, min((first_tile + slab_tiles) * columns, len(p.weight))
        yield slice(first, last), slab[:size, : last - first]


def _gathered(p: Problem) -> Tensor:
    return p.hidden if p.rows is None else p.hidden[p.rows]


def _to_rows(p: Problem, grad_x: Tensor) -> Tensor:
    if p.rows is None:
        return grad_x.to(p.hidden.dtype)
    return _sum_rows(grad_x, None, p.rows, len(p.hidden), p.hidden.dtype)


def _sum_rows(x: Tensor, factor: Tensor | None, rows: Tensor | None, num_rows: int, dtype: torch.dtype) -> Tensor:
    out = x.new_empty(num_rows, x.shape[1], dtype=dtype)
    order = ends = None
    if rows is not None:
        ordered, order = torch.sort(rows, stable=True)
        ends = torch.searchsorted(ordered, torch.arange(num_rows, device=x.device), right=True)
    if out.numel():
        grid = (num_rows, triton.cdiv(x.shape[1], 1024))
        _sum_rows_kernel[grid](x, factor, order, ends, out, x.shape[1], BLOCK_H=1024)
    return out


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in float32 whatever the dtype of a and b."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def ahead_of_time() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """The kernels with their production block sizes, for tests/kernels/aot.py."""
    gemms = (_statistics_kernel, {"SAVES": True}), (_gradient_kernel, {"LORA": True})
    for capability in (80, 89, 90, 100, 120):
        for (kernel, features), rich in product(gemms, (False, True)):
            b = _newest(NARROW if rich else WIDE, capability)
            yield _compiled(kernel, "bf16", _constants(b), rich, b, capability=capability, **features)
    for kernel, features in gemms:
        yield _compiled(kernel, "fp32", _constants(FLOAT_BLOCKS), True, FLOAT_BLOCKS, capability=80, **features)
    yield _compiled(_combine_kernel, "bf16", {"BLOCK": 128}, True)
    yield _compiled(_align_kernel, "bf16", {"BLOCK_M": 16, "BLOCK_V": 256, "BLOCK_H": 256}, True)
    yield _compiled(_finish_unit_kernel, "bf16", {"BLOCK_M": 8, "BLOCK_H": 256}, True)
    yield _compiled(_target_logit_kernel, "bf16", {"BLOCK_M": 16, "BLOCK_K": 128}, True, LORA=True)
    yield _compiled(_project_kernel, "bf16", {"BLOCK_M": 32, "BLOCK_K": 64, "BLOCK_R": 16}, True)
    yield _compiled(_sum_rows_kernel, "bf16", {"BLOCK_H": 1024}, True)


_SCALARS = {"inner": "fp32", "outer": "fp32", "headroom": "fp32", "scale": "fp32", "scaling": "fp32"}
_SCALARS |= dict.fromkeys(("M", "first_split", "num_splits", "first_tile", "num_tiles"), "i32")
_SCALARS |= dict.fromkeys(("V", "H", "R", "hidden_stride", "weight_stride", "p_stride", "d_stride"), "i32:16")
_INDEX = ("targets_ptr", "rows_ptr", "order_ptr", "ends_ptr")
_DATA = ("hidden_ptr", "weight_ptr", "bias_ptr", "low_ptr", "lora_a_ptr", "lora_b_ptr", "p_ptr", "d_ptr", "out_ptr")


def _constants(b: Blocks) -> dict[str, Any]:
    return {"BLOCK_M": b.rows, "BLOCK_V": b.columns, "BLOCK_K": b.depth, "BLOCK_R": 16, "TILES": TILES, "GROUP": GROUP}


def _compiled(
    kernel,
    dtype: str,
    constants: dict[str, Any],
    rich: bool,
    b: Blocks | None = None,
    capability: int | None = None,
    SAVES: bool = False,
    LORA: bool = False,
) -> tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    """One entry; `rich` means with softcap, bias, entropy and an H that is no multiple of a tile."""
    absent = [] if SAVES or kernel is not _statistics_kernel else ["p_ptr", "reference_ptr", "tile_reference_ptr"]
    absent += [] if rich else ["bias_ptr", "t_ptr", "grad_entropy_ptr"]
    absent += [] if LORA or kernel is _project_kernel else ["low_ptr", "lora_b_ptr"]
    constants = constants | {"SOFTCAP": rich, "ENTROPY": rich, "EVEN_H": not rich} | dict.fromkeys(absent)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = _SCALARS | dict.fromkeys(_INDEX, "*i64:16") | dict.fromkeys(_DATA, f"*{dtype}:16") | {"is_top1_ptr": "*u8"}
    signature = {name: types.get(name, "*fp32:16") for name in kernel.arg_names if name not in constants}
    options: dict[str, Any] = {} if b is None else {"num_warps": b.warps, "num_stages": b.stages}
    options |= {} if capability is None else {"capability": capability}
    return f"{kernel.__name__} {dtype} {tuple(b or ())}", kernel, signature, constants, options
