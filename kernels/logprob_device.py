"""The Triton kernels of linear_logprob, and their fixed block sizes; kernels/logprob.py explains and launches them.

`m` are targets, `y` their tokens, `row` the rows of hidden that predict them, `counts` those that are not skipped. What
depends on which tensors there are is decided when a kernel is compiled: an absent one is None.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.math import tanh
from posttrain.kernels.tiles import grouped_place
from posttrain.ops.logprob_problem import IGNORED

TILES = tl.constexpr(4)  # column tiles in a split

COMBINE = {"BLOCK_M": 128}
ALIGN = {"BLOCK_M": 16, "BLOCK_H": 256}
FINISH_UNIT = {"BLOCK_M": 8, "BLOCK_H": 256}
TARGET_LOGIT = {"BLOCK_M": 16, "BLOCK_K": 128}
PROJECT = {"BLOCK_M": 32, "BLOCK_K": 64}
SUM_ROWS = {"BLOCK_H": 1024}

_GROUP = tl.constexpr(16)  # blocks of targets that share a split's weights while those are in L2
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
def _targets(targets_ptr, block, M, BLOCK_M: tl.constexpr):
    """(m, which of them there are, y) of a block of targets."""
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < M
    return m, inside, tl.load(targets_ptr + m, mask=inside, other=_IGNORED)


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
def statistics_kernel(
    hidden_ptr,
    weight_ptr,
    targets_ptr,
    rows_ptr,
    bias_ptr,
    low_ptr,  # [M, R], scaling * x A^T
    lora_b_ptr,
    m_ptr,  # [splits, M], as s and t
    s_ptr,
    t_ptr,  # or None
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
    SOFTCAP: tl.constexpr,
    EVEN_H: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    row_block, slab_split = grouped_place(tl.cdiv(M, BLOCK_M), num_splits, _GROUP)
    split = first_split + slab_split
    m, inside, y = _targets(targets_ptr, row_block, M, BLOCK_M)
    counts = y != _IGNORED
    first_tile = split * TILES
    last_tile = tl.minimum(first_tile + TILES, tl.cdiv(V, BLOCK_V))
    if tl.max(counts.to(tl.int32)) > 0:
        tensors = (hidden_ptr, weight_ptr, bias_ptr, low_ptr, lora_b_ptr)
        sizes = (V, H, R, hidden_stride, weight_stride, inner, outer)
        row, m_inside = _hidden_rows(rows_ptr, m, inside), tl.where(inside, m, 0)
        top = tl.full((BLOCK_M,), _LOWEST, tl.float32)
        s = tl.zeros((BLOCK_M,), tl.float32)
        t = tl.zeros((BLOCK_M,), tl.float32)
        if p_ptr is not None:
            reference = tl.load(reference_ptr + m, mask=inside, other=0.0)
        for tile in range(first_tile, last_tile):
            z = _logits(
                tensors, sizes, row, m_inside, tile * BLOCK_V, BLOCK_M, BLOCK_V, BLOCK_K, BLOCK_R, SOFTCAP, EVEN_H
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
def combine_kernel(
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
    BLOCK_M: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Merge the splits in order and finish. A target out of range gives NaN."""
    m, inside, y = _targets(targets_ptr, tl.program_id(0), M, BLOCK_M)
    counts = y != _IGNORED
    top = tl.full((BLOCK_M,), _LOWEST, tl.float32)
    s = tl.zeros((BLOCK_M,), tl.float32)
    t = tl.zeros((BLOCK_M,), tl.float32)
    for split in range(num_splits):
        partial = tl.cast(split, tl.int64) * M + m
        split_top = tl.load(m_ptr + partial, mask=counts, other=0.0)
        split_s = tl.load(s_ptr + partial, mask=counts, other=0.0)
        split_t = tl.load(t_ptr + partial, mask=counts, other=0.0) if ENTROPY else split_s
        top, s, t = _merge(top, s, t, split_top, split_s, split_t, ENTROPY)
    z = tl.load(z_target_ptr + m, mask=counts & (y >= 0) & (y < V), other=float("nan"))
    s = tl.where(counts, s, 1.0)
    log_s = tl.log(s)
    d = (top - z) + log_s
    small = tl.exp(-tl.abs(d))
    bend = _log1p(small)
    logprob = -(tl.maximum(d, 0.0) + bend)
    q = tl.where(d < 0, small, 1.0) / (1.0 + small)
    anchor, rest = tl.where(d < 0, z, top), tl.where(d < 0, 0.0, log_s) + bend
    lse = anchor + rest
    tl.store(logprob_ptr + m, tl.where(counts, logprob, 0.0), mask=inside)
    tl.store(lse_ptr + m, tl.where(counts, lse, 0.0), mask=inside)
    tl.store(lse_low_ptr + m, tl.where(counts, (anchor - lse) + rest, 0.0), mask=inside)
    tl.store(is_top1_ptr + m, (counts & (z >= top)).to(tl.uint8), mask=inside)
    if ENTROPY:
        log_q = -(tl.maximum(-d, 0.0) + bend)
        entropy = q * (log_s - t / s - log_q) - tl.exp(logprob) * tl.maximum(logprob, _LOWEST)
        tl.store(entropy_ptr + m, tl.where(counts, entropy, 0.0), mask=inside)
    if others_ptr is not None:
        tl.store(others_ptr + m, q, mask=inside)


@triton.jit
def align_kernel(
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
def finish_unit_kernel(
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
    m, inside, y = _targets(targets_ptr, tl.program_id(0), M, BLOCK_M)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
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
def target_logit_kernel(
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
    m, inside, y = _targets(targets_ptr, tl.program_id(0), M, BLOCK_M)
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
def gradient_kernel(
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
    SOFTCAP: tl.constexpr,
    EVEN_H: tl.constexpr,
):
    row_block, slab_tile = grouped_place(tl.cdiv(M, BLOCK_M), num_tiles, _GROUP)
    m, inside, y = _targets(targets_ptr, row_block, M, BLOCK_M)
    counts = y != _IGNORED
    first_column = (first_tile + slab_tile) * BLOCK_V
    column = first_column + tl.arange(0, BLOCK_V)
    place = _slab_tile(d_ptr, row_block, slab_tile, d_stride, BLOCK_M, BLOCK_V)
    if tl.max(counts.to(tl.int32)) > 0:
        tensors = (hidden_ptr, weight_ptr, bias_ptr, low_ptr, lora_b_ptr)
        sizes = (V, H, R, hidden_stride, weight_stride, inner, outer)
        row, m_inside = _hidden_rows(rows_ptr, m, inside), tl.where(inside, m, 0)
        z = _logits(tensors, sizes, row, m_inside, first_column, BLOCK_M, BLOCK_V, BLOCK_K, BLOCK_R, SOFTCAP, EVEN_H)
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
def project_kernel(
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
def sum_rows_kernel(
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


def ahead_of_time() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """The kernels whose block sizes are the same on every device, for tests/kernels/aot.py."""
    index, half = (torch.empty(16, dtype=dtype, device="meta") for dtype in (torch.int64, torch.bfloat16))
    arguments: dict[str, Any] = dict.fromkeys(("targets_ptr", "rows_ptr", "order_ptr", "ends_ptr"), index)
    data = ("hidden_ptr", "weight_ptr", "bias_ptr", "low_ptr", "lora_a_ptr", "lora_b_ptr", "p_ptr", "out_ptr")
    arguments |= dict.fromkeys(data, half) | {"is_top1_ptr": half.new_empty(16, dtype=torch.uint8)}
    arguments |= dict.fromkeys(("V", "H", "R", "hidden_stride", "weight_stride", "p_stride"), 16)
    arguments |= dict.fromkeys(("M", "num_splits", "num_tiles"), 1)
    arguments |= dict.fromkeys(("inner", "outer", "scale", "scaling"), 1.0)
    arguments |= {"SOFTCAP": True, "ENTROPY": True, "BLOCK_V": 256, "BLOCK_R": 16}
    kernels = (
        (combine_kernel, COMBINE),
        (align_kernel, ALIGN),
        (finish_unit_kernel, FINISH_UNIT),
        (target_logit_kernel, TARGET_LOGIT),
        (project_kernel, PROJECT),
        (sum_rows_kernel, SUM_ROWS),
    )
    for kernel, block in kernels:
        yield entry(kernel.__name__, kernel, arguments | block)


def entry(
    name: str, kernel, arguments: dict[str, Any], **options: int
) -> tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    """What tests/kernels/aot.py compiles for a launch with these arguments; a missing one is a float32 tensor."""
    given = {name: arguments.get(name, _FLOATS) for name in kernel.arg_names}
    fixed = [name for name, value in given.items() if value is None or (name.isupper() and name not in _SIZES)]
    constants = {name: given.pop(name) for name in fixed}
    signature = {name: _type(value) for name, value in given.items()}
    options |= {name: value for name, value in arguments.items() if name in ("num_warps", "num_stages")}
    return name, kernel, signature, constants, options


def _type(value: Tensor | int | float) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if value % 16 else "i32:16"


_FLOATS = torch.empty(16, device="meta")
_SIZES = ("M", "V", "H", "R")
_POINTERS = {torch.float32: "*fp32:16", torch.bfloat16: "*bf16:16", torch.int64: "*i64:16", torch.uint8: "*u8"}
