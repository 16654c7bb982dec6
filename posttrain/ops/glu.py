"""Gated linear units: swiglu and geglu.

    y = act(gate) * up        dup = dy act(gate)        dgate = dy up act'(gate)

(Shazeer, "GLU Variants Improve Transformer", 2020.) With σ the logistic function and Φ, φ the normal distribution
function and density:

    silu        act(x) = x σ(x)              act'(x) = σ(x) (1 + x (1 - σ(x)))
    gelu        act(x) = x Φ(x)              act'(x) = Φ(x) + x φ(x)
    gelu_tanh   act(x) = x σ(z)              act'(x) = σ(z) (1 + x (1 - σ(z)) z')
                z = 2 sqrt(2/π) (x + 0.044715 x^3), since (1 + tanh(z/2)) / 2 = σ(z)

Saved for the backward: gate and up; act(gate) is computed again.
"""

from typing import Literal

import torch
from torch import Tensor

from posttrain import _C
from posttrain.ops import reference
from posttrain.ops.backend import backend_for
from posttrain.ops.library import define

_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")  # in the order of csrc/cpu/kernels.h
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`.

    Args:
        gate: `[..., F]`, floating. Rows may lie apart, as in one half of a fused projection: no copy is made.
        up: shape, dtype and device of `gate`.

    Returns:
        Like `gate`, contiguous; computed in at least float32 and rounded once.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, with the numbers.
    """
    _check("swiglu", gate, up)
    backend = backend_for("swiglu", gate)
    return reference.swiglu(gate, up) if backend == "reference" else _glu(gate, up, "silu", backend)


def geglu(gate: Tensor, up: Tensor, approximate: Literal["tanh", "none"] = "tanh") -> Tensor:
    """`gelu(gate) * up`, with gelu's tanh form, or the exact one if `approximate` is "none".

    Arguments, result and errors are as of `swiglu`.
    """
    if approximate not in _GELU:
        raise ValueError(f"geglu: approximate must be 'tanh' or 'none', got {approximate!r}")
    _check("geglu", gate, up)
    backend = backend_for("geglu", gate)
    if backend == "reference":
        return reference.geglu(gate, up, approximate)
    return _glu(gate, up, _GELU[approximate], backend)


def _check(op: str, gate: Tensor, up: Tensor) -> None:
    if gate.ndim == 0 or not gate.is_floating_point():
        raise ValueError(f"{op}: gate must be floating [..., F], got {gate.dtype} {list(gate.shape)}")
    if (up.shape, up.dtype, up.device) != (gate.shape, gate.dtype, gate.device):
        raise ValueError(
            f"{op}: up must be like gate {list(gate.shape)} {gate.dtype} on {gate.device}; "
            f"got {list(up.shape)} {up.dtype} on {up.device}"
        )


def _forward(gate: Tensor, up: Tensor, activation: str, backend: str) -> Tensor:
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    gate, up = _rows(gate), _rows(up)
    if backend == "triton":
        from posttrain.kernels.glu import glu_forward

        glu_forward(gate, up, y, activation)
        return y
    _C.glu_forward(
        gate.itemsize,
        _ACTIVATIONS.index(activation),
        gate.data_ptr(),
        gate.stride(0),
        up.data_ptr(),
        up.stride(0),
        y.data_ptr(),
        *gate.shape,
    )
    return y


def _gradient(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str, backend: str) -> tuple[Tensor, Tensor]:
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    grad_up = torch.empty_like(gate, memory_format=torch.contiguous_format)
    grad_y, gate, up = _rows(grad_y), _rows(gate), _rows(up)
    if backend == "triton":
        from posttrain.kernels.glu import glu_backward

        glu_backward(grad_y, gate, up, grad_gate, grad_up, activation)
        return grad_gate, grad_up
    _C.glu_backward(
        gate.itemsize,
        _ACTIVATIONS.index(activation),
        grad_y.data_ptr(),
        grad_y.stride(0),
        gate.data_ptr(),
        gate.stride(0),
        up.data_ptr(),
        up.stride(0),
        grad_gate.data_ptr(),
        grad_up.data_ptr(),
        *gate.shape,
    )
    return grad_gate, grad_up


def _rows(x: Tensor) -> Tensor:
    """`x` as `[rows, F]` with contiguous rows; a copy only where no view is one."""
    width = x.shape[-1]
    return (x if x.stride(-1) == 1 else x.contiguous()).reshape(x.numel() // max(width, 1), width)


def _fake(gate, up, activation, backend):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _fake_gradient(grad_y, gate, up, activation, backend):
    return _fake(gate, up, activation, backend), _fake(gate, up, activation, backend)


def _setup_context(ctx, inputs, output) -> None:
    gate, up, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx, grad_y):
    gate, up = ctx.saved_tensors
    return *_glu_backward(grad_y, gate, up, ctx.activation, ctx.backend), None, None


_glu_backward = define(
    "glu_backward",
    "(Tensor grad_y, Tensor gate, Tensor up, str activation, str backend) -> (Tensor, Tensor)",
    _gradient,
    _fake_gradient,
)
_glu = define(
    "glu",
    "(Tensor gate, Tensor up, str activation, str backend) -> Tensor",
    _forward,
    _fake,
    _setup_context,
    _backward,
)
