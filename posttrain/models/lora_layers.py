"""PEFT's LoRA layers as the LoRA ops take them.

    y = W x + b + sum over the active adapters i of s_i B_i A_i dropout(x)

Adapters that are active together are one adapter: their A_i below each other, their s_i B_i side by side. What a layer
computes changes between two calls (adapters are switched, merged, replaced; hooks come and go), so it is read off the
layer each time. Where the ops don't compute the same, `adapted` says why not, and PEFT's own code runs.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from posttrain.models.quantized import NF4Linear, bitsandbytes_matrix
from posttrain.ops import LoraLayer
from posttrain.ops.nf4_weight import NF4Weight

_LORA = {("peft.tuners.lora.layer", "Linear"), ("peft.tuners.lora.bnb", "Linear4bit")}
_BITSANDBYTES = ("bitsandbytes.nn.modules", "Linear4bit")


class Adapted(NamedTuple):
    """A linear layer as `lora_linear` takes it, with the share that dropout takes now, and DoRA's magnitude."""

    layer: LoraLayer
    dropout: float = 0.0
    magnitude: Tensor | None = None

    def takes(self, x: Tensor) -> bool:
        """Whether the op gives, for this x, what the layer would: outside autocast, with weights in its dtype."""
        return _takes(x, [self.layer])


class Group(NamedTuple):
    """The layers of an op that computes several of them, and the share that dropout takes in all of them."""

    layers: list[LoraLayer]
    dropout: float

    def takes(self, x: Tensor) -> bool:
        """As of `Adapted`."""
        return _takes(x, self.layers)


def is_lora(module: nn.Module) -> bool:
    """Whether `module` is one of the LoRA layers of PEFT that our ops know."""
    return _name(module) in _LORA


def is_bitsandbytes(module: nn.Module) -> bool:
    """Whether `module` is a 4-bit layer of bitsandbytes."""
    return _name(module) == _BITSANDBYTES


def is_adapter(module: nn.Module) -> bool:
    """Whether `module` is any layer of PEFT's."""
    return bool(getattr(type(module), "adapter_layer_names", ()))


def per_row(model: nn.Module) -> str | None:
    """What PEFT gives the layers of `model`, by hooks for one forward, for each row of its batch, or None."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    given = {name for hook in hooks if isinstance(hook, partial) for name in hook.keywords}
    found = sorted(given & {"adapter_names", "alora_offsets"})
    return f"PEFT's layers get {' and '.join(found)} for each row of the batch" if found else None


def adapted(module: Any) -> Adapted | str:
    """What a linear layer, with or without adapters, computes now, or why the ops don't compute it."""
    if not is_lora(module):
        layer = _plain(module)
        return layer if isinstance(layer, str) else Adapted(layer)
    layer = _plain(module.base_layer)
    if isinstance(layer, str):
        return layer
    if hooked(module.base_layer):
        return "its base layer has hooks"
    if module.merged:
        return "its adapter is merged and switched off" if module.disable_adapters else Adapted(layer)
    branches = [] if module.disable_adapters else _branches(module)
    return _obstacle(branches) or _with_adapters(branches, layer)


def together(*parts: Adapted | str) -> Group | None:
    """Layers of the same input for one op, or None if no adapter is active in them or an op can't take them all."""
    whole = [part for part in parts if isinstance(part, Adapted) and part.magnitude is None]
    rates = {part.dropout for part in whole if part.layer.lora_a is not None}
    if len(whole) < len(parts) or len(rates) != 1:
        return None
    return Group([part.layer for part in whole], rates.pop())


def absorbed(module: nn.Module) -> Adapted | str:
    """`adapted`, for an op that computes this layer among others, so that the layer itself isn't called."""
    return "it has hooks" if hooked(module) else adapted(module)


def halves(part: Adapted | str) -> list[Adapted | str]:
    """A layer that two others were joined to: both, with the same A."""
    if isinstance(part, str) or part.dropout or part.magnitude is not None:
        return ["it can't be divided"]
    weight, lora_a, lora_b, scaling, bias = part.layer
    if isinstance(weight, NF4Weight):
        return ["a matrix in NF4 can't be divided"]
    result: list[Adapted | str] = []
    for rows in (slice(0, weight.shape[0] // 2), slice(weight.shape[0] // 2, None)):
        below = None if lora_b is None else lora_b[rows]
        result.append(Adapted(LoraLayer(weight[rows], lora_a, below, scaling, None if bias is None else bias[rows])))
    return result


def drawn(dropout: float) -> dict[str, Any]:
    """The options of an op with this dropout; torch's generator gives the seed, so a saved state of it repeats it."""
    return {"dropout": dropout, "seed": int(torch.randint(2**62, ()))} if dropout else {}


def hooked(*modules: Any) -> bool:
    """Whether calling these modules does more than run their forward."""
    return bool(_has_any_global_hook()) or any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        for module in modules
    )


def _name(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def _plain(module: Any) -> LoraLayer | str:
    """A linear layer without adapters."""
    weight: Tensor | NF4Weight | str
    if type(module) is nn.Linear:
        weight = module.weight
    elif isinstance(module, NF4Linear):
        weight = module.matrix
    elif is_bitsandbytes(module):
        weight = bitsandbytes_matrix(module)
    else:
        return f"its base is a {type(module).__name__}"
    return weight if isinstance(weight, str) else LoraLayer(weight, bias=module.bias)


class _Branch(NamedTuple):
    """One active adapter of a layer."""

    lora_a: Any
    lora_b: Any
    dropout: Any
    scaling: float
    variant: Any  # of PEFT, or None for plain LoRA
    magnitude: Any  # the module that holds it, of DoRA


def _branches(module: Any) -> list[_Branch]:
    lora_a, lora_b, dropout = module.lora_A, module.lora_B, module.lora_dropout
    magnitudes = dict(module.lora_magnitude_vector.items())
    return [
        _Branch(
            lora_a[name],
            lora_b[name],
            dropout[name],
            module.scaling[name],
            module.lora_variant.get(name),
            magnitudes.get(name),
        )
        for name in module.active_adapters
        if name in lora_a
    ]


def _obstacle(branches: list[_Branch]) -> str | None:
    """Why the ops can't compute these adapters, or None if they can."""
    for lora_a, lora_b, dropout, _, variant, _ in branches:
        share = getattr(dropout, "p", 0.0)
        if variant is not None and type(variant).__name__ != "DoraLinearVariant":
            return f"{type(variant).__name__} is another formula"
        if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear or type(dropout) not in _DROPOUTS:
            return "its adapter is made of other modules than Linear and Dropout"
        if lora_b.bias is not None:
            return "its adapter has a bias"
        if hooked(lora_a, lora_b, dropout):
            return "its adapter has hooks"
        if variant is not None and len(branches) > 1:
            return "DoRA is active together with another adapter"
        if share and (variant is not None or len(branches) > 1):
            return "dropout with DoRA, or with several active adapters, takes elements of x for each part by itself"
        if share >= 1:
            return "its dropout takes everything"
    return None


_DROPOUTS = (nn.Identity, nn.Dropout)


def _with_adapters(branches: list[_Branch], layer: LoraLayer) -> Adapted:
    if not branches:
        return Adapted(layer)
    if len(branches) > 1:
        lora_b = [b.scaling * _wide(b.lora_b.weight) for b in branches]
        lora_a = [b.lora_a.weight for b in branches]
        return Adapted(layer._replace(lora_a=torch.cat(lora_a), lora_b=torch.cat(lora_b, 1)))
    branch = branches[0]
    layer = LoraLayer(layer.weight, branch.lora_a.weight, branch.lora_b.weight, float(branch.scaling), layer.bias)
    if branch.variant is not None:
        return Adapted(layer, magnitude=branch.magnitude.weight)
    return Adapted(layer, getattr(branch.dropout, "p", 0.0) if branch.dropout.training else 0.0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _takes(x: Tensor, layers: list[LoraLayer]) -> bool:
    if torch.is_autocast_enabled(x.device.type):
        return False
    wide = [layer.weight for layer in layers if isinstance(layer.weight, Tensor)]
    wide += [layer.bias for layer in layers if layer.bias is not None]
    return all(tensor.dtype == x.dtype for tensor in wide)
