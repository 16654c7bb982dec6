"""The language head as `linear_logprob` takes it: a weight, and what happens to its logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.models.causal_lm import ModelError, causal_lm
from posttrain.models.disguise import own
from posttrain.models.lora_layers import adapted


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

    def detached(self) -> "Head":
        """The same numbers without gradients, whatever the model's parameters become."""
        lora = None if self.lora is None else (self.lora[0].detach(), self.lora[1].detach(), self.lora[2])
        bias = None if self.bias is None else self.bias.detach()
        return self._replace(weight=self.weight.detach(), bias=bias, lora=lora)

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
    if own(type(layer)) is not nn.Linear:
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
    found = adapted(layer)
    if isinstance(found, str) or found.dropout or found.magnitude is not None:
        reason = found if isinstance(found, str) else "it has dropout" if found.dropout else "it is DoRA"
        raise ModelError(f"the adapter on the language head must be plain LoRA without dropout: {reason}")
    base, lora_a, lora_b = layer.get_base_layer(), found.layer.lora_a, found.layer.lora_b
    if lora_a is None or lora_b is None:
        return base, None
    assert isinstance(found.layer.scaling, float)
    return base, (lora_a, lora_b, found.layer.scaling)
