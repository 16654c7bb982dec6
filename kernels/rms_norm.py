"""Triton kernels of the RMS norm (posttrain/ops/rms_norm.py derives the gradient).

A program takes a fixed number of rows and passes over them twice, a chunk of columns at a time: once for the
statistics, in float32, and once more, from cache, for the results. So rows may have any width. In the backward it also
writes the sum of its rows' weight gradients to a partial row, and the partial rows are added in order. Nothing depends
on the device or on the number of rows: results are the same bits every time, and a row's are the same alone or in a
batch.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.entry import Entry
from posttrain.ops.backend import cuda_device

WARPS = 16


@triton.jit
def _forward(
    x, residual, weight, y, total, rstd, rows, width, eps, ADD: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = row.to(tl.int64)[:, None] * width
    squares = tl.zeros([ROWS, CHUNK], tl.float32)
    for first in range(0, width, CHUNK):
        column = first + tl.arange(0, CHUNK)[None, :]
        inside = (row[:, None] < rows) & (column < width)
        b_total = tl.load(x + start + column, mask=inside, other=0.0)
        if ADD:
            b_total = b_total.to(tl.float32) + tl.load(residual + start + column, mask=inside, other=0.0).to(tl.float32)
            b_total = b_total.to(total.dtype.element_ty)
            tl.store(total + start + column, b_total, mask=inside)
        b_total = b_total.to(tl.float32)
        squares += b_total * b_total
    b_rstd = tl.rsqrt(tl.sum(squares, 1) / width + eps)
    tl.store(rstd + row, b_rstd, mask=row < rows)
    for first in range(0, width, CHUNK):
        column = first + tl.arange(0, CHUNK)[None, :]
        inside = (row[:, None] < rows) & (column < width)
        b_total = tl.load(x + start + column, mask=inside, other=0.0)
        if ADD:  # added again: reading back `total` would need a barrier
            b_total = b_total.to(tl.float32) + tl.load(residual + start + column, mask=inside, other=0.0).to(tl.float32)
            b_total = b_total.to(total.dtype.element_ty)
        b_weight = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
        tl.store(y + start + column, b_total.to(tl.float32) * b_rstd[:, None] * b_weight, mask=inside)


@triton.jit
def _backward(
    grad_y,
    grad_total,
    total,
    weight,
    rstd,
    grad_x,
    partial,
    rows,
    width,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = row.to(tl.int64)[:, None] * width
    b_rstd = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
    products = tl.zeros([ROWS, CHUNK], tl.float32)
    for first in range(0, width, CHUNK):
        column = first + tl.arange(0, CHUNK)[None, :]
        inside = (row[:, None] < rows) & (column < width)
        b_grad = tl.load(grad_y + start + column, mask=inside, other=0.0).to(tl.float32)
        b_total = tl.load(total + start + column, mask=inside, other=0.0).to(tl.float32)
        b_weight = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
        products += b_grad * b_weight * (b_total * b_rstd)
    pull = tl.sum(products, 1)[:, None] / width
    for first in range(0, width, CHUNK):
        column = first + tl.arange(0, CHUNK)[None, :]
        inside = (row[:, None] < rows) & (column < width)
        b_grad = tl.load(grad_y + start + column, mask=inside, other=0.0).to(tl.float32)
        b_normed = tl.load(total + start + column, mask=inside, other=0.0).to(tl.float32) * b_rstd
        b_weight = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
        b_partial = tl.sum(b_grad * b_normed, 0)[None, :]
        tl.store(partial + tl.program_id(0).to(tl.int64) * width + column, b_partial, mask=column < width)
        b_grad = (b_grad * b_weight - b_normed * pull) * b_rstd
        if ADD:
            b_grad += tl.load(grad_total + start + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + start + column, b_grad, mask=inside)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(y, s, r) as `posttrain.ops.rms_norm` needs them; s is empty without a residual."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rows, width = rstd.numel(), x.shape[-1]
    if x.numel():
        tile = _forward_tile(width)
        with cuda_device(x):
            _forward[(triton.cdiv(rows, tile["ROWS"]),)](
                x,
                x if residual is None else residual,
                weight.contiguous(),
                y,
                y if residual is None else total,
                rstd,
                rows,
                width,
                eps,
                residual is not None,
                **tile,
                num_warps=WARPS,
            )
    return y, total, rstd


def rms_norm_backward(
    grad_y: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of s and of the weight."""
    grad_y, total = grad_y.contiguous(), total.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    grad_x = torch.empty_like(total)
    rows, width = rstd.numel(), total.shape[-1]
    tile = _backward_tile(width)
    programs = triton.cdiv(rows, tile["ROWS"])
    partial = rstd.new_empty(programs, width)
    if total.numel():
        with cuda_device(total):
            _backward[(programs,)](
                grad_y,
                total if grad_total is None else grad_total,
                total,
                weight.contiguous(),
                rstd,
                grad_x,
                partial,
                rows,
                width,
                grad_total is not None,
                **tile,
                num_warps=WARPS,
            )
    return grad_x, partial.sum(0, dtype=torch.float64).to(weight.dtype)


def _forward_tile(width: int) -> dict[str, int]:
    chunk = min(triton.next_power_of_2(max(width, 1)), 4096)
    return {"ROWS": 4096 // chunk, "CHUNK": chunk}


def _backward_tile(width: int) -> dict[str, int]:
    """More rows and fewer columns than in the forward: fewer partial rows."""
    chunk = min(triton.next_power_of_2(max(width, 1)), 256)
    return {"ROWS": 4096 // chunk, "CHUNK": chunk}


def ahead_of_time() -> Iterator[Entry]:
    """The kernels with their production block sizes, for tests/kernels/aot.py."""
    options = {"num_warps": WARPS}
    sizes = {"rows": "i32", "width": "i32:16"}
    for dtype, width, add in (("bf16", 128, False), ("bf16", 4096, True), ("fp32", 4096, False), ("fp32", 4096, True)):
        data, statistics = f"*{dtype}:16", "*fp32:16"
        name = f"{dtype} {width}{' residual' if add else ''}"
        tensors = dict.fromkeys(("x", "residual", "weight", "y", "total"), data) | {"rstd": statistics}
        constants = {"ADD": add, **_forward_tile(width)}
        yield f"forward {name}", _forward, tensors | sizes | {"eps": "fp32"}, constants, options
        tensors = dict.fromkeys(("grad_y", "grad_total", "total", "weight", "grad_x"), data)
        tensors |= {"rstd": statistics, "partial": statistics}
        constants = {"ADD": add, **_backward_tile(width)}
        yield f"backward {name}", _backward, tensors | sizes, constants, options
