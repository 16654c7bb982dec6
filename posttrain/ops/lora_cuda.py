"""LoRA layers by CUDA kernels, where rows are few and launches the cost (formulas: posttrain/ops/lora_products.py).

Up to 16 rows of an NF4 matrix with one adapter are one launch (csrc/cuda/nf4_matvec.cu). Where rows name their adapter,
the base's product is followed by two (csrc/cuda/lora.cu), u = s x A^T and y += u B^T, in which a row meets its own
adapter only: u is [T, R] in float32, not [T, E R] with zeros.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from posttrain.ops import lora_products, reference
from posttrain.ops.backend import CUDA_DTYPES, cuda_device, cuda_kernels, cuda_stream
from posttrain.ops.lora_layer import Layer, Options
from posttrain.ops.lora_products import Gradients
from posttrain.ops.nf4 import MATVEC_ROWS
from posttrain.ops.nf4_cuda import SPAN, Adapter, aligned, factors, matvec

_ADAPTERS_ROWS = 256


def case(x: Tensor, layers: Sequence[Layer], options: Options) -> str:
    """Of posttrain/ops/cuda_choice.py, for layers of x `[..., K]`."""
    rows = x.shape[:-1].numel()
    if options.adapter is not None:
        return "adapters by row" if rows <= _ADAPTERS_ROWS else ""
    nf4 = x.dtype != torch.float32 and any(layer.absmax is not None for layer in layers)
    return "up to 16 rows of NF4" if nf4 and _one_launch(rows, layers, options) else ""


def takes(x: Tensor, layers: Sequence[Layer], options: Options) -> bool:
    """Whether `project` is for these layers; the library's products are for others."""
    return options.adapter is not None or _one_launch(len(x), layers, options)


def _one_launch(rows: int, layers: Sequence[Layer], options: Options) -> bool:
    alone = all(layer.absmax is not None or layer.lora_a is None for layer in layers)
    return alone and options.dropout == 0 and rows <= MATVEC_ROWS


def project(x: Tensor, layers: Sequence[Layer], options: Options) -> list[Tensor]:
    """y `[T, N]` of every layer, for x `[T, K]`."""
    return [_output(x, layer, options, i) for i, layer in enumerate(layers)]


def _output(x: Tensor, layer: Layer, options: Options, place: int) -> Tensor:
    a, b, adapter = layer.lora_a, layer.lora_b, options.adapter
    one = None if a is None or b is None or adapter is not None else Adapter(a[0], b[0], layer.scaling[0])
    if layer.nf4 is not None and len(x) <= MATVEC_ROWS:
        y = x.new_empty(len(x), layer.height)
        matvec(x, layer.nf4, layer.bias, y, one)
    else:
        y = lora_products.base(x, layer, "cuda")
    if a is not None and b is not None and adapter is not None:
        source = x if options.dropout == 0 else x.masked_fill(_dropped(x, options, place), 0)
        _expand(_shrink(source, a, _scales(layer, options), adapter), b, adapter, y)
    return y


def project_gradient(
    grads: Sequence[Tensor], x: Tensor, layers: Sequence[Layer], options: Options, needs: Sequence[Sequence[bool]]
) -> tuple[Tensor | None, list[Gradients]]:
    """As lora_products', where rows name their adapter."""
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs[0][0] else None
    results = []
    for i, (grad, layer) in enumerate(zip(grads, layers, strict=True)):
        low: tuple[Tensor | None, Tensor | None] = (None, None)
        if layer.lora_a is not None:
            low = _adapter_gradient(grad_x, grad, x, layer, options, i, needs[1 + i])
        if grad_x is not None:
            lora_products.base_gradient(grad_x, grad, layer, "cuda", True)
        results.append(lora_products.layer_gradients(grad, x, layer, *low, needs[1 + i]))
    return grad_x, results


def _adapter_gradient(
    grad_x: Tensor | None,
    grad: Tensor,
    x: Tensor,
    layer: Layer,
    options: Options,
    place: int,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """(dA `[E, R, K]`, dB^T `[E, R, N]`), where needed; adds drop(v A) to `grad_x`."""
    _, _, needs_a, needs_b = needs
    a, b, adapter = layer.lora_a, layer.lora_b, options.adapter
    assert a is not None and b is not None and adapter is not None
    dropped = None if options.dropout == 0 else _dropped(x, options, place)
    source = x if dropped is None else x.masked_fill(dropped, 0)
    scales = _scales(layer, options)
    u = _shrink(source, a, scales, adapter) if needs_b else None
    v = _shrink(grad, b.transpose(1, 2), scales, adapter) if needs_a or grad_x is not None else None
    if grad_x is not None and v is not None:
        part = grad_x if dropped is None else torch.zeros_like(grad_x)
        _expand(v, a.transpose(1, 2), adapter, part)
        if dropped is not None:
            grad_x += part.masked_fill_(dropped, 0)
    grad_a = _outer(v, source, adapter, len(a)) if v is not None and needs_a else None
    return grad_a, None if u is None else _outer(u, grad, adapter, len(a))


def _dropped(x: Tensor, options: Options, place: int) -> Tensor:
    return reference.dropped(x, options.dropout, options.seed + place)


def _scales(layer: Layer, options: Options) -> Tensor:
    return _constants(tuple(s / (1 - options.dropout) for s in layer.scaling), layer.weight.device)


@lru_cache(maxsize=256)
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def _shrink(x: Tensor, a: Tensor, scales: Tensor, adapter: Tensor) -> Tensor:
    """`u[i] = scales[e] x[i] A_e^T` for the adapter e of row i: float32 `[T, R]`, unset where there is none."""
    x, adapter = aligned(x), adapter.contiguous()
    rows, width = x.shape
    u = x.new_empty(rows, a.shape[1], dtype=torch.float32)
    a = factors(x.dtype if width % SPAN == 0 else torch.float32, a)[0]
    with cuda_device(x):
        cuda_kernels(x).cuda_lora_shrink(
            cuda_stream(x), x.data_ptr(), CUDA_DTYPES[x.dtype], width, rows, width, adapter.data_ptr(),
            a.data_ptr(), CUDA_DTYPES[a.dtype], *a.shape[:2], scales.data_ptr(), u.data_ptr(),
        )  # fmt: skip
    return u


def _expand(u: Tensor, b: Tensor, adapter: Tensor, y: Tensor) -> None:
    """`y[i] += u[i] B_e^T` for the adapter e of row i."""
    b, adapter = factors(y.dtype, b)[0], adapter.contiguous()
    adapters, height, ranks = b.shape
    with cuda_device(y):
        cuda_kernels(y).cuda_lora_expand(
            cuda_stream(y), u.data_ptr(), adapter.data_ptr(), b.data_ptr(), CUDA_DTYPES[b.dtype], adapters, ranks,
            y.data_ptr(), CUDA_DTYPES[y.dtype], y.stride(0), len(y), height,
        )  # fmt: skip


def _outer(v: Tensor, x: Tensor, adapter: Tensor, adapters: int) -> Tensor:
    """float32 `[E, R, K]`: for each adapter the sum of v[i]^T x[i] over its rows."""
    x, adapter = x.contiguous(), adapter.contiguous()
    (rows, width), ranks = x.shape, v.shape[1]
    grad = x.new_empty(adapters, ranks, width, dtype=torch.float32)
    with cuda_device(x):
        cuda_kernels(x).cuda_lora_outer(
            cuda_stream(x), v.data_ptr(), ranks, x.data_ptr(), CUDA_DTYPES[x.dtype], width, rows, width,
            adapter.data_ptr(), adapters, grad.data_ptr(),
        )  # fmt: skip
    return grad
