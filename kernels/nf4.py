"""NF4 matrices on a GPU (posttrain/ops/nf4_weight.py describes the format): dequantisation, and the product with a few
rows.

A byte holds two consecutive elements, which never belong to different blocks, since blocks are even; it gives two
values, code[q] absmax. Through nested statistics the absmax is rounded after the product and again after the sum, as
bitsandbytes rounds it: the kernels are compiled without joining the two into one fma, and write the fmas they want.

In the product a program owns some rows of W and up to ROWS of x. For each pair it sums the products of bytes that lie
BYTES apart, then these sums, in an order that neither the number of the rows of x nor their place changes.
"""

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.entry import Entry
from posttrain.ops.backend import cuda_device
from posttrain.ops.block_sizes import chosen
from posttrain.ops.nf4 import Parts
from posttrain.ops.nf4_weight import code_table

DEQUANTIZE_ELEMENTS, DEQUANTIZE_WARPS = 2048, 4
MATVEC = {"BLOCK_N": 4, "BYTES": 256, "num_warps": 4}
ROWS = (1, 2, 4, 8)  # of x, that one program takes
ODD_ROWS = 2  # at most, with an odd K: more spill


@triton.jit
def _absmax(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, block, inside, NESTED_BLOCK: tl.constexpr):
    """float32 absmax of blocks."""
    value = tl.load(absmax_ptr + block, mask=inside, other=0)
    if nested_absmax_ptr is not None:
        scale = tl.load(nested_absmax_ptr + block // NESTED_BLOCK, mask=inside, other=0.0)
        product = tl.load(nested_code_ptr + value.to(tl.int32)) * scale
        value = product + tl.load(offset_ptr)
    return value


@triton.jit
def dequantize_kernel(
    packed_ptr,
    absmax_ptr,  # float32, or uint8 with nested statistics
    nested_absmax_ptr,  # or None, as the next two
    nested_code_ptr,
    offset_ptr,
    code_ptr,  # [16]
    out_ptr,  # [count]
    first,
    count,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """out = elements [first, first + count) of the matrix."""
    first = tl.cast(first, tl.int64)  # first + count may pass 2^31
    block = first // BLOCK + tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    byte = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    end = first + count
    there = block * BLOCK < end
    inside = there if WHOLE else 2 * byte < end
    q = tl.load(packed_ptr + byte, mask=inside, other=0).to(tl.int32)
    absmax = _absmax(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, block, there, NESTED_BLOCK)
    values = tl.interleave(tl.load(code_ptr + (q >> 4)) * absmax, tl.load(code_ptr + (q & 15)) * absmax)
    place = block * BLOCK - first + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + place, values.to(out_ptr.dtype.element_ty), mask=(place >= 0) & (place < count))


@triton.jit
def matvec_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    code_ptr,
    base_ptr,  # [rows, N] or, with a stride of 0, [N]; or None
    y_ptr,  # [rows, N]
    rows,
    N,
    K,
    x_stride,
    base_stride,
    y_stride,
    ODD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr,
):
    """y = base + x W^T, in float32. With an odd K every other row of W begins in the low half of a byte."""
    statistics = (absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr)
    HALF: tl.constexpr = BLOCK // 2
    SPAN: tl.constexpr = min(BYTES, HALF)  # consecutive bytes of one block
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_inside = (n < N)[:, None]
    first_row = tl.program_id(1) * ROWS
    start = n.to(tl.int64)[:, None] * K
    odd = (start % 2).to(tl.int32) if ODD else 0
    j = tl.arange(0, BYTES)[None, :]
    sums = (tl.zeros((BLOCK_N, BYTES), tl.float32),) * ROWS
    for step in range(0, (K + 1) // 2, BYTES):
        k = 2 * (step + j) - odd  # in the row, of the high half
        byte = start // 2 + step + j
        if ALIGNED:  # every row begins a block: masks and statistics are those of spans
            inside = n_inside & (step + j // SPAN * SPAN < K // 2)
            span = step + tl.arange(0, BYTES // SPAN)[None, :] * SPAN
            block = (start // 2 + span) // HALF
            absmax = _absmax(*statistics, block, n_inside & (span < K // 2), NESTED_BLOCK)
            absmax = tl.broadcast_to(absmax[:, :, None], (BLOCK_N, BYTES // SPAN, SPAN)).reshape(BLOCK_N, BYTES)
        else:
            inside = n_inside & (k < K)
            absmax = _absmax(*statistics, byte // HALF, inside, NESTED_BLOCK)
        q = tl.load(packed_ptr + byte, mask=inside, other=0).to(tl.int32)
        high, low = tl.load(code_ptr + (q >> 4)) * absmax, tl.load(code_ptr + (q & 15)) * absmax
        added = ()
        for r in tl.static_range(ROWS):
            there = first_row + r < rows
            x_row = x_ptr + (first_row + r).to(tl.int64) * x_stride
            for_high = tl.load(x_row + k, mask=there & (k >= 0) & (k < K), other=0.0).to(tl.float32)
            for_low = tl.load(x_row + k + 1, mask=there & (k + 1 < K), other=0.0).to(tl.float32)
            total = tl.fma(tl.broadcast_to(for_high, high.shape), high, sums[r])
            added += (tl.fma(tl.broadcast_to(for_low, low.shape), low, total),)  # type: ignore[assignment]
        sums = added
    for r in tl.static_range(ROWS):
        inside = (n < N) & (first_row + r < rows)
        y = tl.sum(sums[r], 1)
        if base_ptr is not None:
            y += tl.load(base_ptr + (first_row + r).to(tl.int64) * base_stride + n, mask=inside, other=0.0)
        tl.store(y_ptr + (first_row + r).to(tl.int64) * y_stride + n, y.to(y_ptr.dtype.element_ty), mask=inside)


def dequantize(weight: Parts, first: int, out: Tensor) -> None:
    """Write the elements of the matrix from `first` on to `out`, contiguous, in its dtype."""
    count = out.numel()
    if count:
        blocks = (first + count - 1) // weight.block - first // weight.block + 1
        whole = weight.height * weight.width % weight.block == 0
        with cuda_device(out):
            dequantize_kernel[(triton.cdiv(blocks, _blocks_together(weight.block)),)](
                *_matrix(weight), out, first, count, WHOLE=whole, BLOCKS=_blocks_together(weight.block),
                **_blocks(weight), num_warps=DEQUANTIZE_WARPS,
            )  # fmt: skip


def matvec(x: Tensor, weight: Parts, base: Tensor | None, y: Tensor) -> None:
    """`y = base + x W^T`, computed in float32, for x `[rows, K]`, base `[rows, N]`, `[N]` or None, and y `[rows, N]`.

    y may be base.
    """
    if y.numel() == 0:
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, odd = len(x), weight.width % 2
    together = next((r for r in ROWS if r >= rows), ROWS[-1])
    together = min(together, ODD_ROWS) if odd else together
    base = base if base is None or base.stride(-1) == 1 else base.contiguous()
    base_stride = 0 if base is None or base.ndim == 1 else base.stride(0)
    sizes = dict(zip(MATVEC, chosen("nf4_linear", tuple(MATVEC.values()), x.device), strict=True))
    with cuda_device(x):
        matvec_kernel[triton.cdiv(weight.height, sizes["BLOCK_N"]), triton.cdiv(rows, together)](
            x, *_matrix(weight), base, y, rows, weight.height, weight.width, x.stride(0), base_stride, y.stride(0),
            ODD=odd, ALIGNED=weight.width % weight.block == 0, ROWS=together, **_blocks(weight), **sizes,
        )  # fmt: skip


def _matrix(weight: Parts) -> tuple[Tensor | None, ...]:
    nested = weight.nested_absmax, weight.nested_code, weight.offset
    return weight.packed, weight.absmax, *nested, code_table(weight.packed.device)


def _blocks(weight: Parts) -> dict[str, Any]:
    return {"BLOCK": weight.block, "NESTED_BLOCK": weight.nested_block, "enable_fp_fusion": False}


def _blocks_together(block: int) -> int:
    """Blocks of one program of the dequantisation."""
    return max(1, DEQUANTIZE_ELEMENTS // block)


def ahead_of_time() -> Iterator[Entry]:
    """The kernels with their production block sizes, for tests/kernels/aot.py."""
    aligned, whole = {"ODD": 0, "ALIGNED": True}, {"BLOCKS": _blocks_together(64), "num_warps": DEQUANTIZE_WARPS}
    yield _compiled(dequantize_kernel, True, whole | {"WHOLE": True}, capability=90)
    yield _compiled(dequantize_kernel, False, whole | {"WHOLE": False}, capability=80)
    yield _compiled(matvec_kernel, True, MATVEC | aligned | {"ROWS": ROWS[-1]})
    yield _compiled(matvec_kernel, False, MATVEC | aligned | {"ROWS": 1}, capability=90)
    yield _compiled(matvec_kernel, True, MATVEC | {"ROWS": ODD_ROWS, "ODD": 1, "ALIGNED": False}, capability=120)


def _compiled(kernel, nested: bool, constants: dict[str, Any], **options: int) -> Entry:
    """One entry; bfloat16 in and out."""
    constants = {**constants, "BLOCK": 64, "NESTED_BLOCK": 256}
    constants |= {} if nested else dict.fromkeys(("nested_absmax_ptr", "nested_code_ptr", "offset_ptr"))
    options |= {"num_warps": constants.pop("num_warps"), "enable_fp_fusion": False}
    types = dict.fromkeys(("x_ptr", "base_ptr", "y_ptr", "out_ptr"), "*bf16:16")
    types |= {"packed_ptr": "*u8:16", "absmax_ptr": "*u8:16" if nested else "*fp32:16", "rows": "i32"}
    types |= dict.fromkeys(("nested_absmax_ptr", "nested_code_ptr", "offset_ptr", "code_ptr"), "*fp32:16")
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: types.get(name, "i32:16") for name in kernel.arg_names if name not in constants}
    name = f"{kernel.__name__} {constants.get('ROWS', '')} {'nested' if nested else 'plain'}"
    return name, kernel, signature, constants, options
