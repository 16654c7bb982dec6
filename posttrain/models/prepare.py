"""Put our ops into a Hugging Face causal LM, in place, and take them out again.

Every replaced module gets a class of its own: a subclass of the class it has, with the forward of families.py mixed
in and the same name. Parameters, buffers, hooks, state-dict keys and saved checkpoints stay as they are, other models
in the process are untouched, and `restore` only has to give the old class back. A subclass, and not a forward bound
to the instance, because transformers wraps a layer's forward for activation checkpointing when the class is made.
Copies keep our classes, pickles hold the original ones (disguise.py).
"""

import inspect
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from torch import nn

from posttrain.models.causal_lm import causal_lm
from posttrain.models.disguise import AttentionName, Mark, disguised, own, put_on, take_off
from posttrain.models.families import (
    ACTIVATIONS,
    FAMILIES,
    BitsandbytesLinear,
    Fused,
    GatedMLP,
    LoraLinear,
    RotaryAttention,
    with_rope,
)
from posttrain.models.lora_layers import adapted, is_adapter, is_bitsandbytes, is_lora
from posttrain.models.trial import obstacle_to_head, obstacle_to_packing


@dataclass
class Report:
    """What `prepare` did.

    Attributes:
        architecture: class of the model.
        replaced: how many modules of each kind use our ops.
        kept: what was not replaced, and why.
    """

    architecture: str
    replaced: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        replaced = ", ".join(f"{kind} ({count})" for kind, count in sorted(self.replaced.items())) or "nothing"
        lines = [f"{self.architecture}: replaced {replaced}"]
        lines += [f"  not replaced: {what}: {why}" for what, why in self.kept.items()]
        return "\n".join(lines)


def prepare(model: nn.Module, *, attention: bool = True) -> Report:
    """Replace norms, rotary embeddings, MLPs, attention and LoRA layers of `model`, in place, by our ops.

    Hidden states, gradients and checkpoints stay the same. An architecture outside `FAMILIES` keeps its modules; its
    attention is replaced if a trial shows that packed sequences then give what they give alone. Doing it twice
    changes nothing.

    Adapters may be added before or after. `add_lora` and `add_adapter` see to theirs; layers that PEFT adds later go
    into the ops of attention and MLP, and elsewhere run PEFT's code until `prepare` is called again. A LoRA layer that
    the ops don't compute keeps PEFT's code and is named in the report.

    Args:
        model: a causal LM of transformers, or one wrapped by PEFT.
        attention: False leaves the attention as it is; `hidden_states` then pads.
    """
    causal = causal_lm(model)
    report = Report(type(causal).__name__)
    causal._posttrain_prepared = Mark()
    text_config = causal.config.get_text_config()
    known = _family(causal) is not None and text_config is causal.config
    for module in causal.modules():
        _replace(module, text_config, report)
    replace_adapters(causal, report)
    report.replaced = dict(Counter(kind for module in causal.modules() for kind in _kinds(module)))
    report.kept |= _replaced_by_others(causal)
    if attention:
        _replace_attention(causal, known, report)
    if not any(isinstance(module, Fused) and not isinstance(module, _ANYWHERE) for module in causal.modules()):
        report.kept["modules"] = f"{report.architecture} is not one of {', '.join(FAMILIES)}"
    if not known and causal.__dict__.get("_posttrain_head_obstacle", "") is not None:
        causal._posttrain_head_obstacle = obstacle_to_head(causal)
        if causal._posttrain_head_obstacle:
            report.kept["language head"] = causal._posttrain_head_obstacle
    return report


def replace_adapters(causal: Any, report: Report | None = None) -> None:
    """Give the LoRA layers and the 4-bit layers of bitsandbytes their replacements' classes."""
    kept: dict[str, list[str]] = {}
    for name, module in causal.named_modules():
        if isinstance(module, _ANYWHERE):
            pass
        elif is_lora(module):
            put_on(module, partial(_fused, replacement=LoraLinear))
        elif is_bitsandbytes(module):
            put_on(module, partial(_fused, replacement=BitsandbytesLinear))
        elif is_adapter(module):
            kept.setdefault(f"there is no op for a {type(module).__name__} of PEFT", []).append(name)
        if isinstance(module, _ANYWHERE) and isinstance(reason := adapted(module), str):
            kept.setdefault(reason, []).append(name)
    if report is not None:
        report.kept |= {_first_of(names): reason for reason, names in kept.items()}


def is_prepared(model: nn.Module) -> bool:
    """Whether `prepare` has seen `model`, or the model that it wraps."""
    return any(bool(module.__dict__.get("_posttrain_prepared")) for module in model.modules())


def restore(model: nn.Module) -> None:
    """Undo `prepare`: every module gets its own class back, and the model the attention it had."""
    causal = causal_lm(model)
    for module in causal.modules():
        restore_module(module)
        restore_attention(getattr(module, "config", None))


def restore_module(module: Any) -> None:
    """Give `module` alone its own class back, without the attention in its configuration."""
    if isinstance(module, Fused):
        take_off(module, Fused)
    for mark in [name for name in module.__dict__ if name.startswith("_posttrain")]:
        del module.__dict__[mark]


def restore_attention(config: Any) -> None:
    """Give a configuration the attention that it had before `prepare`."""
    found = getattr(config, "_attn_implementation", None)
    if isinstance(found, AttentionName):
        config._attn_implementation = found.before


def _replace(module: Any, config: Any, report: Report) -> None:
    """Give `module` its replacement's class, or note in the report why not."""
    name = _family(module)
    if name is None or isinstance(module, Fused):
        return
    family: Any = FAMILIES[name]
    original = own(type(module))
    if original.__name__.endswith("RMSNorm"):
        put_on(module, partial(_fused, replacement=family.norm))
    elif original.__name__.endswith("MLP"):
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        if activation in ACTIVATIONS:
            put_on(module, partial(_fused, replacement=family.mlp, activation=activation))
        else:
            report.kept["mlp"] = f"there is no op for the activation {activation!r}"
    elif original.__name__.endswith("Attention"):
        if "apply_rotary_pos_emb" in _plain_forward(original).__code__.co_names:
            put_on(module, partial(_fused, replacement=family.attention))
        else:
            report.kept["rope"] = f"{original.__name__}.forward doesn't call apply_rotary_pos_emb"
    elif original.__name__.endswith("DecoderLayer"):
        if family.layer is None:
            report.kept["residual + norm"] = f"{name} norms before it adds the residual"
        elif _family(norm := getattr(module, family.layer.norm)) != name:
            report.kept["residual + norm"] = f"{family.layer.norm} is a {type(norm).__name__}, which takes no residual"
        else:
            put_on(module, partial(_fused, replacement=family.layer))


def _kinds(module: Any) -> list[str]:
    """What `module` counts as in the report."""
    if not isinstance(module, Fused) or _bypassed(module):
        return []
    if isinstance(module, _ANYWHERE) and isinstance(adapted(module), str):
        return []
    if isinstance(module, GatedMLP | RotaryAttention) and module.lora() is not None:
        return [module.kind, module.lora_kind]
    return [module.kind]


def _replaced_by_others(causal: nn.Module) -> dict[str, str]:
    """Kinds of modules some of which another library has given a forward, and how many."""
    fused = [module for module in causal.modules() if isinstance(module, Fused)]
    all_of = Counter((module.kind, type(module).__name__) for module in fused)
    theirs = Counter((module.kind, type(module).__name__) for module in fused if _bypassed(module))
    what = "another library has replaced the forward of"
    return {kind: f"{what} {n} of {all_of[kind, name]} {name} modules" for (kind, name), n in theirs.items()}


def _bypassed(module: Any) -> bool:
    """Whether `module` has a forward on itself, as Liger gives it, that isn't that of its class."""
    forward = module.__dict__.get("_old_forward") or module.__dict__.get("forward")  # Accelerate's calls the first
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _first_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _family(module: nn.Module) -> str | None:
    """The family whose modelling file defines the class of `module`."""
    home = own(type(module)).__module__
    return next((name for name in FAMILIES if home == f"transformers.models.{name}.modeling_{name}"), None)


_ANYWHERE = (LoraLinear, BitsandbytesLinear)  # whatever the family


@cache
def _fused(original: Any, replacement: Any, activation: str | None = None) -> type:
    """A subclass of `original` with the forward of `replacement`."""
    body: dict[str, Any] = {}
    if activation is not None:
        body["kind"], op, body["activation"] = ACTIVATIONS[activation]
        body["gated"] = staticmethod(op)
    if issubclass(replacement, RotaryAttention):
        body["own"] = staticmethod(with_rope(_plain_forward(original)))
    return disguised(original, replacement, **body)


def _plain_forward(cls: type) -> Any:
    return inspect.unwrap(cls.__dict__["forward"])


def _replace_attention(causal: Any, known: bool, report: Report) -> None:
    from posttrain.models.attention import NAME

    before = causal.config._attn_implementation
    obstacle = None if known or isinstance(before, AttentionName) else obstacle_to_packing(causal, NAME)
    if obstacle:
        report.kept["attention"] = obstacle
        return
    report.replaced["attention"] = causal.config.get_text_config().num_hidden_layers
    if before != NAME:
        causal.set_attn_implementation(NAME)
        named = AttentionName(NAME, before)
        configs: list[Any] = [getattr(module, "config", None) for module in causal.modules()]
        for config in configs:
            if getattr(config, "_attn_implementation", None) == NAME:
                config._attn_implementation = named
