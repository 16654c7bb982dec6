"""A gated MLP with LoRA adapters on its three layers.

    g = gate(x)     u = up(x)     h = act(g) u     y = down(h)

each layer as in posttrain/ops/lora_products.py, act as in posttrain/ops/glu.py. Saved for the backward: x, g and u. h
is made again, and the backward of `down` turns dy into dh, the gated unit's into dg and du, and that of `gate` and `up`
these into dx. Plain autograd keeps act(g) and h too.
"""

from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from posttrain.ops import glu, lora_cuda, reference
from posttrain.ops.backend import backend_for
from posttrain.ops.library import define
from posttrain.ops.lora import (
    OPTIONS,
    fake_gradients,
    filled,
    grouped,
    needs_of,
    saved_layers,
    spread,
)
from posttrain.ops.lora_layer import TENSORS, Layer, LoraLayer, Options, flatten, layers_of, options, schema
from posttrain.ops.lora_products import kernel_dtype, normed, normed_gradient, project, project_gradient

_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def lora_mlp(
    x: Tensor,
    gate: LoraLayer,
    up: LoraLayer,
    down: LoraLayer,
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu",
    *,
    norm: tuple[Tensor, float] | None = None,
    adapter: Tensor | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """`down(act(gate(x)) up(x))`, each layer a `lora_linear`.

    Args:
        x: `[..., H]`, floating.
        gate, up: layers from H to F.
        down: layer from F to H.
        activation: silu for SwiGLU; gelu, or its tanh form, for GeGLU.
        norm: weight `[H]` and eps of an `rms_norm` that x passes first; its result is made again in the backward.
        adapter, dropout, seed: as of `lora_linear`, for all three layers; with dropout they use seed, seed + 1 and
            seed + 2.

    Returns:
        `[..., H]`, in the dtype of `x`; differentiable as `lora_linear` is. Repeated calls give the same bits.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, with the numbers.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"lora_mlp: activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    inner = x.new_empty(0, up.weight.shape[0])  # stands for h
    sources = {"gate": (gate, x), "up": (up, x), "down": (down, inner)}
    flat = [flatten("lora_mlp", name, source, layer, adapter is not None) for name, (layer, source) in sources.items()]
    if gate.weight.shape != up.weight.shape:
        raise ValueError(
            f"lora_mlp: gate and up must have one shape, got {list(gate.weight.shape)} and {list(up.weight.shape)}"
        )
    option = options("lora_mlp", x, flat, adapter, dropout, seed, norm)
    backend = backend_for("lora_mlp", x, lora_cuda.case(x, flat, option))
    if backend == "reference":
        return reference.lora_mlp(x, gate, up, down, activation, norm=norm, adapter=adapter, dropout=dropout, seed=seed)
    return _lora_mlp(x, *chain(*flat), *option, activation, backend)[0]


def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(y, g, u)."""
    *flat, adapter, dropout, seed, norm, eps, activation, backend = arguments
    gate, up, down = layers_of(flat)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    outer, inner = _options(adapter, dropout, seed, norm, eps)
    with torch.autocast(x.device.type, enabled=False):
        left, right = project(normed(rows, outer, backend), (gate, up), outer, backend)
        (y,) = project(_gated(left, right, activation, backend), (down,), inner, backend)
    return y.view(*x.shape[:-1], y.shape[-1]), left, right


def _options(
    adapter: Tensor | None, dropout: float, seed: int, norm: Tensor | None, eps: float
) -> tuple[Options, Options]:
    """Of gate and up, and of down."""
    adapter = None if adapter is None else adapter.flatten()
    return Options(adapter, dropout, seed, norm, eps), Options(adapter, dropout, seed + 2)


def _gated(left: Tensor, right: Tensor, activation: str, backend: str) -> Tensor:
    """act(g) u, computed in at least float32."""
    wide = kernel_dtype(left.dtype, backend)
    return glu._forward(left.to(wide), right.to(wide), activation, _elementwise(backend)).to(left.dtype)


def _gated_gradient(grad: Tensor, left: Tensor, right: Tensor, activation: str, backend: str) -> tuple[Tensor, Tensor]:
    wide = kernel_dtype(left.dtype, backend)
    inputs = grad.to(wide), left.to(wide), right.to(wide)
    grad_left, grad_right = glu._gradient(*inputs, activation, _elementwise(backend))
    return grad_left.to(left.dtype), grad_right.to(left.dtype)


def _elementwise(backend: str) -> str:
    """Whose gated unit goes with `backend`: there is none in CUDA."""
    return "triton" if backend == "cuda" else backend


def _fake(x, *arguments):
    gate, up, down = layers_of(arguments[:-7])
    rows = x.shape[:-1].numel()
    y = x.new_empty(*x.shape[:-1], down.height)
    return y, x.new_empty(rows, gate.height), x.new_empty(rows, up.height)


def _setup_context(ctx, inputs, output) -> None:
    x, *flat, adapter, ctx.dropout, ctx.seed, norm, ctx.eps, ctx.activation, ctx.backend = inputs
    _, left, right = output
    ctx.mark_non_differentiable(left, right)
    ctx.set_materialize_grads(False)
    ctx.layers = [Layer(*[None] * TENSORS, *layer[TENSORS:]) for layer in layers_of(flat)]  # type: ignore[arg-type]
    tensors = (tensor for layer in layers_of(flat) for tensor in layer[:TENSORS])
    ctx.save_for_backward(x, left, right, adapter, norm, *tensors)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    x, left, right, adapter, norm, *tensors = ctx.saved_tensors
    needs = needs_of(ctx, 3)
    option = (adapter, ctx.dropout, ctx.seed, norm, ctx.eps, ctx.activation)
    layers = saved_layers(ctx, tensors)
    results = _lora_mlp_backward(grad, left, right, x, *layers, *option, needs, ctx.backend)
    return *spread(results, needs, 3), None, None


def _gradient(grad: Tensor, left: Tensor, right: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    *flat, adapter, dropout, seed, norm, eps, activation, needs, backend = arguments
    gate, up, down = layers_of(flat)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    outer, inner = _options(adapter, dropout, seed, norm, eps)
    needs_x, *needs_layers = grouped(needs)
    with torch.autocast(x.device.type, enabled=False):
        hidden = _gated(left, right, activation, backend)
        incoming = [grad.reshape(len(rows), down.height)]
        grad_hidden, below = project_gradient(incoming, hidden, (down,), inner, ([True], needs_layers[2]), backend)
        assert grad_hidden is not None
        del hidden
        grads = _gated_gradient(grad_hidden, left, right, activation, backend)
        del grad_hidden
        source = normed(rows, outer, backend)
        needs_outer = needs_x, *needs_layers[:2]
        grad_source, above = project_gradient(grads, source, (gate, up), outer, needs_outer, backend)
        grad_x, grad_norm = normed_gradient(grad_source, rows, outer, backend)
    return filled(grad_x, grad_norm, [*above, *below], x)


def _fake_gradient(grad, left, right, x, *arguments):
    return fake_gradients(x, arguments[-5], layers_of(arguments[:-8]), arguments[-2])


_PROBLEM = f"Tensor x, {schema('gate', 'up', 'down')}, {OPTIONS}, str activation"
_lora_mlp_backward = define(
    "lora_mlp_backward",
    f"(Tensor grad, Tensor left, Tensor right, {_PROBLEM}, bool[] needs, str backend) -> Tensor[]",
    _gradient,
    _fake_gradient,
)
_lora_mlp = define(
    "lora_mlp",
    f"({_PROBLEM}, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _setup_context,
    _backward,
)
