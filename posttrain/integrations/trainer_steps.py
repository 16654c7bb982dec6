"""Steps of transformers' own Trainer: padding left out, prefixes shared, and no logits where only the loss counts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor
from transformers.trainer_pt_utils import LabelSmoother

from posttrain.integrations.causal_loss import LossOnly, loss_only
from posttrain.integrations.shared_prefix import shared_where_possible
from posttrain.models.causal_lm import ModelError, causal_lm

_EVALUATING = "_posttrain_evaluating_loss"


def without_logits(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """`Trainer.compute_loss`, in which the model computes the loss alone where no outputs are asked for."""

    @wraps(theirs)
    def compute_loss(
        self: Any,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        arguments = (self, model, inputs, return_outputs, num_items_in_batch)
        causal, asked = _causal(self), return_outputs and not getattr(self, _EVALUATING, False)
        if causal is None or asked or self.compute_loss_func is not None:
            return theirs(*arguments)
        with (
            _smoother_taken(self, inputs) as smoother,
            loss_only(causal, smoother, num_items_in_batch),
            shared_where_possible(causal),
        ):
            return theirs(*arguments)

    return compute_loss


def loss_without_logits(theirs: Callable[..., Any], own: Callable[[Any], bool]) -> Callable[..., Any]:
    """`Trainer.prediction_step`, which drops the outputs where `prediction_loss_only`.

    `own(trainer)` says whether it computes the loss by `Trainer.compute_loss` itself.
    """

    @wraps(theirs)
    def prediction_step(
        self: Any, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        setattr(self, _EVALUATING, prediction_loss_only and own(self))
        try:
            return theirs(self, model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            delattr(self, _EVALUATING)

    return prediction_step


def _causal(trainer: Any) -> Any:
    """The causal LM that `trainer` trains, if its forward can leave out the logits."""
    try:
        causal = causal_lm(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False))
    except ModelError:
        return None
    return causal if isinstance(causal, LossOnly) else None


@contextmanager
def _smoother_taken(trainer: Any, inputs: dict[str, Any]) -> Iterator[LabelSmoother | None]:
    """The label smoother of `trainer`, which it hasn't got inside, so that the labels go to the model."""
    smoother = trainer.label_smoother
    if type(smoother) is not LabelSmoother or "labels" not in inputs:
        yield None
        return
    trainer.label_smoother = None
    try:
        yield smoother
    finally:
        trainer.label_smoother = smoother
