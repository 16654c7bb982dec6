"""Which models of other people's scripts get our ops, and how they lose them again."""

import gc
from typing import Any
from weakref import WeakSet

from torch import nn
from transformers import PreTrainedConfig

from posttrain.integrations.causal_loss import LossOnly, replace_loss, restore_loss
from posttrain.integrations.counting import count, say
from posttrain.integrations.layer_check import Watched, unwatch, watch
from posttrain.integrations.self_check import forget_heads
from posttrain.integrations.versions import installed
from posttrain.models import ModelError, Report, prepare, restore
from posttrain.models.causal_lm import causal_lm, decoder
from posttrain.models.disguise import AttentionName, Disguise, own
from posttrain.models.families import Fused
from posttrain.models.prepare import is_prepared, restore_attention, restore_module

_DEFAULT = ("sdpa", "posttrain")  # attention that nobody asked for by name; another one stays
_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")

_BY_ENABLE = "_posttrain_by_enable"  # in modules with classes of ours by `attach`, so in copies: whether all are

_attached: WeakSet[nn.Module] = WeakSet()


def patch(model: nn.Module, *, allow_untested: bool = False) -> Report:
    """Put our ops into one causal LM of transformers, or one wrapped by PEFT, and print what was replaced.

    Norms, rotary embeddings, MLPs, attention and LoRA layers, as `posttrain.models.prepare` does; `unpatch` undoes it.
    The layers are compared with the original at the first forward (self_check.py).
    The language head of somebody else's trainer is replaced by `enable` only, since the trainer runs it.

    Attention that the model was given by another name than its default, and attention with dropout, stays.

    Raises:
        ValueError: a model that isn't a causal LM (`ModelError`), or an untested version of transformers, PEFT or TRL.
    """
    installed(allow_untested)
    report = _prepare(model)
    watch(decoder(causal_lm(model)))
    print(f"posttrain: {report}")
    return report


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: every module of `model` gets its own class back, and the model the attention it had."""
    causal = causal_lm(model)
    restore_loss(causal)  # which a copy of a model has that `enable` changed
    restore(causal)
    unwatch(decoder(causal))


def attach(model: Any) -> None:
    """Put our ops into a model that a script loads or gives to a trainer, if it is a causal LM of transformers.

    Its layers are compared with the original at the first forward (self_check.py). What is left alone, and why, is
    counted and said.
    """
    obstacle = _obstacle(model)
    if obstacle is not None:
        count(f"model left alone: {obstacle}")
        say(f"posttrain: {obstacle}")
        return
    causal = causal_lm(model)
    by_hand = is_prepared(causal) and not causal.__dict__.get(_BY_ENABLE)  # the script has prepared it itself
    if not is_prepared(causal):
        count("model prepared")
    say(f"posttrain: {_prepare(model)}")
    replace_loss(causal)
    body = decoder(causal)
    watched = isinstance(body, Watched) and _BY_ENABLE not in body.__dict__  # the script has patched it itself
    watch(body)
    _attached.add(causal)
    for module in causal.modules():
        ours = isinstance(module, LossOnly) or (module is body and not watched)
        if ours or (isinstance(module, Fused) and not by_hand):
            module.__dict__[_BY_ENABLE] = not by_hand
    named = causal.config._attn_implementation
    if isinstance(named, AttentionName) and not by_hand:
        named.by_enable = True


def detach() -> None:
    """Restore every model that `attach` has changed, and what was copied of one."""
    known = [part for causal in _attached for module in causal.modules() for part in (module, _config(module))]
    for found in [*known, *gc.get_objects()]:  # the second has no objects that gc.freeze has set aside
        if issubclass(type(found), Disguise) and _BY_ENABLE in found.__dict__:
            restore_loss(found)
            unwatch(found)
            if found.__dict__.pop(_BY_ENABLE):
                restore_module(found)
        elif issubclass(type(found), PreTrainedConfig) and _attention_by_enable(found):
            restore_attention(found)
    forget_heads()
    _attached.clear()


def _config(module: nn.Module) -> Any:
    return getattr(module, "config", None)


def _attention_by_enable(config: Any) -> bool:
    return getattr(getattr(config, "_attn_implementation", None), "by_enable", False)


def _obstacle(model: Any) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        causal = causal_lm(model)
    except ModelError as problem:
        return str(problem)
    name = own(type(causal)).__name__
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return f"{name} is not one of transformers' causal language models"
    if any(parameter.is_meta for parameter in causal.parameters()):
        return f"{name} has no weights yet"
    return None


def _prepare(model: nn.Module) -> Report:
    reason = _attention_stays(causal_lm(model))
    report = prepare(model, attention=reason is None)
    if reason is not None:
        report.kept["attention"] = reason
    return report


def _attention_stays(causal: Any) -> str | None:
    """Why the attention of a model isn't replaced, or None."""
    found = causal.config._attn_implementation
    if found not in _DEFAULT and (found != "eager" or causal._supports_sdpa):  # Gemma 2, capped, has no other default
        return f"the model was given {found!r}"
    text_config = causal.config.get_text_config()
    dropout = next((name for name in _DROPOUT if getattr(text_config, name, None)), None)
    if dropout is not None:
        return f"{dropout} is {getattr(text_config, dropout)}, and packed attention has no dropout"
    return None
