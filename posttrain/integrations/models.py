"""Which models of other people's scripts get our ops, and how they lose them again."""

from typing import Any
from weakref import WeakSet

from torch import nn

from posttrain.integrations.causal_loss import replace_loss, restore_loss
from posttrain.integrations.counting import count, say
from posttrain.integrations.self_check import forget_heads, unwatch, watch
from posttrain.integrations.versions import installed
from posttrain.models import ModelError, Report, prepare, restore
from posttrain.models.causal_lm import causal_lm, decoder
from posttrain.models.prepare import is_prepared

_DEFAULT = ("sdpa", "posttrain")  # attention that nobody asked for by name; another one stays
_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")

_prepared: WeakSet[nn.Module] = WeakSet()
_attached: WeakSet[nn.Module] = WeakSet()  # those, and models that the script has prepared itself


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
    if causal not in _prepared and not is_prepared(causal):  # not one that the script has prepared itself
        count("model prepared")
        _prepared.add(causal)
    say(f"posttrain: {_prepare(model)}")
    replace_loss(causal)
    watch(decoder(causal))
    _attached.add(causal)


def detach() -> None:
    """Restore every model that `attach` has changed."""
    for causal in list(_attached):
        restore_loss(causal)
        unwatch(decoder(causal))
    for causal in list(_prepared):
        restore(causal)
    forget_heads()
    _attached.clear()
    _prepared.clear()


def _obstacle(model: Any) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        causal = causal_lm(model)
    except ModelError as problem:
        return str(problem)
    name = type(causal).__name__
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
