"""Linear layers with low-rank adapters that read one input, and their gradient: what the LoRA ops share.

With x̃ = x, or x with a share p of its elements dropped, and c = s / (1 - p):

    u = c x̃ A^T          y = x W^T + b + u B^T
    v = c dy B            dx = dy W + drop(v A)        dA = v^T x̃        dB = dy^T u        dW = dy^T x

(Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.) A frozen W has no dW. Only x is saved: u is
made again, tile by tile of rows, in the pass over x and dy that also makes v, dA and dB, in float32 (float64 for
float64). What is dropped follows from a seed and is not saved. Layers over the same x share the products with x: their
A are one matrix, and their dx one sum.

With E adapters, A is [E, R, K] and B [E, N, R], and each row of x names its adapter, or -1 for none. The E A are then
one matrix of rank E R, and the parts of u and v that belong to other adapters than the row's are 0.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.ops import nf4, reference, rms_norm
from posttrain.ops.lora_layer import Layer, Options, flat_b

_TILE = 1 << 22  # elements of x or dy that are converted or masked at a time


class Gradients(NamedTuple):
    """Of one layer; None for what nobody needs."""

    weight: Tensor | None
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None


class Bundle(NamedTuple):
    """Adapters that read the same x̃; `columns` are theirs of the `ranks` columns of u and v."""

    layers: list[int]
    columns: list[slice]
    lora_a: Tensor  # [ranks, K], in the dtype of u and v
    dropped: Tensor | None  # bool [T, K]

    def source(self, x: Tensor, rows: slice) -> Tensor:
        """Rows of x̃, without its factor 1 / (1 - p), in the dtype of u."""
        tile = x[rows].to(self.lora_a.dtype)
        return tile if self.dropped is None else tile.masked_fill(self.dropped[rows], 0)


class Wanted(NamedTuple):
    """What a backward needs of the products with a bundle's A and B: nothing of them for a frozen adapter."""

    v: bool
    lora_a: bool
    lora_b: list[bool]  # of each layer

    @staticmethod
    def of(bundle: Bundle, needs_x: bool, needs_layers: Sequence[Sequence[bool]]) -> "Wanted":
        """For the needs of x and, of each layer, of the fields of `Gradients`."""
        lora_a = any(needs_layers[i][2] for i in bundle.layers)
        return Wanted(needs_x or lora_a, lora_a, [needs_layers[i][3] for i in bundle.layers])


def kernel_dtype(dtype: torch.dtype, backend: str) -> torch.dtype:
    """What a backend's elementwise kernels take for `dtype`; a GPU's compute half precision in float32 themselves."""
    return dtype if backend != "cpu" else torch.promote_types(dtype, torch.float32)


def normed(x: Tensor, options: Options, backend: str) -> Tensor:
    """x `[T, K]`, through the norm if there is one."""
    if options.norm is None:
        return x
    wide = kernel_dtype(x.dtype, backend)
    return rms_norm._forward(x.to(wide), options.norm, options.eps, None, backend)[0].to(x.dtype)


def normed_gradient(
    grad: Tensor | None, x: Tensor, options: Options, backend: str
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the norm's weight, from that of the normed x. The statistics are made again."""
    if grad is None or options.norm is None:
        return grad, None
    wide = kernel_dtype(x.dtype, backend)
    rows = x.to(wide)
    rstd = rms_norm._forward(rows, options.norm, options.eps, None, backend)[2]
    grad_x, grad_norm = rms_norm._gradient(grad.to(wide), None, rows, options.norm, rstd, backend)
    return grad_x.to(x.dtype), grad_norm


def project(x: Tensor, layers: Sequence[Layer], options: Options, backend: str) -> list[Tensor]:
    """y `[T, N]` of every layer, for x `[T, K]`."""
    if backend == "cuda" and _cuda().takes(x, layers, options):
        return _cuda().project(x, layers, options)
    low: list[Tensor | None] = [None] * len(layers)
    for bundle in _bundles(x, layers, options, backend):
        for i, u in zip(bundle.layers, _low_rank(x, layers, options, bundle, backend), strict=True):
            low[i] = u
    return [_output(x, layer, u, backend) for layer, u in zip(layers, low, strict=True)]


def _low_rank(x: Tensor, layers: Sequence[Layer], options: Options, bundle: Bundle, backend: str) -> list[Tensor]:
    """u `[T, E R]` of each layer of a bundle."""
    if backend == "triton" and len(x) > nf4.MATVEC_ROWS:  # the library splits K for fewer rows
        u = _kernels().low_rank(x, layers, options, bundle)
        return [u[:, columns] for columns in bundle.columns]
    u = torch.empty(len(x), len(bundle.lora_a), dtype=bundle.lora_a.dtype, device=x.device)
    factors = {_factor(layers[i], options) for i in bundle.layers}
    factor = factors.pop() if len(factors) == 1 else None
    for rows in _tiles(len(x), x.shape[1], x.dtype == u.dtype and bundle.dropped is None):
        _product(u[rows], bundle.source(x, rows), bundle.lora_a.T, 1.0 if factor is None else factor)
    if factor is not None:
        return [u[:, columns] for columns in bundle.columns]
    parts = zip(bundle.layers, bundle.columns, strict=True)
    return [_scaled(u[:, columns], layers[i], options, slice(None)) for i, columns in parts]


def _output(x: Tensor, layer: Layer, low: Tensor | None, backend: str) -> Tensor:
    """x W^T + b + u B^T, the last part first: the large product then adds to it in the same pass."""
    if low is None:
        return base(x, layer, backend)
    if backend == "triton" and _kernels().fused(x):
        return _kernels().output(x, layer, low)
    low, lora_b = low.to(x.dtype), flat_b(layer, x.dtype)
    y = low @ lora_b.T if layer.bias is None else torch.addmm(layer.bias, low, lora_b.T)
    if layer.nf4 is None:
        return y.addmm_(x, layer.weight.T)
    nf4.add_product(y, x, layer.nf4, backend)
    return y


def base(x: Tensor, layer: Layer, backend: str) -> Tensor:
    """x W^T + b."""
    if layer.nf4 is None:
        return F.linear(x, layer.weight, layer.bias)
    return nf4.product(x, layer.nf4, layer.bias, backend)


def project_gradient(
    grads: Sequence[Tensor],
    x: Tensor,
    layers: Sequence[Layer],
    options: Options,
    needs: Sequence[Sequence[bool]],
    backend: str,
) -> tuple[Tensor | None, list[Gradients]]:
    """Gradients of x and of every layer, for `grads` dy `[T, N]`; `needs` are [that of x] and four for each layer."""
    if backend == "cuda" and options.adapter is not None:
        return _cuda().project_gradient(grads, x, layers, options, needs)
    needs_x, needs_layers = needs[0][0], needs[1:]
    low: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(layers)
    fused = needs_x and options.dropout == 0 and backend == "triton" and _kernels().fused(x)
    grad_x = v = lora_a = None
    for bundle in _bundles(x, layers, options, backend):
        wanted = Wanted.of(bundle, needs_x, needs_layers)
        v, grad_a, grad_bs = _adapter_gradient(grads, x, layers, options, bundle, wanted, backend)
        lora_a = bundle.lora_a
        for i, columns, grad_b in zip(bundle.layers, bundle.columns, grad_bs, strict=True):
            low[i] = None if grad_a is None else grad_a[columns], grad_b
        if needs_x and v is not None and not fused:
            part = v.to(x.dtype) @ lora_a.to(x.dtype)
            part = part if bundle.dropped is None else part.masked_fill_(bundle.dropped, 0)
            grad_x = part if grad_x is None else grad_x.add_(part)
    if fused:
        grad_x = _kernels().input_gradient(grads, x, layers, v, lora_a)
    elif needs_x:
        add = grad_x is not None
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if grad_x is None else grad_x
        for grad, layer in zip(grads, layers, strict=True):
            base_gradient(grad_x, grad, layer, backend, add)
            add = True
    results = [
        layer_gradients(grad, x, layer, *low[i], needs_layers[i])
        for i, (grad, layer) in enumerate(zip(grads, layers, strict=True))
    ]
    return grad_x, results


def _adapter_gradient(
    grads: Sequence[Tensor],
    x: Tensor,
    layers: Sequence[Layer],
    options: Options,
    bundle: Bundle,
    wanted: Wanted,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """(v `[T, ranks]`, dA `[ranks, K]`, the dB^T `[ranks, N]` of its layers), in one pass over x and dy."""
    if backend == "triton":
        return _kernels().adapter_gradient(grads, x, layers, options, bundle, wanted)
    wide = bundle.lora_a.dtype
    v = torch.empty(len(x), len(bundle.lora_a), dtype=wide, device=x.device) if wanted.v else None
    grad_a = torch.zeros_like(bundle.lora_a) if wanted.lora_a else None
    lora_bs = [flat_b(layers[i], wide) for i in bundle.layers]
    grad_bs = [
        torch.zeros_like(lora_b.T, memory_format=torch.contiguous_format) if needed else None
        for lora_b, needed in zip(lora_bs, wanted.lora_b, strict=True)
    ]
    width = max(x.shape[1], *(layers[i].height for i in bundle.layers))
    for rows in _tiles(len(x), width, x.dtype == wide and bundle.dropped is None):
        tile = bundle.source(x, rows)
        u = tile @ bundle.lora_a.T if any(wanted.lora_b) else None
        for i, columns, lora_b, grad_b in zip(bundle.layers, bundle.columns, lora_bs, grad_bs, strict=True):
            grad, factor = grads[i][rows].to(wide), _factor(layers[i], options)
            if grad_b is not None and u is not None:
                low = u[:, columns] if factor is not None else _scaled(u[:, columns], layers[i], options, rows)
                grad_b.addmm_(low.T, grad, beta=float(rows.start > 0), alpha=1.0 if factor is None else factor)
            if v is not None and factor is not None:
                _product(v[rows, columns], grad, lora_b, factor)
            elif v is not None:
                v[rows, columns] = _scaled(grad @ lora_b, layers[i], options, rows)
        if grad_a is not None and v is not None:
            grad_a.addmm_(v[rows].T, tile, beta=float(rows.start > 0))
    return v, grad_a, grad_bs


def base_gradient(grad_x: Tensor, grad: Tensor, layer: Layer, backend: str, add: bool) -> None:
    """`grad_x = grad W`, added to what it was if `add`."""
    if layer.nf4 is None:
        grad_x.addmm_(grad, layer.weight, beta=float(add))
    else:
        nf4.transposed_product(grad_x, grad, layer.nf4, backend, add)


def layer_gradients(
    grad: Tensor, x: Tensor, layer: Layer, grad_a: Tensor | None, grad_b: Tensor | None, needs: Sequence[bool]
) -> Gradients:
    """What `needs` asks for, from dA and dB^T in float32."""
    needs_weight, needs_bias, needs_a, needs_b = needs
    a, b = layer.lora_a, layer.lora_b
    if a is not None and grad_a is not None:
        grad_a = grad_a.view(a.shape).to(a.dtype)
    if b is not None and grad_b is not None:
        adapters, _, rank = b.shape
        grad_b = grad_b.view(adapters, rank, layer.height).transpose(1, 2).to(b.dtype).contiguous()
    return Gradients(
        grad.T @ x if needs_weight else None,
        grad.sum(0) if needs_bias else None,
        grad_a if needs_a else None,
        grad_b if needs_b else None,
    )


def _bundles(x: Tensor, layers: Sequence[Layer], options: Options, backend: str) -> Iterator[Bundle]:
    """The adapted layers, all together, or each by itself where each drops other elements."""
    adapted = [i for i, layer in enumerate(layers) if layer.lora_a is not None]
    if options.dropout == 0:
        if adapted:
            yield _bundle(x, layers, adapted, None, backend)
        return
    for i in adapted:
        yield _bundle(x, layers, [i], reference.dropped(x, options.dropout, options.seed + i), backend)


def _bundle(x: Tensor, layers: Sequence[Layer], adapted: list[int], dropped: Tensor | None, backend: str) -> Bundle:
    dtypes = {t.dtype for i in adapted for t in (layers[i].lora_a, layers[i].lora_b) if t is not None}
    dtype = x.dtype if backend == "triton" and dtypes == {x.dtype} else torch.promote_types(x.dtype, torch.float32)
    matrices, columns, start = [], [], 0
    for i in adapted:
        lora_a: Tensor = layers[i].lora_a  # type: ignore[assignment]
        matrices.append(lora_a.reshape(layers[i].rank, x.shape[1]).to(dtype))
        columns.append(slice(start, start + layers[i].rank))
        start = columns[-1].stop
    return Bundle(adapted, columns, matrices[0] if len(matrices) == 1 else torch.cat(matrices), dropped)


def _kernels() -> Any:
    """posttrain.kernels.lora, whose import needs Triton."""
    from posttrain.kernels import lora

    return lora


def _cuda() -> Any:
    """posttrain.ops.lora_cuda, which reads this module."""
    from posttrain.ops import lora_cuda

    return lora_cuda


def _factor(layer: Layer, options: Options) -> float | None:
    """c where it is that of all rows, or None where they name their adapter."""
    return layer.scaling[0] / (1 - options.dropout) if options.adapter is None else None


def _product(out: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """`out = factor a b`, in one pass."""
    torch.addmm(out, a, b, beta=0, alpha=factor, out=out)


def _scaled(low: Tensor, layer: Layer, options: Options, rows: slice) -> Tensor:
    """c `low` `[t, E R]`, and 0 where a row names another adapter."""
    factors = [s / (1 - options.dropout) for s in layer.scaling]
    if options.adapter is None:
        return low * factors[0]
    adapters = len(factors)
    own = options.adapter[rows, None] == torch.arange(adapters, device=low.device)  # [t, E]
    parts = low.reshape(len(low), adapters, layer.rank // adapters) * low.new_tensor(factors)[:, None]
    return parts.masked_fill_(~own[..., None], 0).view(low.shape)


def slabs(layer: Layer, dtype: torch.dtype, backend: str) -> Iterator[tuple[slice, Tensor]]:
    """Runs of the rows of W, in `dtype`."""
    if layer.nf4 is not None:
        yield from nf4.slabs(layer.nf4, dtype, backend)
        return
    for rows in _tiles(layer.height, layer.width):
        yield rows, layer.weight[rows].to(dtype)


def _tiles(rows: int, width: int, whole: bool = False) -> Iterator[slice]:
    step = max(1, rows if whole else _TILE // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
