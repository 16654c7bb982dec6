"""TRL's language head by `linear_logprob`.

All of TRL's trainers get the log-probabilities of tokens from one function of hidden states [N, H], the head's weight
[V, H] and targets [N], called in one place (`trl.trainer.utils`, since 1.16). It has up to five outputs. With logits z
at temperature T and p = softmax(z),

    log_probs, entropy, is_top1    are those of linear_logprob
    mean_logits = 1/V sum_v z_v    = (x . mean_v W_v + mean_v bias_v) logit_scale / T      without a softcap
    log_sum_sq_probs = log sum_v p_v^2

For the last, let p' be the distribution at temperature T / 2, so that p'_v = p_v^2 / sum_u p_u^2 for every token v.
With v = y, the target, log sum_u p_u^2 = 2 log p_y - log p'_y: a second call of linear_logprob. The last two and
is_top1 have no gradient, as in TRL.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from posttrain.integrations.counting import count, say
from posttrain.integrations.self_check import check_head, compute_dtype
from posttrain.models.head import Head
from posttrain.ops import linear_logprob

_SLAB = 1 << 23  # logits at a time, for the mean of capped ones

Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Options(NamedTuple):
    """What TRL's function takes besides tensors."""

    temperature: float
    chunk_size: int
    final_logit_softcapping: float | None = None
    logit_scale: float = 1.0
    outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class LanguageHead:
    """Stands in for TRL's autograd function: `apply` takes its arguments and gives its five outputs."""

    def __init__(self, theirs: Callable[..., Outputs]) -> None:
        self.theirs = theirs

    def apply(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: Any, **named: Any
    ) -> Outputs:
        """(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1), each `[N]`; None where it isn't in `outputs`.

        The other arguments are `Options`, by position or by name. Under autocast in its dtype, as TRL computes it. What
        `_obstacle` names is computed by TRL.
        """
        given = Options(*options, **named)
        dtype = compute_dtype(hidden)
        obstacle = _obstacle(weight, dtype)
        if obstacle is not None:
            count(f"language head left to TRL: {obstacle}")
            say(f"posttrain: the language head is left to TRL: {obstacle}")
            return self.theirs(hidden, weight, bias, targets, *given)
        count("language head by linear_logprob")
        bias = None if bias is None else bias.to(dtype)
        head = Head(weight.to(dtype), bias, given.final_logit_softcapping, given.logit_scale, None)
        hidden = hidden.to(dtype)
        self._check(head.detached(), hidden, targets, given)
        return _outputs(head, hidden, targets, given)

    def _check(self, head: Head, hidden: Tensor, targets: Tensor, given: Options) -> None:
        given = given._replace(outputs=("entropy",))

        def ours(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            return _outputs(head, rows, targets, given)[:2]  # type: ignore[return-value]

        def theirs(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            return self.theirs(rows, head.weight, head.bias, targets, *given)[:2]  # type: ignore[return-value]

        check_head("TRL", head, hidden, targets, given.temperature, ours, theirs)


class PairHead(LanguageHead):
    """The same for TRL before 1.15: two outputs, and at first no bias."""

    def __init__(self, theirs: Any) -> None:
        self.takes_bias = "bias" in signature(theirs.forward).parameters
        super().__init__(lambda hidden, weight, bias, *rest: theirs.apply(hidden, weight, *self._bias(bias), *rest[:5]))

    def _bias(self, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        return (bias,) if self.takes_bias else ()

    def apply(self, hidden: Tensor, weight: Tensor, *rest: Any) -> Any:
        """(log_probs, entropy), each `[N]`."""
        bias, targets, *options = rest if self.takes_bias else (None, *rest)
        return super().apply(hidden, weight, bias, targets, *options, outputs=("entropy",))[:2]


def language_head(theirs: Any) -> LanguageHead:
    """What stands in for `theirs`, the autograd function of this release of TRL."""
    return LanguageHead(theirs.apply) if "outputs" in signature(theirs.forward).parameters else PairHead(theirs)


def _obstacle(weight: Tensor, dtype: torch.dtype) -> str | None:
    """Why `linear_logprob` shouldn't compute this, or None."""
    if weight.dtype.itemsize < dtype.itemsize:
        return f"the {weight.dtype} head would need a copy in {dtype}"
    return head_obstacle(weight)


def head_obstacle(weight: Tensor) -> str | None:
    """Why `linear_logprob` can't take this head, or None."""
    if weight.device.type not in ("cpu", "cuda"):
        return f"there are no kernels for {weight.device.type}"
    if hasattr(weight, "ds_id"):
        return "DeepSpeed ZeRO-3 has the head gathered only during the forward"
    if isinstance(weight, DTensor):
        return "the head is divided among processes (DTensor), and gathered only while the model runs it"
    return None


def _outputs(head: Head, hidden: Tensor, targets: Tensor, given: Options) -> Outputs:
    weight, bias, softcap, logit_scale, _ = head
    temperature, outputs = given.temperature, given.outputs
    cap: dict[str, Any] = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale}
    ours = linear_logprob(hidden, weight, targets, temperature=temperature, need_entropy="entropy" in outputs, **cap)
    log_sum_sq_probs = mean_logits = None
    with torch.no_grad():
        if "log_sum_sq_probs" in outputs:
            squared = linear_logprob(hidden, weight, targets, temperature=temperature / 2, **cap)
            log_sum_sq_probs = 2 * ours.logprob - squared.logprob
        if "mean_logits" in outputs:
            mean_logits = mean_of_logits(hidden, weight, bias, softcap, logit_scale) / temperature
    return ours.logprob, ours.entropy, log_sum_sq_probs, mean_logits, ours.is_top1 if "is_top1" in outputs else None


def mean_of_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Tensor:
    """Mean over the vocabulary of the logits `[N]`, before the temperature, in float32 (float64 for float64)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        if softcap is None:
            mean = hidden.to(wide) @ weight.mean(0, dtype=wide)
            return (mean if bias is None else mean + bias.mean(dtype=wide)) * logit_scale
        total = hidden.new_zeros(len(hidden), dtype=wide)
        step = max(_SLAB // max(len(hidden), 1), 1)
        for start in range(0, len(weight), step):
            logits = hidden.to(wide) @ weight[start : start + step].to(wide).T  # [N, slab]
            logits = (logits if bias is None else logits + bias[start : start + step]) * logit_scale
            total += (softcap * torch.tanh(logits / softcap)).sum(-1)
        return total / len(weight)
