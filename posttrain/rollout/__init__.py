"""Generation in the trainer's own process, with the trainer's own modules."""

from posttrain.rollout.engine import Engine
from posttrain.rollout.params import Completion, Piece, SamplingParams

__all__ = ["Completion", "Engine", "Piece", "SamplingParams"]
