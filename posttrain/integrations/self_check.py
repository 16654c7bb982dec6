"""What our ops give on the first real batch against what they stand in for.

Layers: at the first forward of a decoder, the first 32 tokens of its first two sequences go through its first layer and
last norm three times: by our ops, with the prefixes shared that they have in common; by a copy with the modules of
transformers and its plain attention; and by that copy in float32 (float64 for a float32 model), which is the truth.
The gradient of the layer's input is compared, too. Language head: the first 8 targets, and the gradient of their hidden
states; the truth is computed a slab of the vocabulary at a time.

Ours may be as far from the truth as `torch.testing.assert_close` allows in float32, or

    2 max|original - truth| + 2 max|(truth + 0.3 - 0.3) - truth|        with the second rounded to the dtype

A check belongs to the classes of the modules and the dtype in which they compute: a model that gets adapters later is
checked again. It holds one layer and one slab in the wider dtype for as long as it lasts.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from posttrain.integrations.counting import count, say
from posttrain.integrations.regroup import regroup
from posttrain.models.attention import NAME
from posttrain.models.disguise import Disguise, disguised, own
from posttrain.models.families import Fused
from posttrain.models.head import Head
from posttrain.models.packing import packed_output
from posttrain.models.prepare import without
from posttrain.models.trial import evaluating

_TOKENS, _ROWS, _SLAB = 32, 8, 4096
_LOOKED_AT = "_posttrain_looked_at"

_layers: WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = (
    WeakKeyDictionary()
)  # what has passed, or can't be checked
_heads: set[tuple[Any, ...]] = set()


class Compared(NamedTuple):
    """One result by our ops, by the original, and in a wider dtype."""

    what: str
    ours: Tensor
    original: Tensor
    truth: Tensor


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
        original: Any = type(body)
        body.__class__ = _watched(original)


def unwatch(body: Any) -> None:
    """Undo `watch`."""
    if isinstance(body, Watched):
        body.__class__ = without(type(body), Watched)
    _layers.pop(body, None)


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


def forget_heads() -> None:
    """Check language heads anew."""
    _heads.clear()


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Autocast's dtype, or that of the tensor."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def check_head(
    caller: str,
    found: Head,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    ours: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    original: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Compare (log p, entropy) of a few hidden states `[N, H]` and targets `[N]`, once for a caller and such a head.

    Raises `ValueError` for a mismatch, with both distances from the truth.
    """
    rank = None if found.lora is None else len(found.lora[0])
    cap = (found.softcap, found.logit_scale)
    key = (caller, hidden.device, hidden.dtype, tuple(found.weight.shape), found.bias is None, rank, *cap)
    if torch.compiler.is_compiling() or key in _heads or not targets.numel():
        return
    valid = (targets != -100).nonzero()[:_ROWS, 0]
    if not len(valid):
        return
    names = ("log-probabilities", "entropies", "gradients of hidden states")
    with torch.inference_mode(False):
        rows, wanted = hidden[valid].detach().clone(), targets[valid].clone()
        by_us, by_them = (_head_results(function, rows, wanted) for function in (ours, original))
        truth = _head_truth(found, rows, wanted, temperature)
    _judge("the language head", names, by_us, by_them, truth, hidden.dtype)
    _heads.add(key)


def _head_results(function: Callable[..., tuple[Tensor, Tensor]], rows: Tensor, targets: Tensor) -> list[Tensor]:
    leaf = rows.clone().requires_grad_()
    with torch.enable_grad():
        logprob, entropy = function(leaf, targets)
    return [logprob.detach(), entropy.detach(), *torch.autograd.grad(logprob.sum(), leaf)]


def _head_truth(found: Head, rows: Tensor, targets: Tensor, temperature: float) -> list[Tensor]:
    wide = wider(rows.dtype)
    x = rows.to(wide)
    with torch.autocast(rows.device.type, enabled=False):
        z = torch.cat([x @ slab.to(wide).T for slab in found.weight.split(_SLAB)], -1)  # [N, V]
        lora = None if found.lora is None else (found.lora[0].to(wide), found.lora[1].to(wide), found.lora[2])
        if lora is not None:
            z += lora[2] * (x @ lora[0].T) @ lora[1].T
        z.requires_grad_()
        with torch.enable_grad():
            logits = (z if found.bias is None else z + found.bias.to(wide)) * found.logit_scale
            logits = logits if found.softcap is None else found.softcap * torch.tanh(logits / found.softcap)
            log_p = (logits / temperature).log_softmax(-1)
            logprob = log_p.gather(-1, targets[:, None])[:, 0]
        (dz,) = torch.autograd.grad(logprob.sum(), z)
        slabs = zip(dz.split(_SLAB, -1), found.weight.split(_SLAB), strict=True)
        dx = torch.stack([part @ slab.to(wide) for part, slab in slabs]).sum(0)
        if lora is not None:
            dx += lora[2] * (dz @ lora[1]) @ lora[0]
    log_p = log_p.detach()
    return [logprob.detach(), -(log_p.exp() * log_p).sum(-1), dx]


def _at_first(body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a decoder's forward."""
    if torch.compiler.is_compiling():
        return
    ids = _sequences(kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask"))
    layers = getattr(body, "layers", None)
    if ids is None or not isinstance(layers, nn.ModuleList) or not len(layers):
        return
    classes = tuple(type(module) for module in layers[0].modules())
    dtype = compute_dtype(next(layers[0].parameters()))
    checked = _layers.setdefault(body, set())
    if (dtype, classes) in checked or not any(issubclass(cls, Fused) for cls in classes):
        return
    obstacle = _obstacle(layers[0])
    if obstacle is not None:
        count(f"self-check of layers left out: {obstacle}")
        say(f"posttrain: the self-check of {type(body).__name__}'s layers is left out: {obstacle}")
    else:
        with torch.inference_mode(False), evaluating(body):
            _check_layers(body, ids.clone(), dtype)
    checked.add((dtype, classes))


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


def _obstacle(layer: nn.Module) -> str | None:
    """Why a layer can't be copied and computed in another dtype, or None."""
    parameters = list(layer.parameters())
    if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in parameters):
        return "weights are divided among processes"
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in layer.modules()):
        return "weights are divided among processes"
    if any(not p.is_floating_point() or p.dtype.itemsize < 2 for p in parameters) or any(
        "4bit" in type(module).__name__ or "NF4" in type(module).__name__ for module in layer.modules()
    ):
        return "weights are quantized"
    if any(hasattr(module, "_hf_hook") or p.is_meta for module in layer.modules() for p in parameters[:1]):
        return "weights are moved between devices"
    return None


def _check_layers(body: Any, ids: Tensor, dtype: torch.dtype) -> None:
    ours, original = _short(body), _copied(_short(body))
    found = regroup(ids, None, None)
    assert not isinstance(found, str)  # plain rows of tokens have a forest
    wide, at = wider(dtype), found.places.flatten()
    weights = torch.linspace(-1, 1, ids.numel() * body.config.get_text_config().hidden_size, device=ids.device).sin()

    def summed(gradient: Tensor) -> Tensor:
        """Of a token of the forest, from `[R, T, H]`."""
        rows = gradient.flatten(0, -2)
        return rows.new_zeros(found.layout.num_tokens, rows.shape[-1]).index_add_(0, at, rows)

    def plain(short: Any, wide: torch.dtype | None = None) -> list[Tensor]:
        run = partial(type(short).forward, short, input_ids=ids, use_cache=False)
        hidden, gradient = _results(short, run, lambda hidden: hidden.flatten(0, 1), weights, wide)
        return [hidden, summed(gradient)]

    if body.config._attn_implementation == NAME:
        packed = partial(packed_output, partial(type(ours).forward, ours), found.input_ids, found.layout)
        hidden, gradient = _results(ours, packed, lambda hidden: hidden[0][at], weights)
        by_us = [hidden, gradient[0]]
    else:
        by_us = plain(ours)
    by_them = plain(original)
    for name, child in original.named_children():
        if child is not original.get_input_embeddings():
            setattr(original, name, child.to(wide))
    with torch.autocast(ids.device.type, enabled=False):
        truth = plain(original, wide)
    names = ("hidden states", "gradients")
    _judge(f"the layers of {type(body).__name__}", names, by_us, by_them, truth, dtype)


def _short(body: Any) -> Any:
    """A decoder of the first layer, with the modules of `body`."""
    short = copy.copy(body)
    short.__dict__["_modules"] = {**body._modules, "layers": body.layers[:1]}
    short.__dict__.pop("forward", None)
    return short


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


def wider(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, else float64."""
    return torch.float32 if dtype.itemsize < 4 else torch.float64


def _judge(
    where: str,
    names: tuple[str, ...],
    ours: list[Tensor],
    original: list[Tensor],
    truth: list[Tensor],
    dtype: torch.dtype,
) -> None:
    for result in map(Compared, names, ours, original, truth):
        problem = _mismatch(result, dtype)
        if problem is not None:
            count(f"self-check of {where} failed")
            raise ValueError(
                f"posttrain's self-check of {where} in {dtype} failed on the first batch: {problem}; nothing was "
                "computed with it. posttrain.disable() gives every model its own modules back; please report this"
            )
    count(f"self-check of {where} passed")


def _mismatch(result: Compared, dtype: torch.dtype) -> str | None:
    """How far ours is off, if it is farther than allowed."""
    ours, original, truth = (x.double() for x in result[1:])
    error = (ours - truth).abs()
    if dtype.itemsize >= 4 and bool((error <= 1e-5 + 1.3e-6 * truth.abs()).all()):
        return None
    rounded = truth.to(dtype)
    allowed = 2 * (original - truth).abs().max() + 2 * (rounded + 0.3 - 0.3 - rounded).double().abs().max()
    if bool(error.max() <= allowed):  # not where it is NaN
        return None
    return f"{result.what} are up to {error.max().item():.3g} from the truth, and {allowed.item():.3g} are allowed"
