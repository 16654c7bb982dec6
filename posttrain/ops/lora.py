"""A linear layer with a LoRA adapter, and the three of an attention layer that read the same input.

posttrain/ops/lora_products.py has the formulas.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from posttrain.ops import lora_cuda, reference
from posttrain.ops.backend import backend_for
from posttrain.ops.library import define
from posttrain.ops.lora_layer import TENSORS, Layer, LoraLayer, Options, flatten, layers_of, options, schema
from posttrain.ops.lora_products import Gradients, normed, normed_gradient, project, project_gradient, slabs
from posttrain.ops.nf4_weight import NF4Weight


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float | Sequence[float] = 1.0,
    bias: Tensor | None = None,
    *,
    magnitude: Tensor | None = None,
    adapter: Tensor | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """`x W^T + bias + scaling (x A^T) B^T`, or DoRA's `magnitude / norm * (x W^T + scaling (x A^T) B^T) + bias`.

    Args:
        x: `[..., K]`, floating.
        weight: `[N, K]`, in the dtype of `x`, or an NF4 matrix. Its gradient is only computed where it requires one.
        lora_a: A `[R, K]`, any floating dtype; None for no adapter: then the result is exactly the base's.
        lora_b: B `[N, R]`.
        scaling: of the adapter; alpha / R, or alpha / sqrt(R) for rsLoRA.
        bias: `[N]`, dtype of `x`, or None.
        magnitude: `[N]`, floating, for DoRA (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024). The norm
            is that of the rows of W + scaling B A and counts as a constant in the backward, as in the paper. The
            result before the multiplication is saved as well.
        adapter: int64 `[...]`, for each row of `x` the number of its adapter, -1 for none. Then A is `[E, R, K]`, B
            `[E, N, R]` and scaling E numbers, or one for all. Adapters of lower rank are filled up with zeros.
        dropout: share of the elements of x that the adapter doesn't see; the others count 1 / (1 - dropout).
        seed: of the dropout: the same seed, shape and device drop the same elements.

    Returns:
        `[..., N]`, in the dtype of `x`. x, A, B, bias and weight are differentiable. In the backward the products with
        A and B are summed in float32 (float64 for float64). Repeated calls give the same bits.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, with the numbers.
    """
    layer = LoraLayer(weight, lora_a, lora_b, scaling, bias)
    flat = flatten("lora_linear", "layer", x, layer, adapter is not None)
    option = options("lora_linear", x, [flat], adapter, dropout, seed)
    backend = backend_for("lora_linear", x, lora_cuda.case(x, [flat], option))
    if magnitude is not None:
        _check_magnitude(magnitude, flat, adapter)
    if backend == "reference":
        return reference.lora_linear(x, *layer, magnitude=magnitude, adapter=adapter, dropout=dropout, seed=seed)
    if magnitude is None:
        return _lora_linear(x, *flat, *option, backend)
    with torch.no_grad():
        norm = _adapted_norm(*flat, backend)
    y = (_lora_linear(x, *flat._replace(bias=None), *option, backend) * (magnitude / norm)).to(x.dtype)
    return y if bias is None else y + bias


def _check_magnitude(magnitude: Tensor, layer: Layer, adapter: Tensor | None) -> None:
    if adapter is not None or layer.lora_a is None:
        raise ValueError("lora_linear: magnitude is for a layer with one adapter")
    if magnitude.shape != (layer.height,) or not magnitude.is_floating_point():
        raise ValueError(
            f"lora_linear: magnitude must be floating [{layer.height}], got {magnitude.dtype} {list(magnitude.shape)}"
        )
    if magnitude.device != layer.weight.device:
        raise ValueError(f"lora_linear: magnitude is on {magnitude.device}, the weight on {layer.weight.device}")


def lora_qkv(
    x: Tensor,
    q: LoraLayer,
    k: LoraLayer,
    v: LoraLayer,
    *,
    norm: tuple[Tensor, float] | None = None,
    adapter: Tensor | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Three `lora_linear` of one `x`: one product with their A, one sum for the gradient of x.

    Arguments, results and errors are those of `lora_linear`; with dropout the layers use seed, seed + 1 and seed + 2.
    With `norm`, weight `[K]` and eps, they read `rms_norm(x, *norm)`, which is not kept but made again in the backward.
    """
    layers = {"q": q, "k": k, "v": v}
    flat = [flatten("lora_qkv", name, x, layer, adapter is not None) for name, layer in layers.items()]
    option = options("lora_qkv", x, flat, adapter, dropout, seed, norm)
    backend = backend_for("lora_qkv", x, lora_cuda.case(x, flat, option))
    if backend == "reference":
        return reference.lora_qkv(x, q, k, v, norm=norm, adapter=adapter, dropout=dropout, seed=seed)
    return _lora_qkv(x, *chain(*flat), *option, backend)


def _forward(x: Tensor, *arguments: Any) -> Tensor | tuple[Tensor, ...]:
    *flat, adapter, dropout, seed, norm, eps, backend = arguments
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    option = Options(None if adapter is None else adapter.flatten(), dropout, seed, norm, eps)
    with torch.autocast(x.device.type, enabled=False):
        ys = project(normed(rows, option, backend), layers_of(flat), option, backend)
    return _one_or_all([y.view(*x.shape[:-1], y.shape[-1]) for y in ys])


def _fake(x, *arguments):
    return _one_or_all([x.new_empty(*x.shape[:-1], layer.height) for layer in layers_of(arguments[:-6])])


def _one_or_all(tensors: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _setup_context(ctx, inputs, output) -> None:
    x, *flat, adapter, ctx.dropout, ctx.seed, norm, ctx.eps, ctx.backend = inputs
    ctx.layers = [Layer(*[None] * TENSORS, *layer[TENSORS:]) for layer in layers_of(flat)]  # type: ignore[arg-type]
    ctx.save_for_backward(x, adapter, norm, *(tensor for layer in layers_of(flat) for tensor in layer[:TENSORS]))


def needs_of(ctx: Any, layers: int) -> list[bool]:
    """Whether x and the norm need their gradients, then for each layer whether the four fields of `Gradients` do."""
    size = len(Layer._fields)
    wanted = ("weight", "bias", "lora_a", "lora_b")
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1 + layers * size + Options._fields.index("norm")]]
    for i in range(layers):
        needs += [ctx.needs_input_grad[1 + i * size + Layer._fields.index(field)] for field in wanted]
    return needs


def saved_layers(ctx: Any, tensors: Sequence[Tensor | None]) -> list[Any]:
    """The fields of `ctx.layers`, whose tensors were saved, one layer after the other."""
    fields: list[Any] = []
    for i, layer in enumerate(ctx.layers):
        fields += [*tensors[i * TENSORS : (i + 1) * TENSORS], *layer[TENSORS:]]
    return fields


def spread(grads: Sequence[Tensor], needs: Sequence[bool], layers: int) -> list[Tensor | None]:
    """Gradients of x, every field of every layer and the options, from those of x, the norm and `Gradients`."""
    x, norm, *rest = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    result = [x]
    for i in range(layers):
        weight, bias, lora_a, lora_b = rest[4 * i : 4 * i + 4]
        result += [weight, None, None, None, None, bias, lora_a, lora_b, *[None] * (len(Layer._fields) - TENSORS)]
    return [*result, None, None, None, norm, None]


def _backward_of(name: str) -> Callable[..., Any]:
    def backward(ctx, *grads):
        x, adapter, norm, *tensors = ctx.saved_tensors
        needs = needs_of(ctx, len(ctx.layers))
        option = (adapter, ctx.dropout, ctx.seed, norm, ctx.eps)
        results = _GRADIENTS[name](list(grads), x, *saved_layers(ctx, tensors), *option, needs, ctx.backend)
        return *spread(results, needs, len(ctx.layers)), None

    return backward


def _gradient(grads: list[Tensor], x: Tensor, *arguments: Any) -> list[Tensor]:
    *flat, adapter, dropout, seed, norm, eps, needs, backend = arguments
    layers = layers_of(flat)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    incoming = [grad.reshape(len(rows), layer.height) for grad, layer in zip(grads, layers, strict=True)]
    option = Options(None if adapter is None else adapter.flatten(), dropout, seed, norm, eps)
    with torch.autocast(x.device.type, enabled=False):
        source = normed(rows, option, backend)
        grad, results = project_gradient(incoming, source, layers, option, grouped(needs), backend)
        grad_x, grad_norm = normed_gradient(grad, rows, option, backend)
    return filled(grad_x, grad_norm, results, x)


def grouped(needs: Sequence[bool]) -> list[Sequence[bool]]:
    """[whether what the layers read needs its gradient], then the four of each layer."""
    return [[needs[0] or needs[1]], *(needs[i : i + 4] for i in range(2, len(needs), 4))]


def filled(grad_x: Tensor | None, grad_norm: Tensor | None, results: Sequence[Gradients], x: Tensor) -> list[Tensor]:
    """A registered op returns tensors only: empty ones stand for gradients that nobody needs."""
    grad_x = None if grad_x is None else grad_x.view(x.shape)
    grads = [grad_x, grad_norm, *(grad for result in results for grad in result)]
    return [x.new_empty(0) if grad is None else grad for grad in grads]


def fake_gradients(x: Tensor, norm: Tensor | None, layers: Sequence[Layer], needs: Sequence[bool]) -> list[Tensor]:
    """Empty gradients of x, the norm and every layer's `Gradients`."""
    tensors = [x, norm, *(t for layer in layers for t in (layer.weight, layer.bias, layer.lora_a, layer.lora_b))]
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None and need else x.new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    ]


def _fake_gradient(grads, x, *arguments):
    return fake_gradients(x, arguments[-4], layers_of(arguments[:-7]), arguments[-2])


OPTIONS = "Tensor? adapter, float dropout, SymInt seed, Tensor? norm, float eps"
_GRADIENTS: dict[str, Callable[..., Any]] = {}


def _define(name: str, *layers: str) -> Callable[..., Any]:
    fields = f"Tensor x, {schema(*layers)}, {OPTIONS}"
    _GRADIENTS[name] = define(
        f"{name}_backward",
        f"(Tensor[] grads, {fields}, bool[] needs, str backend) -> Tensor[]",
        _gradient,
        _fake_gradient,
    )
    outputs = ", ".join(["Tensor"] * len(layers))
    return define(name, f"({fields}, str backend) -> ({outputs})", _forward, _fake, _setup_context, _backward_of(name))


def _norm(*arguments: Any) -> Tensor:
    """Norms `[N]` of the rows of W + s B A, in at least float32."""
    *flat, backend = arguments
    layer = Layer(*flat)
    norm = _fake_norm(*arguments)
    a, b = layer.lora_a[0].to(norm.dtype), layer.lora_b[0].to(norm.dtype)  # type: ignore[index]
    for rows, slab in slabs(layer, norm.dtype, backend):
        norm[rows] = torch.addmm(slab, b[rows], a, alpha=layer.scaling[0]).norm(dim=1)
    return norm


def _fake_norm(*arguments: Any) -> Tensor:
    *flat, _ = arguments
    layer, lora_a = Layer(*flat), flat[Layer._fields.index("lora_a")]
    wide = torch.promote_types(lora_a.dtype, torch.float32)
    dtype = wide if layer.absmax is not None else torch.promote_types(layer.weight.dtype, wide)
    return lora_a.new_empty(layer.height, dtype=dtype)


_adapted_norm = define("lora_adapted_norm", f"({schema('layer')}, str backend) -> Tensor", _norm, _fake_norm)
_lora_linear = _define("lora_linear", "layer")
_lora_qkv = _define("lora_qkv", "q", "k", "v")
