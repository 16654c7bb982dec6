"""The batches of TRL's trainers without padding, and with common prefixes computed once.

Each trainer has one method in which it runs the policy and one in which it runs the reference; forwards inside these
are regrouped (shared_prefix.py). Completions of one prompt (GRPO, RLOO), both answers of a pair (DPO), and packed
sequences after one system prompt (SFT) have prefixes to share.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any

from posttrain.integrations.shared_prefix import shared_where_possible

BATCHES = {
    "SFTTrainer": ("compute_loss",),
    "DPOTrainer": ("_compute_loss", "compute_ref_log_probs"),
    "KTOTrainer": ("_compute_loss", "compute_ref_log_probs"),
    "GRPOTrainer": ("_get_per_token_logps_and_entropies",),
    "RLOOTrainer": ("_get_per_token_logps_and_entropies",),
}


def methods(trainer: type, names: Mapping[str, Sequence[str]]) -> Iterator[tuple[type, str]]:
    """Of the class of TRL's that `trainer` is or comes from, those of the methods `names`."""
    for cls in trainer.__mro__:
        if cls.__module__.startswith("trl.trainer."):
            yield from ((cls, name) for name in names.get(cls.__name__, ()))


def shared(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """`theirs`, a method of a trainer, whose forwards share prefixes where that is possible."""

    @wraps(theirs)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        models = [model for model in (self.model, getattr(self, "ref_model", None)) if model is not None]
        unwrapped = [self.accelerator.unwrap_model(model, keep_torch_compile=False) for model in models]
        with shared_where_possible(*unwrapped):
            return theirs(self, *args, **kwargs)

    return method
