"""Triton kernels of swiglu and geglu (posttrain/ops/glu.py derives the gradients).

One program takes one block of one row, in float32; rows may lie apart.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.entry import Entry
from posttrain.ops.backend import cuda_device

BLOCK = 1024
WARPS = 4


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """(act(x), act'(x)) of a float32 tile."""
    if ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        z = x
        dz = 1.0
        if ACTIVATION == "gelu_tanh":
            z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
            dz = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        share = tl.sigmoid(z)
        slope = share + x * share * tl.sigmoid(-z) * dz
    return x * share, slope


@triton.jit
def _forward(gate, up, y, gate_stride, up_stride, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    b_gate = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    b_up = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activate(b_gate, ACTIVATION)
    tl.store(y + row * width + column, value * b_up, mask=inside)


@triton.jit
def _backward(
    grad_y,
    gate,
    up,
    grad_gate,
    grad_up,
    grad_stride,
    gate_stride,
    up_stride,
    width,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    b_grad = tl.load(grad_y + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    b_gate = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    b_up = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activate(b_gate, ACTIVATION)
    tl.store(grad_gate + row * width + column, b_grad * b_up * slope, mask=inside)
    tl.store(grad_up + row * width + column, b_grad * value, mask=inside)


def glu_forward(gate: Tensor, up: Tensor, y: Tensor, activation: str) -> None:
    """y = act(gate) * up for gate and up `[rows, F]` with contiguous rows and contiguous y."""
    if y.numel():
        with cuda_device(gate):
            _forward[_grid(gate)](
                gate, up, y, gate.stride(0), up.stride(0), gate.shape[1], activation, BLOCK, num_warps=WARPS
            )


def glu_backward(grad_y: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, activation: str) -> None:
    """Fill grad_gate and grad_up, contiguous, from grad_y, gate and up `[rows, F]`."""
    if grad_y.numel():
        with cuda_device(gate):
            _backward[_grid(gate)](
                grad_y,
                gate,
                up,
                grad_gate,
                grad_up,
                grad_y.stride(0),
                gate.stride(0),
                up.stride(0),
                gate.shape[1],
                activation,
                BLOCK,
                num_warps=WARPS,
            )


def _grid(x: Tensor) -> tuple[int, int]:
    return x.shape[0], triton.cdiv(x.shape[1], BLOCK)


def ahead_of_time() -> Iterator[Entry]:
    """The kernels with their production block sizes, for tests/kernels/aot.py."""
    sizes = {"gate_stride": "i32:16", "up_stride": "i32:16", "width": "i32:16"}
    for dtype in ("bf16", "fp32"):
        data = f"*{dtype}:16"
        for activation in ("silu", "gelu", "gelu_tanh"):
            constants = {"ACTIVATION": activation, "BLOCK": BLOCK}
            name, options = f"{activation} {dtype}", {"num_warps": WARPS}
            tensors = {"gate": data, "up": data, "y": data}
            yield f"forward {name}", _forward, {**tensors, **sizes}, constants, options
            tensors = dict.fromkeys(("grad_y", "gate", "up", "grad_gate", "grad_up"), data)
            yield f"backward {name}", _backward, {**tensors, "grad_stride": "i32:16", **sizes}, constants, options
