"""The language head as `linear_logprob` takes it: a weight, and what happens to its logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.models.causal_lm import ModelError, causal_lm


class Head(NamedTuple):
    """logits = softcap tanh(z / softcap), z = (hidden weight^T + scaling hidden A^T B^T + bias) logit_scale.

    Attributes:
        weight: `[V, H]`; the embedding itself where the two are tied.
        bias: `[V]` or None.
        softcap: bound of the logits, or None.
        logit_scale: factor of the logits.
        lora: (A `[R, H]`, B `[V, R]`, scaling) of an adapter on the head, or None.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    lora: tuple[Tensor, Tensor, float] | None

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of a few rows, all of them in memory; `linear_logprob` is for many."""
        z = nn.functional.linear(hidden, self.weight)
        if self.lora is not None:
            lora_a, lora_b, scaling = self.lora
            z = z + scaling * (hidden.to(lora_a.dtype) @ lora_a.T @ lora_b.T).to(z.dtype)
        z = (z if self.bias is None else z + self.bias) * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def head(model: nn.Module) -> Head:
    """The language head of `model`, without running it.

    Raises `ModelError` for a head, or an adapter on it, that is no such formula.
    """
    causal = causal_lm(model)
    if obstacle := getattr(causal, "_posttrain_head_obstacle", None):  # found by prepare
        raise ModelError(obstacle)
    config: Any = causal.config.get_text_config()
    layer, lora = _unwrap(causal.get_output_embeddings())
    if type(layer) is not nn.Linear:
        raise ModelError(
            f"the language head of {type(causal).__name__} is a {type(layer).__name__}, not a Linear layer"
        )
    return Head(
        weight=layer.weight,
        bias=layer.bias,
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=_logit_scale(config),
        lora=lora,
    )


def _logit_scale(config: Any) -> float:
    """Cohere multiplies the logits by `logit_scale`, Granite divides them by `logits_scaling`."""
    return (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)


def _unwrap(layer: Any) -> tuple[Any, tuple[Tensor, Tensor, float] | None]:
    """The layer inside PEFT's wrappers, and the LoRA on it that is switched on."""
    if hasattr(layer, "modules_to_save"):
        trained = not layer.disable_adapters and layer.active_adapter in layer.modules_to_save
        return layer.modules_to_save[layer.active_adapter] if trained else layer.original_module, None
    if not hasattr(layer, "lora_A"):
        return layer, None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not names:
        return layer.get_base_layer(), None
    if len(names) > 1:
        raise ModelError(f"the language head has {len(names)} active adapters ({', '.join(names)}), not one")
    name = names[0]
    lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
    dropout = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0
    if dropout or lora_b.bias is not None or name in getattr(layer, "lora_variant", {}):
        raise ModelError("an adapter on the language head must be plain LoRA: no dropout, bias or variant like DoRA")
    return layer.get_base_layer(), (lora_a.weight, lora_b.weight, layer.scaling[name])
