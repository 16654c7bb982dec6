"""What a LoRA op is given: its layers and options, checked, and as registered ops take them.

posttrain/ops/lora_products.py has the formulas.
"""

from collections.abc import Sequence
from typing import NamedTuple, SupportsFloat

import torch
from torch import Tensor

from posttrain.ops import nf4
from posttrain.ops.nf4_weight import NF4Weight


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
    if isinstance(scaling, float | SupportsFloat):  # float first: asking a protocol takes 10 us
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


def flat_b(layer: Layer, dtype: torch.dtype) -> Tensor:
    """B `[N, E R]`."""
    lora_b: Tensor = layer.lora_b  # type: ignore[assignment]
    return lora_b.transpose(0, 1).reshape(layer.height, layer.rank).to(dtype)
