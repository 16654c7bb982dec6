"""What is replaced in which model family.

The families differ little. Each module gets the forward of one of the classes below, which is mixed into its own
class (see prepare.py), so all of them use the attributes that the transformers module already has:

    norm     y = rms_norm(x) w (Llama, ...) or rms_norm(x) (1 + w) (Gemma)
    mlp      down(act(gate) up), with gate and up from two projections, or from one (Phi-3)
    layer    where a norm follows the addition of a residual, both are one pass: after attention before the MLP in
             pre-norm layers, and the same in Gemma's, which norm on both sides; OLMo 2 norms before it adds, so its
             layers stay as they are
    rope     every family: `apply_rotary_pos_emb` in the attention's forward
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

from torch import Tensor

from posttrain.ops import geglu, rms_norm, rope, swiglu

Normed = Tensor | tuple[Tensor, Tensor]


class Fused:
    """Marks a module whose forward is replaced; `kind` names by what."""

    kind: str


class RMSNorm(Fused):
    """Norm scaled by its weight; with a residual, (norm(x + residual), x + residual)."""

    kind = "rms_norm"

    def forward(self: Any, hidden_states: Tensor, residual: Tensor | None = None) -> Normed:
        return _add_norm(hidden_states, self.weight, self.variance_epsilon, residual)


class OffsetRMSNorm(Fused):
    """Norm scaled by 1 + its weight."""

    kind = "rms_norm"

    def forward(self: Any, x: Tensor, residual: Tensor | None = None) -> Normed:
        return _add_norm(x, 1.0 + self.weight.float(), self.eps, residual)


def _add_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Normed:
    """`rms_norm`; under autocast x may be narrower than the residual stream that it joins."""
    return rms_norm(x if residual is None else x.to(residual.dtype), weight, eps, residual)


class GatedMLP(Fused):
    """`gated` is the op for the model's activation."""

    gated: Callable[[Tensor, Tensor], Tensor]

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))


class MergedGatedMLP(GatedMLP):
    """Gate and up come from one projection."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(self.gated(gate, up))


class Layer(Fused):
    """A decoder layer; `norm` names the norm that takes the residual too."""

    kind = "residual + norm"
    norm: str


class PreNormLayer(Layer):
    """hidden + attention(norm(hidden)), then the same with the MLP."""

    norm = "post_attention_layernorm"

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        normed, total = self.post_attention_layernorm(attended, residual=hidden_states)
        return total + self.mlp(normed)


class DropoutPreNormLayer(PreNormLayer):
    """The same with dropout before each addition."""

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        normed, total = self.post_attention_layernorm(self.resid_attn_dropout(attended), residual=hidden_states)
        return total + self.resid_mlp_dropout(self.mlp(normed))


class SandwichNormLayer(Layer):
    """A norm before and after attention and MLP."""

    norm = "pre_feedforward_layernorm"

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        attended = self.post_attention_layernorm(attended)
        normed, total = self.pre_feedforward_layernorm(attended, residual=hidden_states)
        return total + self.post_feedforward_layernorm(self.mlp(normed))


class RotaryAttention(Fused):
    """The attention's own forward, with its rotary embedding replaced."""

    kind = "rope"


def with_rope(forward: FunctionType) -> FunctionType:
    """A copy of an attention's `forward` in which the name `apply_rotary_pos_emb` means our op."""
    names = {**forward.__globals__, "apply_rotary_pos_emb": rope}
    copy = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


@dataclass(frozen=True)
class Family:
    """The replacements of one family; a layer of None stays."""

    norm: type[Fused] = RMSNorm
    mlp: type[GatedMLP] = GatedMLP
    layer: type[Layer] | None = PreNormLayer


# By the name of the folder in transformers.models.
FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "mistral": Family(),
    "gemma2": Family(norm=OffsetRMSNorm, layer=SandwichNormLayer),
    "gemma3": Family(norm=OffsetRMSNorm, layer=SandwichNormLayer),
    "phi3": Family(mlp=MergedGatedMLP, layer=DropoutPreNormLayer),
    "olmo2": Family(layer=None),
}

# By the name of the activation in the model's configuration: what is counted in the report, and the op.
ACTIVATIONS: Mapping[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": ("swiglu", swiglu),
    "swish": ("swiglu", swiglu),
    "gelu_pytorch_tanh": ("geglu", geglu),
    "gelu": ("geglu", partial(geglu, approximate="none")),
}
