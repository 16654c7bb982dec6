"""Find the parts of a causal LM, whatever wraps it."""

from typing import Any

from torch import nn


class ModelError(ValueError):
    """A model that can't be loaded, prepared or run; the message is one line for the user."""


def causal_lm(model: nn.Module) -> Any:
    """The transformers model inside `model`, which may be wrapped by PEFT."""
    from transformers import PreTrainedModel

    method: Any = getattr(model, "active_peft_config", None)
    if getattr(method, "is_prompt_learning", False):
        raise ModelError(f"PEFT's {method.peft_type.value} puts tokens of its own before every sequence; use LoRA")
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is None:
        raise ModelError(f"{type(inner).__name__} is not a causal language model of transformers")
    return inner


def decoder(causal: Any) -> Any:
    """The part of a causal LM that ends in hidden states."""
    candidates = (causal.base_model, causal.get_decoder(), getattr(causal, "model", causal))
    body = next((part for part in candidates if part is not causal), None)
    if body is None:
        raise ModelError(f"{type(causal).__name__} has no part that gives hidden states without logits")
    return body


def position_limit(causal: Any) -> int | None:
    """How many positions a causal LM has learned embeddings for, or None if it learned none (GPT-2 and OPT did)."""
    body = decoder(causal)
    parts = (body, getattr(body, "decoder", body))
    tables = (getattr(part, name, None) for part in parts for name in ("wpe", "embed_positions"))
    learned = any(isinstance(table, nn.Embedding) for table in tables)
    return causal.config.get_text_config().max_position_embeddings if learned else None
