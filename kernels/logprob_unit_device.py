"""The Triton kernels that make a frozen head's unit, and their block sizes; kernels/logprob.py launches them."""

import triton
import triton.language as tl

from posttrain.kernels.logprob_logits import slope, target_block

ALIGN = {"BLOCK_M": 16, "BLOCK_H": 256}
FINISH_UNIT = {"BLOCK_M": 8, "BLOCK_H": 256}


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
    m, inside, y = target_block(targets_ptr, tl.program_id(0), M, BLOCK_M)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    counts = (y >= 0) & (y < V)
    z = tl.load(z_target_ptr + m, mask=counts, other=0.0)
    reference = tl.load(reference_ptr + m, mask=counts, other=0.0)
    lse = tl.load(lse_ptr + m, mask=counts, other=0.0)
    lse_low = tl.load(lse_low_ptr + m, mask=counts, other=0.0)
    q = tl.load(others_ptr + m, mask=counts, other=0.0)
    toward = scale * q
    if SOFTCAP:
        toward *= slope(z, outer)
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
