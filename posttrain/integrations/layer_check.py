"""A decoder's layers on the first real batch against what they stand in for, by the rule of self_check.py.

At the first forward of a decoder, the first 32 tokens of its first two sequences go through the decoder cut down to one
layer, three times: by our ops, with the prefixes shared that they have in common; by a copy with the modules of
transformers and its plain attention; and by that copy in float32 (float64 for a float32 model), which is the truth.
The gradient of the layer's input is compared, too.

So it is with one layer of each kind: of the same classes, settings and attention (full, sliding), computed in the same
dtype. A model that gets adapters later has layers of another kind. Of weights in 4 bits the truth has what bitsandbytes
makes of them. The check holds one layer in the wider dtype for as long as it lasts.

Weights that are divided among processes (FSDP2) can't be copied, so where there are several processes, the layers are
looked at as soon as the model has our ops, with tokens made up for it.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from posttrain.integrations.counting import count, say
from posttrain.integrations.regroup import Regrouped, regroup
from posttrain.integrations.self_check import Compared, compute_dtype, judge, wider
from posttrain.models.attention import NAME
from posttrain.models.disguise import Disguise, disguised, own, put_on, take_off
from posttrain.models.families import Fused
from posttrain.models.lora_layers import is_bitsandbytes, per_row
from posttrain.models.packing import packed_output
from posttrain.models.quantized import NF4Linear
from posttrain.models.trial import evaluating

_TOKENS = 32
_LOOKED_AT = "_posttrain_looked_at"

_checked: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()  # what has passed, or can't be checked


class Watched(Disguise):
    """Marks a decoder whose layers are checked at its first forward; a hook would be in its pickles."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.__dict__.get(_LOOKED_AT):
            _at_first(self, args, kwargs)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


@cache
def _watched(original: Any) -> type:
    return disguised(original, Watched)


def watch(body: Any) -> None:
    """Check the layers of a decoder at its first forward with our ops, until `unwatch`, and those of its copies."""
    if not isinstance(body, Watched):
        put_on(body, _watched)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and _loaded(body):
        _at_first(body, (), {"input_ids": _made_up(body)})


def unwatch(body: Any) -> None:
    """Undo `watch`."""
    if isinstance(body, Watched):
        take_off(body, Watched)
    _checked.pop(body, None)


@contextmanager
def looked_at(body: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Iterator[None]:
    """A watched decoder, checked with these sequences `[B, T]` and not at the forwards inside, which aren't batches."""
    if isinstance(body, Watched):
        _at_first(body, (), {"input_ids": input_ids, "attention_mask": attention_mask})
    setattr(body, _LOOKED_AT, True)
    try:
        yield
    finally:
        delattr(body, _LOOKED_AT)


def _at_first(body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a decoder's forward."""
    layers = getattr(body, "layers", None)
    if torch.compiler.is_compiling() or not isinstance(layers, nn.ModuleList) or not len(layers):
        return
    checked = _checked.setdefault(body, set())
    state = (_dtype(layers[0]), _classes(layers[0]), _classes(layers[-1]))
    ids = _sequences(kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask"))
    if state in checked or ids is None:
        return
    if obstacle := per_row(body):  # of this forward, so the next one may be looked at
        _left_out(body, obstacle)
        return
    _check(body, ids, checked)
    checked.add(state)


def _loaded(body: Any) -> bool:
    """Whether the weights are there: processes that get them from another one may not have them yet."""
    weights = [p for p in body.parameters() if p.is_floating_point()]
    return all(not p.is_meta and not isinstance(p, DTensor) and bool(p.isfinite().all()) for p in weights)


def _made_up(body: Any) -> Tensor:
    """Two sequences of tokens that differ in their second half."""
    size = body.config.get_text_config().vocab_size
    ids = torch.randint(size, (2, _TOKENS), generator=torch.Generator().manual_seed(0))
    ids[1, : _TOKENS // 2] = ids[0, : _TOKENS // 2]
    return ids.to(body.get_input_embeddings().weight.device)


def _sequences(ids: Any, mask: Any) -> Tensor | None:
    """The first tokens of the first rows `[R, T]`, without padding, or None if there aren't two tokens."""
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not len(ids) or ids.shape[1] < 2:
        return None
    rows = [
        row[mask[at, -row.numel() :].bool()] if isinstance(mask, Tensor) and mask.ndim == 2 else row
        for at, row in enumerate(ids[:2])
    ]
    length = min(_TOKENS, *(len(row) for row in rows)) if len(rows) > 1 else min(_TOKENS, len(rows[0]))
    return torch.stack([row[:length] for row in rows]) if length > 1 else None


def _check(body: Any, ids: Tensor, checked: set[Any]) -> None:
    """One layer of each kind that isn't among those `checked`, where it is noted then."""
    passed = False
    for kind, at in _kinds(body).items():
        if kind in checked:
            continue
        obstacle = _obstacle(body.layers[at])
        if obstacle is None:
            with torch.inference_mode(False), evaluating(body):
                results = _compared(body, at, ids.clone(), kind.dtype)
            where = f"layer {at}" if kind.attention is None else f"layer {at} ({kind.attention})"
            judge(f"the layers of {type(body).__name__}", results, kind.dtype, f"{where}: ")
            passed = True
        elif obstacle != _DIVIDED or not checked:  # looked at before they were divided
            _left_out(body, obstacle)
        checked.add(kind)
    if passed:
        count(f"self-check of the layers of {type(body).__name__} passed")


def _left_out(body: nn.Module, obstacle: str) -> None:
    count(f"self-check of layers left out: {obstacle}")
    say(f"posttrain: the self-check of {type(body).__name__}'s layers is left out: {obstacle}")


class _Kind(NamedTuple):
    """What layers have in common of which one is looked at."""

    dtype: torch.dtype
    attention: str | None
    classes: tuple[type, ...]
    settings: tuple[Any, ...]


def _kinds(body: Any) -> dict[_Kind, int]:
    """The first layer of each kind that has our ops."""
    kinds: dict[_Kind, int] = {}
    types = getattr(body.config.get_text_config(), "layer_types", None) or [None] * len(body.layers)
    for at, (layer, attention) in enumerate(zip(body.layers, types, strict=False)):
        classes = _classes(layer)
        if any(issubclass(cls, Fused) for cls in classes):
            kinds.setdefault(_Kind(_dtype(layer), attention, classes, _settings(layer)), at)
    return kinds


def _classes(layer: nn.Module) -> tuple[type, ...]:
    return tuple(type(module) for module in layer.modules())


def _settings(layer: nn.Module) -> tuple[Any, ...]:
    """What its modules are set to: sizes, windows, switches."""
    return tuple(
        (name, value)
        for module in layer.modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | int | str) and not name.startswith("_") and name not in ("layer_idx", "training")
    )


def _dtype(layer: nn.Module) -> torch.dtype:
    """The narrowest in which a layer computes."""
    found = [compute_dtype(p) for p in layer.parameters() if p.is_floating_point() and p.dtype.itemsize > 1]
    quantized: list[Any] = [module for module in layer.modules() if is_bitsandbytes(module)]
    found += [module.compute_dtype for module in quantized if module.compute_dtype]
    return min(found, key=lambda dtype: dtype.itemsize, default=torch.float32)


_DIVIDED = "weights are divided among processes"


def divided(module: nn.Module) -> bool:
    """Whether processes share its weights: FSDP, FSDP2, tensor parallelism or ZeRO-3."""
    weights = module.parameters(recurse=False)
    fsdp = type(module).__name__ == "FullyShardedDataParallel"
    return fsdp or any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in weights)


def _obstacle(layer: nn.Module) -> str | None:
    """Why a layer can't be copied and computed in another dtype, or None."""
    parameters, modules = list(layer.parameters()), list(layer.modules())
    if any(map(divided, modules)):
        return _DIVIDED
    if any(not _readable(module) for module in modules):
        return "weights are quantized in another way than 4 bits of bitsandbytes"
    if any(hasattr(module, "_hf_hook") for module in modules) or any(p.is_meta for p in parameters):
        return "weights are moved between devices"
    return None


def _readable(module: Any) -> bool:
    """Whether the tensors of this module alone are numbers, or 4 bits that can be made such."""
    if isinstance(module, NF4Linear):
        return True
    if is_bitsandbytes(module):
        state = module.weight.quant_state
        return state is not None and not getattr(state, "packing_format_for_cpu", False)
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return all(tensor.is_floating_point() and tensor.dtype.itemsize > 1 for tensor in tensors)


def _compared(body: Any, at: int, ids: Tensor, dtype: torch.dtype) -> list[Compared]:
    """Hidden states and the gradient of its input of the layer `at`."""
    ours, original = _short(body, at), _copied(_short(body, at))
    found = regroup(ids, None, None)
    assert not isinstance(found, str)  # plain rows of tokens have a forest
    wide, places = wider(dtype), found.places.flatten()
    weights = torch.linspace(-1, 1, ids.numel() * body.config.get_text_config().hidden_size, device=ids.device).sin()

    def plain(short: Any, wide: torch.dtype | None = None) -> list[Tensor]:
        run = partial(type(short).forward, short, input_ids=ids, use_cache=False)
        hidden, gradient = _results(short, run, lambda hidden: hidden.flatten(0, 1), weights, wide)
        return [hidden, _summed(gradient, found)]

    if body.config._attn_implementation == NAME:
        packed = partial(packed_output, partial(type(ours).forward, ours), found.input_ids, found.layout)
        hidden, gradient = _results(ours, packed, lambda hidden: hidden[0][places], weights)
        by_us = [hidden, gradient[0]]
    else:
        by_us = plain(ours)
    _dequantize(original, NF4Linear)  # there is no other original
    by_them = plain(original)
    _dequantize(original, nn.Module)
    for name, child in original.named_children():
        if child is not original.get_input_embeddings():
            setattr(original, name, child.to(wide))
    with torch.autocast(ids.device.type, enabled=False):
        truth = plain(original, wide)
    return list(map(Compared, ("hidden states", "gradients"), by_us, by_them, truth))


def _summed(gradient: Tensor, found: Regrouped) -> Tensor:
    """Of the tokens of the forest, from `[R, T, H]`."""
    rows = gradient.flatten(0, -2)
    return rows.new_zeros(found.layout.num_tokens, rows.shape[-1]).index_add_(0, found.places.flatten(), rows)


def _short(body: Any, at: int) -> Any:
    """A decoder of the layer `at`, with the modules of `body`."""
    short = copy.copy(body)
    short.__dict__["_modules"] = {**body._modules, "layers": body.layers[at : at + 1]}
    short.__dict__.pop("forward", None)
    short.__dict__["config"] = copy.copy(body.config)
    short.config.num_hidden_layers = 1
    if types := getattr(body.config, "layer_types", None):
        short.config.layer_types = types[at : at + 1]
    return short


class _InFull(nn.Linear):
    """A layer of 4-bit weights with these in full, in any dtype."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight.to(input.dtype), bias)


def _dequantize(short: Any, among: type) -> None:
    """Exchange the 4-bit layers of the class `among`."""
    found: list[tuple[str, Any]] = [(name, part) for name, part in short.named_modules() if isinstance(part, among)]
    for name, module in found:
        if isinstance(module, NF4Linear):
            short.set_submodule(name, _InFull(module.dequantize(), module.bias))
        elif is_bitsandbytes(module):
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            short.set_submodule(name, _InFull(weight, module.bias))


def _copied(short: Any) -> Any:
    """A copy with modules of transformers in place of ours; the embeddings are the same."""
    embeddings = short.get_input_embeddings()
    copied = copy.deepcopy(short, {id(embeddings): embeddings})
    for module in copied.modules():
        module.__class__ = own(type(module))
    for config in {id(c): c for m in copied.modules() if (c := getattr(m, "config", None)) is not None}.values():
        config._attn_implementation = "eager"  # "sdpa" has no capped scores
    return copied


def _results(
    short: Any,
    run: Callable[[], Any],
    rows: Callable[[Tensor], Tensor],
    weights: Tensor,
    wide: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(hidden states `[N, H]`, gradient of what the layer was given) of a decoder whose layer may get it in `wide`."""
    leaves: list[Tensor] = []

    def cast(x: Tensor) -> Tensor:
        return x.to(wide) if wide is not None and x.is_floating_point() else x

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = tree_map_only(Tensor, cast, args), tree_map_only(Tensor, cast, kwargs)
        states = args[0] if args else kwargs.pop("hidden_states")
        leaves.append(states.detach().requires_grad_())
        return (leaves[0], *args[1:]), kwargs

    handle = short.layers[0].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with torch.enable_grad():
            hidden = rows(run().last_hidden_state)
            total = (hidden * weights.view_as(hidden).to(hidden.dtype)).sum()
    finally:
        handle.remove()
    return hidden.detach(), torch.autograd.grad(total, leaves)[0]
