"""Generation in the trainer's own process, with the trainer's own modules."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.rollout.engine import Engine
    from posttrain.rollout.params import Completion, Piece, SamplingParams
    from posttrain.rollout.sequence import Sequence

_LAZY = {
    "Completion": "posttrain.rollout.params",
    "Engine": "posttrain.rollout.engine",
    "Piece": "posttrain.rollout.params",
    "SamplingParams": "posttrain.rollout.params",
    "Sequence": "posttrain.rollout.sequence",
}
__all__ = ["Completion", "Engine", "Piece", "SamplingParams", "Sequence"]


def __getattr__(name: str) -> Any:
    """Import what is used: the command line reads this package's commands without PyTorch."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'posttrain.rollout' has no attribute {name!r}")
