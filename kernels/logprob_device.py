"""The Triton kernels of linear_logprob's forward, and their fixed block sizes; kernels/logprob.py launches them.

`counts` are the targets that are not skipped; kernels/logprob_logits.py explains the other names.
"""

import triton
import triton.language as tl

from posttrain.kernels.logprob_logits import (
    GROUP,
    IGNORED,
    LOWEST,
    hidden_rows,
    logits_tile,
    scaled,
    slab_place,
    slope,
    target_block,
)
from posttrain.kernels.tiles import grouped_place

TILES = tl.constexpr(4)  # column tiles in a split

PROJECT = {"BLOCK_M": 32, "BLOCK_K": 64}
TARGET_LOGIT = {"BLOCK_M": 16, "BLOCK_K": 128}
COMBINE = {"BLOCK_M": 128}


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
    row = hidden_rows(rows_ptr, m, inside)
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
    m, inside, y = target_block(targets_ptr, tl.program_id(0), M, BLOCK_M)
    counts = (y >= 0) & (y < V)
    row = hidden_rows(rows_ptr, m, inside)
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
    tl.store(z_target_ptr + m, scaled(raw, inner, outer, SOFTCAP), mask=inside)


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
    row_block, slab_split = grouped_place(tl.cdiv(M, BLOCK_M), num_splits, GROUP)
    split = first_split + slab_split
    m, inside, y = target_block(targets_ptr, row_block, M, BLOCK_M)
    counts = y != IGNORED
    first_tile = split * TILES
    last_tile = tl.minimum(first_tile + TILES, tl.cdiv(V, BLOCK_V))
    if tl.max(counts.to(tl.int32)) > 0:
        tensors = (hidden_ptr, weight_ptr, bias_ptr, low_ptr, lora_b_ptr)
        sizes = (V, H, R, hidden_stride, weight_stride, inner, outer)
        row, m_inside = hidden_rows(rows_ptr, m, inside), tl.where(inside, m, 0)
        top = tl.full((BLOCK_M,), LOWEST, tl.float32)
        s = tl.zeros((BLOCK_M,), tl.float32)
        t = tl.zeros((BLOCK_M,), tl.float32)
        if p_ptr is not None:
            reference = tl.load(reference_ptr + m, mask=inside, other=0.0)
        for tile in range(first_tile, last_tile):
            z = logits_tile(
                tensors, sizes, row, m_inside, tile * BLOCK_V, BLOCK_M, BLOCK_V, BLOCK_K, BLOCK_R, SOFTCAP, EVEN_H
            )
            column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            others = tl.where((column[None, :] == y[:, None]) | (column >= V)[None, :], LOWEST, z)
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
                    p *= slope(tl.maximum(others, -outer), outer)
                place = slab_place(p_ptr, row_block, slab_tile, p_stride, BLOCK_M, BLOCK_V)
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
            tl.store(slab_place(p_ptr, row_block, slab_tile, p_stride, BLOCK_M, BLOCK_V), nothing)
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
    m, inside, y = target_block(targets_ptr, tl.program_id(0), M, BLOCK_M)
    counts = y != IGNORED
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
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
        entropy = q * (log_s - t / s - log_q) - tl.exp(logprob) * tl.maximum(logprob, LOWEST)
        tl.store(entropy_ptr + m, tl.where(counts, entropy, 0.0), mask=inside)
    if others_ptr is not None:
        tl.store(others_ptr + m, q, mask=inside)


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
