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
from typing import Any, NamedTuple, SupportsFloat

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.ops import nf4, reference, rms_norm
from posttrain.ops.nf4_weight import NF4Weight

_TILE = 1 << 22  # elements of x or dy that are converted or masked at a time


class LoraLayer(NamedTuple):
    """A linear layer with an adapter.

    Attributes:
        weight: `[N, K]`, in the dtype of x, or an NF4 matrix.
        lora_a: `[R, K]`, any floating dtype, or `[E, R, K]` for E adapters; None for no adapter.
        lora_b: `[N, R]` or `[E, N, R]`.
        scaling: of the adapter: alpha / R, or alpha / sqrt(R) for rsLoRA; E numbers for E adapters.
        bias: `[N]` or None.
    """

    weight: Tensor | NF4Weight
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: float | Sequence[float] = 1.0
    bias: Tensor | None = None


class Layer(NamedTuple):
    """A `LoraLayer` as registered ops take it; `weight` is the packed one of an NF4 matrix if absmax is there."""

    weight: Tensor
    absmax: Tensor | None
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None
    bias: Tensor | None
    lora_a: Tensor | None  # [E, R, K]
    lora_b: Tensor | None  # [E, N, R]
    height: int
    width: int
    block: int
    nested_block: int
    scaling: list[float]

    @property
    def nf4(self) -> nf4.Parts | None:
        """The NF4 matrix, if it is one."""
        if self.absmax is None:
            return None
        tensors = self.weight, self.absmax, self.nested_absmax, self.nested_code, self.offset
        return nf4.contiguous(nf4.Parts(*tensors, self.height, self.width, self.block, self.nested_block))

    @property
    def rank(self) -> int:
        """E R."""
        return 0 if self.lora_a is None else self.lora_a.shape[0] * self.lora_a.shape[1]


TENSORS = 8  # the first fields of Layer
_TYPES = (*["Tensor"], *["Tensor?"] * 7, *["SymInt"] * 4, "float[]")


class Options(NamedTuple):
    """What holds for all layers of an op."""

    adapter: Tensor | None  # int64 [T]
    dropout: float
    seed: int
    norm: Tensor | None = None  # weight [K] of the norm that x passes first
    eps: float = 0.0


def flatten(op: str, name: str, x: Tensor, layer: LoraLayer, several: bool) -> Layer:
    """`layer`, called `name` in errors, checked against `x` `[..., K]`; `several` if its rows name their adapter."""
    weight, lora_a, lora_b, _, bias = layer
    packed = weight.packed if isinstance(weight, NF4Weight) else weight
    where = f"{op}: {name}: "
    if len(weight.shape) != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1] or not x.is_floating_point():
        raise ValueError(
            f"{where}needs floating x [..., K] and weight [N, K]; "
            f"got {x.dtype} {list(x.shape)} and {list(weight.shape)}"
        )
    height, width = weight.shape
    if isinstance(weight, Tensor) and weight.dtype != x.dtype:
        raise ValueError(f"{where}weight must be {x.dtype} like x, got {weight.dtype}")
    if bias is not None and (bias.shape != (height,) or bias.dtype != x.dtype):
        raise ValueError(f"{where}bias must be [{height}] {x.dtype}, got {list(bias.shape)} {bias.dtype}")
    for part, tensor in (("weight", packed), ("bias", bias), ("lora_a", lora_a), ("lora_b", lora_b)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{where}{part} is on {tensor.device}, x on {x.device}")
    a, b, factors = _adapters(where, layer, several)
    if isinstance(weight, NF4Weight):
        parts = nf4.Parts.of(weight)
        return Layer(*parts[:5], bias, a, b, *parts[5:], factors)
    return Layer(weight, None, None, None, None, bias, a, b, height, width, 0, 0, factors)


def _adapters(where: str, layer: LoraLayer, several: bool) -> tuple[Tensor | None, Tensor | None, list[float]]:
    """A `[E, R, K]`, B `[E, N, R]` and E factors."""
    a, b = layer.lora_a, layer.lora_b
    if a is None and b is None:
        return None, None, []
    if a is None or b is None:
        raise ValueError(f"{where}lora_a and lora_b belong together, got only one of them")
    height, width = layer.weight.shape
    dims = 3 if several else 2
    fits = a.ndim == b.ndim == dims and a.shape[-1] == width and b.shape[-2] == height
    if not fits or a.shape[-2] != b.shape[-1] or a.shape[:-2] != b.shape[:-2]:
        wanted = "[E, R, K] and lora_b [E, N, R]" if several else "[R, K] and lora_b [N, R]"
        raise ValueError(
            f"{where}needs lora_a {wanted} for weight {[height, width]}; got {list(a.shape)} and {list(b.shape)}"
        )
    if not a.is_floating_point() or not b.is_floating_point():
        raise ValueError(f"{where}lora_a and lora_b must be floating, got {a.dtype} and {b.dtype}")
    factors = _factors(where, layer.scaling, len(a) if several else 1)
    return (a, b, factors) if several else (a[None], b[None], factors)


def _factors(where: str, scaling: float | Sequence[float], count: int) -> list[float]:
    if isinstance(scaling, SupportsFloat):
        return [float(scaling)] * count
    if not isinstance(scaling, Sequence) or not all(isinstance(factor, SupportsFloat) for factor in scaling):
        raise ValueError(f"{where}scaling must be a number or {count} of them, got {scaling!r}")
    if len(scaling) != count:
        raise ValueError(f"{where}scaling must be {count} numbers, got {len(scaling)}")
    return [float(factor) for factor in scaling]


def options(
    op: str,
    x: Tensor,
    layers: Sequence[Layer],
    adapter: Tensor | None,
    dropout: float,
    seed: int,
    norm: tuple[Tensor, float] | None = None,
) -> Options:
    """Checked options; `adapter` keeps the shape of x."""
    weight, eps = norm or (None, 0.0)
    if weight is not None and (weight.shape != x.shape[-1:] or weight.device != x.device):
        raise ValueError(
            f"{op}: the norm's weight must be {list(x.shape[-1:])} on {x.device}; "
            f"got {list(weight.shape)} on {weight.device}"
        )
    if weight is not None and not weight.is_floating_point():
        raise ValueError(f"{op}: the norm's weight must be floating, got {weight.dtype}")
    if not 0 <= dropout < 1:
        raise ValueError(f"{op}: dropout must be at least 0 and below 1, got {dropout}")
    if adapter is None:
        return Options(None, float(dropout), seed, weight, eps)
    if adapter.shape != x.shape[:-1] or adapter.dtype != torch.int64 or adapter.device != x.device:
        raise ValueError(
            f"{op}: adapter must be int64 {list(x.shape[:-1])} on {x.device}; "
            f"got {adapter.dtype} {list(adapter.shape)} on {adapter.device}"
        )
    if not any(layer.scaling for layer in layers):
        raise ValueError(f"{op}: adapter is for layers with adapters, and there is no lora_a")
    _check_range(op, adapter, min(len(layer.scaling) for layer in layers if layer.scaling))
    return Options(adapter, float(dropout), seed, weight, eps)


def _check_range(op: str, adapter: Tensor, adapters: int) -> None:
    if torch.compiler.is_compiling() or adapter.numel() == 0:
        return
    bad = (adapter < -1) | (adapter >= adapters)
    message = f"{op}: adapter must be -1 (none) or one of 0 to {adapters - 1}"
    if adapter.device.type == "cuda":
        torch._assert_async(~bad.any(), message)
    elif bool(bad.any()):
        raise ValueError(f"{message}, got {int(adapter[bad][0])}")


def schema(*names: str) -> str:
    """The fields of layers `names` in the schema of an op."""
    return ", ".join(
        f"{kind} {name}_{field}" for name in names for kind, field in zip(_TYPES, Layer._fields, strict=True)
    )


def layers_of(flat: Sequence) -> list[Layer]:
    """Layers from their fields, one after the other."""
    size = len(Layer._fields)
    return [Layer(*flat[i : i + size]) for i in range(0, len(flat), size)]


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
    for rows in _tiles(len(x), x.shape[1], x.dtype == u.dtype and bundle.dropped is None):
        torch.mm(bundle.source(x, rows), bundle.lora_a.T, out=u[rows])
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
            grad = grads[i][rows].to(wide)
            if grad_b is not None and u is not None:
                grad_b.addmm_(_scaled(u[:, columns], layers[i], options, rows).T, grad)
            if v is not None:
                v[rows, columns] = _scaled(grad @ lora_b, layers[i], options, rows)
        if grad_a is not None and v is not None:
            grad_a.addmm_(v[rows].T, tile)
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


def flat_b(layer: Layer, dtype: torch.dtype) -> Tensor:
    """B `[N, E R]`."""
    lora_b: Tensor = layer.lora_b  # type: ignore[assignment]
    return lora_b.transpose(0, 1).reshape(layer.height, layer.rank).to(dtype)


def _tiles(rows: int, width: int, whole: bool = False) -> Iterator[slice]:
    step = max(1, rows if whole else _TILE // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
