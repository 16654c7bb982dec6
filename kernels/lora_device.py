"""The Triton kernels of the LoRA ops, and their fixed block sizes; kernels/lora.py explains and launches them.

What depends on which tensors there are is decided when a kernel is compiled: an absent one is None.
"""

import triton
import triton.language as tl

from posttrain.kernels.tiles import grouped_place

LOW_RANK = {"BLOCK_T": 32, "num_stages": 4}
OUTER = {"BLOCK_T": 32, "BLOCK_K": 64, "num_stages": 4}

_GROUP = tl.constexpr(8)  # blocks of rows that share the columns' weights while those are in L2


@triton.jit
def _wide_dot(a, b, total, HALF: tl.constexpr):
    """a b + total in float32; where `HALF`, one of a and b holds numbers of 16 bits, which TF32 holds exactly."""
    if HALF:
        return tl.dot(a, b, total, input_precision="tf32x3")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _tile(x_ptr, dropped_ptr, t, k, T, K, x_stride, dtype: tl.constexpr):
    """x at rows t and columns k, with 0 for what is dropped or outside."""
    inside = (t < T)[:, None] & (k < K)[None, :]
    row = t.to(tl.int64)[:, None]
    x = tl.load(x_ptr + row * x_stride + k[None, :], mask=inside, other=0.0)
    if dropped_ptr is not None:
        dropped = tl.load(dropped_ptr + row * K + k[None, :], mask=inside, other=0)
        x = tl.where(dropped != 0, 0.0, x)
    return x.to(dtype)


@triton.jit
def low_rank_kernel(
    x_ptr,  # [T, K]
    dropped_ptr,  # uint8 [T, K] or None
    factor_ptr,  # (r, k) at r factor_stride + k factor_depth
    scale_ptr,  # [R]
    owner_ptr,  # int64 [R], the adapter that a column belongs to
    adapter_ptr,  # int64 [T], or None: all columns count
    out_ptr,  # [T, R]
    T,
    K,
    R,
    x_stride,
    factor_stride,
    factor_depth,
    out_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HALF: tl.constexpr,
):
    """out = scale x factor^T, and 0 where a row names another adapter."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    dtype: tl.constexpr = factor_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = _tile(x_ptr, dropped_ptr, t, k, T, K, x_stride, dtype)
        factor_mask = (r < R)[None, :] & (k < K)[:, None]
        factor_place = r[None, :] * factor_stride + k.to(tl.int64)[:, None] * factor_depth
        factor = tl.load(factor_ptr + factor_place, mask=factor_mask, other=0.0)
        total = _wide_dot(x, factor, total, HALF)
    total *= tl.load(scale_ptr + r, mask=r < R, other=0.0)[None, :]
    if adapter_ptr is not None:
        adapter = tl.load(adapter_ptr + t, mask=t < T, other=-1)
        owner = tl.load(owner_ptr + r, mask=r < R, other=-2)
        total = tl.where(adapter[:, None] == owner[None, :], total, 0.0)
    place = out_ptr + t.to(tl.int64)[:, None] * out_stride + r[None, :]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=(t < T)[:, None] & (r < R)[None, :])


@triton.jit
def outer_kernel(
    low_ptr,  # [T, R]
    x_ptr,  # [T, K]
    dropped_ptr,  # uint8 [T, K] or None
    out_ptr,  # [splits, R, K] float32
    T,
    K,
    R,
    low_stride,
    x_stride,
    split_rows,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HALF: tl.constexpr,
):
    """out[split] = low^T x over the rows of the split."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    dtype: tl.constexpr = low_ptr.dtype.element_ty
    first = split * split_rows
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(first, tl.minimum(first + split_rows, T), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        low_mask = (r < R)[:, None] & (t < T)[None, :]
        low = tl.load(low_ptr + t.to(tl.int64)[None, :] * low_stride + r[:, None], mask=low_mask, other=0.0)
        total = _wide_dot(low, _tile(x_ptr, dropped_ptr, t, k, T, K, x_stride, dtype), total, HALF)
    place = out_ptr + (split.to(tl.int64) * R + r[:, None]) * K + k[None, :]
    tl.store(place, total, mask=(r < R)[:, None] & (k < K)[None, :])


@triton.jit
def extended_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # (n, k) at n weight_stride + k weight_depth
    low_ptr,  # [M, R] or None
    factor_ptr,  # (n, r) at n factor_stride + r factor_depth
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    M,
    N,
    K,
    R,
    x_stride,
    weight_stride,
    weight_depth,
    low_stride,
    factor_stride,
    factor_depth,
    out_stride,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = low factor^T + bias + x weight^T, and `ADD` to what out was: one sum in float32, rounded once."""
    row_block, column_block = grouped_place(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), _GROUP)
    first_row, first_column = row_block * BLOCK_M, column_block * BLOCK_N
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    n_inside = n < N - first_column
    inside = (m < M - first_row)[:, None] & n_inside[None, :]
    row = tl.minimum(m, M - 1 - first_row)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if low_ptr is not None:
        low_tile = low_ptr + tl.cast(first_row, tl.int64) * low_stride
        factor_tile = factor_ptr + tl.cast(first_column, tl.int64) * factor_stride
        for start in range(0, R, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            low = tl.load(low_tile + row[:, None] * low_stride + r[None, :], mask=(r < R)[None, :], other=0.0)
            factor_place = n[None, :] * factor_stride + r[:, None].to(tl.int64) * factor_depth
            factor = tl.load(factor_tile + factor_place, mask=(r < R)[:, None] & n_inside[None, :], other=0.0)
            total = tl.dot(low, factor, total, input_precision="ieee")
    x_tile = x_ptr + tl.cast(first_row, tl.int64) * x_stride
    weight_tile = weight_ptr + tl.cast(first_column, tl.int64) * weight_stride
    x_offset = row[:, None] * x_stride + k[None, :]
    weight_offset = n[None, :] * weight_stride + k[:, None] * weight_depth
    for start in range(0, K, BLOCK_K):
        weight_step = weight_tile + tl.cast(start, tl.int64) * weight_depth
        if EVEN:
            x = tl.load(x_tile + start + x_offset)
            weight = tl.load(weight_step + weight_offset)
        else:
            k_inside = k < K - start
            x = tl.load(x_tile + start + x_offset, mask=k_inside[None, :], other=0.0)
            weight = tl.load(weight_step + weight_offset, mask=k_inside[:, None] & n_inside[None, :], other=0.0)
        total = tl.dot(x, weight, total, input_precision="ieee")
    if bias_ptr is not None:
        total += tl.load(bias_ptr + first_column + n, mask=n_inside, other=0.0).to(tl.float32)[None, :]
    out_place = out_ptr + tl.cast(first_row, tl.int64) * out_stride + first_column
    out_place = out_place + m[:, None] * out_stride + n[None, :]
    if ADD:
        total += tl.load(out_place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_place, total.to(out_ptr.dtype.element_ty), mask=inside)
