"""The causal-LM loss of transformers without logits, where nobody asks for them.

The forward of a causal LM makes logits [B, T, V] and from those, given labels, its loss: the mean over the labels y
that aren't -100 (or the sum, divided by the `num_items_in_batch` that `Trainer` has counted over micro-batches) of

    -log p_y,    and with label smoothing e   -(1 - e) log p_y - e/V sum_v log p_v = lse - (1 - e) z_y - e mean_v z_v

`linear_logprob` gives log p_y and lse from hidden states; mean_v z_v is one product with the mean of the head's rows.
Whether anybody asks for logits only the trainer knows: `Trainer` doesn't in training, and in evaluation only if it has
something to compute from them. Then the model's forward, which has a class of its own for this (prepare.py says why a
class), returns the loss and None for the logits.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial, wraps
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.trainer_pt_utils import LabelSmoother

from posttrain.integrations.counting import count, say
from posttrain.integrations.self_check import check_head, compute_dtype
from posttrain.integrations.trl_logprob import head_obstacle, mean_of_logits
from posttrain.models.causal_lm import ModelError, decoder
from posttrain.models.disguise import Disguise, disguised, put_on, take_off
from posttrain.models.head import Head, head
from posttrain.ops import linear_logprob

_WISH = "_posttrain_loss_only"
_NOT_FOR_THE_DECODER = ("labels", "shift_labels", "logits_to_keep", "num_items_in_batch", "ignore_index", "return_dict")


@dataclass(frozen=True)
class _Wish:
    """Loss only: with label smoothing, or as the model's own."""

    smoother: LabelSmoother | None
    num_items: Tensor | int | None  # for the smoother


class LossOnly(Disguise):
    """Marks a causal LM whose forward can leave out the logits; `calls` are the names that its own forward uses."""

    calls: tuple[str, ...]


def replace_loss(causal: Any) -> None:
    """Give `causal` a forward that can leave out the logits."""
    if not isinstance(causal, LossOnly):
        put_on(causal, _loss_only_class)


def restore_loss(causal: Any) -> None:
    """Undo `replace_loss`."""
    if isinstance(causal, LossOnly):
        take_off(causal, LossOnly)


@contextmanager
def loss_only(
    causal: Any, smoother: LabelSmoother | None = None, num_items: Tensor | int | None = None
) -> Iterator[None]:
    """Forwards of `causal`, which has had `replace_loss`, are asked for the loss alone if they get labels."""
    setattr(causal, _WISH, _Wish(smoother, num_items))
    try:
        yield
    finally:
        delattr(causal, _WISH)


@cache
def _loss_only_class(original: Any) -> type:
    @wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        wish = getattr(self, _WISH, None)
        if wish is None or kwargs.get("labels") is None:
            return original.forward(self, *args, **kwargs)
        obstacle = "arguments by position" if args else _obstacle(self, wish, kwargs)
        if obstacle is None:
            count("loss by linear_logprob")
            return _without_logits(self, wish, kwargs)
        count(f"loss left to transformers: {obstacle}")
        say(f"posttrain: the loss is left to transformers: {obstacle}")
        return _with_logits(partial(original.forward, self, *args), wish, kwargs)

    return disguised(original, LossOnly, forward=forward, calls=unwrap(original.forward).__code__.co_names)


def _obstacle(causal: Any, wish: _Wish, kwargs: Mapping[str, Any]) -> str | None:
    """Why the loss should come from logits, or None."""
    name = type(causal).__name__
    if causal.loss_function is not ForCausalLMLoss or "loss_function" not in causal.calls:
        return f"{name} has a loss of its own"
    if kwargs.get("output_router_logits", getattr(causal.config, "output_router_logits", False)):
        return f"{name} adds a loss of its router"
    if kwargs.get("logits_to_keep") or kwargs.get("return_dict") is False:
        return "logits_to_keep or return_dict=False asks for logits"
    try:
        found = head(causal)
    except ModelError as problem:
        return str(problem)
    if wish.smoother is not None and (found.softcap is not None or found.lora is not None):
        return "label smoothing of capped logits, or with an adapter on the head, is computed from logits"
    gathered = isinstance(causal.get_output_embeddings(), FSDPModule) and not torch.compiler.is_compiling()
    return None if gathered else head_obstacle(found.weight)


def _with_logits(forward: Callable[..., Any], wish: _Wish, kwargs: dict[str, Any]) -> Any:
    """What the model's own forward gives, with the loss that is wanted."""
    if wish.smoother is None:
        return forward(**kwargs)
    outputs = forward(**{**kwargs, "labels": None})
    outputs["loss"] = wish.smoother(outputs, kwargs["labels"], shift_labels=True, num_items_in_batch=wish.num_items)
    return outputs


def _without_logits(causal: Any, wish: _Wish, kwargs: dict[str, Any]) -> CausalLMOutputWithPast:
    rest = {name: value for name, value in kwargs.items() if name not in _NOT_FOR_THE_DECODER}
    outputs = decoder(causal)(**{**rest, "use_cache": bool(rest.get("use_cache"))})
    targets = _targets(kwargs["labels"], kwargs.get("shift_labels"), kwargs.get("ignore_index", -100))
    num_items = kwargs.get("num_items_in_batch") if wish.smoother is None else wish.num_items
    epsilon = 0.0 if wish.smoother is None else wish.smoother.epsilon

    def total_of(hidden: Tensor) -> Tensor:
        return _total(head(causal), hidden.flatten(0, -2), targets, epsilon)

    total = _in_place_of(causal.get_output_embeddings(), total_of, outputs.last_hidden_state)
    count_of = (targets != -100).sum() if num_items is None else num_items
    return CausalLMOutputWithPast(
        loss=total / (count_of.to(total.device) if isinstance(count_of, Tensor) else count_of),
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def _in_place_of(layer: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of x, as the forward of `layer` if FSDP2 gathers the weights of this layer only for that."""
    sharded: bool = isinstance(layer, FSDPModule)
    if not sharded:
        return function(x)
    layer.forward = function
    try:
        return layer(x)
    finally:
        del layer.forward


def _targets(labels: Tensor, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    """What each token predicts `[B T]`, -100 for nothing."""
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.flatten()
    return targets if ignore_index == -100 else targets.masked_fill(targets == ignore_index, -100)


def _total(found: Head, hidden: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    """The loss of hidden states `[N, H]`, summed over their targets `[N]`."""
    dtype = compute_dtype(hidden)
    hidden, targets = hidden.to(found.weight.device, dtype), targets.to(found.weight.device)
    weight, bias = found.weight.to(dtype), None if found.bias is None else found.bias.to(dtype)
    cap: dict[str, Any] = {"bias": bias, "softcap": found.softcap, "logit_scale": found.logit_scale}
    _check(found._replace(weight=weight, bias=bias).detached(), hidden, targets)
    result = linear_logprob(hidden, weight, targets, lora=found.lora, **cap)
    if not epsilon:
        return -result.logprob.sum()
    smooth = (result.lse - mean_of_logits(hidden, weight, **cap)).masked_fill(targets == -100, 0)
    return epsilon * smooth.sum() - (1 - epsilon) * result.logprob.sum()


def _check(found: Head, hidden: Tensor, targets: Tensor) -> None:
    """Against the log-softmax of the logits, in float32 as ForCausalLMLoss computes it."""
    arguments: dict[str, Any] = {**found._asdict(), "need_entropy": True}
    weight = arguments.pop("weight")

    def ours(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        result = linear_logprob(rows, weight, targets, **arguments)
        assert result.entropy is not None
        return result.logprob, result.entropy

    def theirs(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p = found.logits(rows).float().log_softmax(-1)
        return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    check_head("transformers", found, hidden, targets, 1.0, ours, theirs)
