"""What is replaced in which model family.

The families differ little. Each module gets the forward of one of the classes below, which is mixed into its own
class (see prepare.py), so all of them use the attributes that the transformers module already has:

    norm     y = rms_norm(x) w (Llama, ...) or rms_norm(x) (1 + w) (Gemma)
    mlp      down(act(gate) up), with gate and up from two projections, or from one (Phi-3)
    layer    where a norm follows the addition of a residual, both are one pass: after attention before the MLP in
             pre-norm layers, and the same in Gemma's, which norm on both sides; OLMo 2 norms before it adds, so its
             layers stay as they are
    rope     every family: `apply_rotary_pos_emb` in the attention's forward
    lora     where PEFT's adapters are active, q, k and v are one op, and so is the MLP; each takes in the norm before
             it, so that the normed states aren't kept. Every other adapted layer is an op by itself
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from posttrain.models.causal_lm import ModelError
from posttrain.models.disguise import Disguise
from posttrain.models.lora_layers import Group, absorbed, adapted, drawn, halves, hooked, together
from posttrain.models.quantized import NF4Linear
from posttrain.ops import geglu, lora_linear, lora_mlp, lora_qkv, nf4_linear, rms_norm, rope, swiglu
from posttrain.ops.nf4_weight import NF4Weight

Scale = tuple[Tensor, float]  # weight and eps of a norm
Normed = Tensor | tuple[Tensor, Tensor]


class Fused(Disguise):
    """Marks a module whose forward is replaced; `kind` names by what."""

    kind: str


class Norm(Fused):
    """A norm; with a residual, (norm(x + residual), x + residual)."""

    kind = "rms_norm"

    def scale(self) -> Scale:
        """Its weight and eps, as `rms_norm` takes them."""
        raise NotImplementedError

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Normed:
        return _add_norm(x, *self.scale(), residual)


class RMSNorm(Norm):
    """Norm scaled by its weight."""

    def scale(self: Any) -> Scale:
        return self.weight, self.variance_epsilon


class OffsetRMSNorm(Norm):
    """Norm scaled by 1 + its weight."""

    def scale(self: Any) -> Scale:
        return 1.0 + self.weight.float(), self.eps


def _add_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Normed:
    """`rms_norm`; under autocast x may be narrower than the residual stream that it joins."""
    return rms_norm(x if residual is None else x.to(residual.dtype), weight, eps, residual)


class GatedMLP(Fused):
    """`gated` is the op for the model's activation, which is called `activation` in `lora_mlp`."""

    lora_kind = "lora_mlp"
    gated: Callable[[Tensor, Tensor], Tensor]
    activation: Literal["silu", "gelu", "gelu_tanh"]

    def lora(self: Any) -> Group | None:
        """Gate, up and down, where adapters are active in them and one op takes all."""
        return together(absorbed(self.gate_proj), absorbed(self.up_proj), absorbed(self.down_proj))

    def forward(self: Any, x: Tensor, inner: "Inner | None" = None) -> Tensor:
        """The MLP of x or, with `inner`, of its norm of x."""
        group, norm = inner or (self.lora(), None)
        if group is not None and group.takes(x):
            gate, up, down = group.layers
            return lora_mlp(x, gate, up, down, self.activation, norm=norm, **drawn(group.dropout))
        return self.plain(x if norm is None else rms_norm(x, *norm))

    def plain(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))


class MergedGatedMLP(GatedMLP):
    """Gate and up come from one projection."""

    def lora(self: Any) -> Group | None:
        return together(*halves(absorbed(self.gate_up_proj)), absorbed(self.down_proj))

    def plain(self: Any, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.gated(gate, up))


class RotaryAttention(Fused):
    """The attention's own forward, `own`, with its rotary embedding replaced and, for LoRA, its projections."""

    kind = "rope"
    lora_kind = "lora_qkv"
    own: Callable[..., tuple[Tensor, Tensor | None]]

    def lora(self: Any) -> Group | None:
        """q, k and v, where adapters are active in them and one op takes all."""
        return together(absorbed(self.q_proj), absorbed(self.k_proj), absorbed(self.v_proj))

    def forward(
        self: Any, hidden_states: Tensor, *arguments: Any, inner: "Inner | None" = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The attention of the states or, with `inner`, of its norm of them.

        With `turns`, as when the engine runs the modules, q and k aren't rotated: the attention function does it, and
        gets the position embeddings, `angles`.
        """
        if kwargs.pop("turns", False):
            kwargs |= {"angles": kwargs["position_embeddings"], "position_embeddings": (None, None)}
        group, norm = inner or (self.lora(), None)
        if group is not None and group.takes(hidden_states):
            q, k, v = group.layers
            projected = lora_qkv(hidden_states, q, k, v, norm=norm, **drawn(group.dropout))
            return self.own(_Projected(self, *projected), hidden_states, *arguments, **kwargs)
        return self.own(self, hidden_states if norm is None else rms_norm(hidden_states, *norm), *arguments, **kwargs)


class MergedRotaryAttention(RotaryAttention):
    """q, k and v come from one projection."""

    def lora(self) -> Group | None:
        return None


class _Projected:
    """Stands for an attention module in its forward, where q, k and v are already there."""

    def __init__(self, attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._attention = attention
        self.q_proj, self.k_proj, self.v_proj = (lambda _: q), (lambda _: k), (lambda _: v)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)


class LoraLinear(Fused):
    """PEFT's LoRA layer by `lora_linear`, where that computes what its adapters are."""

    kind = "lora_linear"

    def forward(self: Any, x: Tensor, *arguments: Any, **kwargs: Any) -> Tensor:
        found = "it has other arguments" if arguments or kwargs else adapted(self)
        if isinstance(found, str) or not found.takes(x):
            return super().forward(x, *arguments, **kwargs)  # type: ignore[misc]
        return lora_linear(x, *found.layer, magnitude=found.magnitude, **drawn(found.dropout))

    def merge(self: Any, *arguments: Any, **kwargs: Any) -> None:
        if isinstance(self.get_base_layer(), NF4Linear):
            raise ModelError(
                "an adapter can't be merged into 4-bit weights; call posttrain.models.dequantize(model) first, "
                "or load the adapter without load_in_4bit"
            )
        super().merge(*arguments, **kwargs)  # type: ignore[misc]


class BitsandbytesLinear(Fused):
    """bitsandbytes' 4-bit layer by `nf4_linear`, where its weight is in NF4."""

    kind = "nf4_linear"

    def forward(self: Any, x: Tensor) -> Tensor:
        found = adapted(self)
        if isinstance(found, str) or not found.takes(x):
            return super().forward(x)  # type: ignore[misc]
        assert isinstance(found.layer.weight, NF4Weight)
        return nf4_linear(x, found.layer.weight, found.layer.bias)


class Layer(Fused):
    """A decoder layer; `norm` names the norm before the MLP, which takes the residual too."""

    kind = "residual + norm"
    norm: str

    def attend(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """attention(norm(hidden))."""
        attention, norm = self.self_attn, self.input_layernorm
        if inner := _joined(norm, attention):
            return attention(hidden_states=hidden_states, inner=inner, **kwargs)[0]
        return attention(hidden_states=norm(hidden_states), **kwargs)[0]

    def feed(self: Any, attended: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(mlp(norm(total)), total), where total = hidden + attended."""
        norm = getattr(self, self.norm)
        if inner := _joined(norm, self.mlp):
            total = hidden_states + attended
            return self.mlp(total, inner), total
        if hooked(norm):  # hooks see the norm of transformers: of one tensor
            total = hidden_states + attended
            return self.mlp(norm(total)), total
        normed, total = norm(attended, residual=hidden_states)
        return self.mlp(normed), total


class Inner(NamedTuple):
    """What the op of an attention or an MLP computes at once: its adapted layers, and the norm before them."""

    group: Group
    norm: Scale


def _joined(norm: Any, reader: Any) -> Inner | None:
    """`reader`, an attention or an MLP, together with the norm before it, if they are one op."""
    if not isinstance(norm, Norm) or not isinstance(reader, GatedMLP | RotaryAttention):
        return None
    group = reader.lora()
    return None if group is None or hooked(norm, reader) else Inner(group, norm.scale())


class PreNormLayer(Layer):
    """hidden + attention(norm(hidden)), then the same with the MLP."""

    norm = "post_attention_layernorm"

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        fed, total = self.feed(self.attend(hidden_states, **kwargs), hidden_states)
        return total + fed


class DropoutPreNormLayer(Layer):
    """The same with dropout before each addition."""

    norm = "post_attention_layernorm"

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended = self.resid_attn_dropout(self.attend(hidden_states, **kwargs))
        fed, total = self.feed(attended, hidden_states)
        return total + self.resid_mlp_dropout(fed)


class SandwichNormLayer(Layer):
    """A norm before and after attention and MLP."""

    norm = "pre_feedforward_layernorm"

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended = self.post_attention_layernorm(self.attend(hidden_states, **kwargs))
        fed, total = self.feed(attended, hidden_states)
        return total + self.post_feedforward_layernorm(fed)


def _rope(
    q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """`rope`; without angles nothing."""
    return (q, k) if cos is None or sin is None else rope(q, k, cos, sin, unsqueeze_dim)


def with_rope(forward: FunctionType) -> FunctionType:
    """A copy of an attention's `forward` in which the name `apply_rotary_pos_emb` means our op."""
    names = {**forward.__globals__, "apply_rotary_pos_emb": _rope}
    copy = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


@dataclass(frozen=True)
class Family:
    """The replacements of one family; a layer of None stays."""

    norm: type[Norm] = RMSNorm
    mlp: type[GatedMLP] = GatedMLP
    attention: type[RotaryAttention] = RotaryAttention
    layer: type[Layer] | None = PreNormLayer


# By the name of the folder in transformers.models.
FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "mistral": Family(),
    "gemma2": Family(norm=OffsetRMSNorm, layer=SandwichNormLayer),
    "gemma3": Family(norm=OffsetRMSNorm, layer=SandwichNormLayer),
    "phi3": Family(mlp=MergedGatedMLP, attention=MergedRotaryAttention, layer=DropoutPreNormLayer),
    "olmo2": Family(layer=None),
}

# By the name of the activation in the model's configuration: what is counted in the report, the op, and the name of the
# activation in `lora_mlp`.
ACTIVATIONS: Mapping[str, tuple[str, Callable[[Tensor, Tensor], Tensor], str]] = {
    "silu": ("swiglu", swiglu, "silu"),
    "swish": ("swiglu", swiglu, "silu"),
    "gelu_pytorch_tanh": ("geglu", geglu, "gelu_tanh"),
    "gelu": ("geglu", partial(geglu, approximate="none"), "gelu"),
}
