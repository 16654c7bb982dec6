"""The Triton kernels of linear_logprob's backward; kernels/logprob_gradient.py launches them.

`counts` are the targets that are not skipped; kernels/logprob_logits.py explains the other names.
"""

import triton
import triton.language as tl

from posttrain.kernels.logprob_logits import GROUP, IGNORED, hidden_rows, logits_tile, slab_place, slope, target_block
from posttrain.kernels.tiles import grouped_place

SUM_ROWS = {"BLOCK_H": 1024}


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
    row_block, slab_tile = grouped_place(tl.cdiv(M, BLOCK_M), num_tiles, GROUP)
    m, inside, y = target_block(targets_ptr, row_block, M, BLOCK_M)
    counts = y != IGNORED
    first_column = (first_tile + slab_tile) * BLOCK_V
    column = first_column + tl.arange(0, BLOCK_V)
    place = slab_place(d_ptr, row_block, slab_tile, d_stride, BLOCK_M, BLOCK_V)
    if tl.max(counts.to(tl.int32)) > 0:
        tensors = (hidden_ptr, weight_ptr, bias_ptr, low_ptr, lora_b_ptr)
        sizes = (V, H, R, hidden_stride, weight_stride, inner, outer)
        row, m_inside = hidden_rows(rows_ptr, m, inside), tl.where(inside, m, 0)
        z = logits_tile(
            tensors, sizes, row, m_inside, first_column, BLOCK_M, BLOCK_V, BLOCK_K, BLOCK_R, SOFTCAP, EVEN_H
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
            d *= slope(z, outer)
        d = tl.where(counts[:, None], d, 0.0)
        tl.store(place, d.to(d_ptr.dtype.element_ty))
    else:
        tl.store(place, tl.zeros((BLOCK_M, BLOCK_V), d_ptr.dtype.element_ty))


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
