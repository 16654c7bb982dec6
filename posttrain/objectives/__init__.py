"""Objectives: pure functions from per-token log-probabilities to a loss."""

from posttrain.objectives.loss import Loss
from posttrain.objectives.supervised import cross_entropy

__all__ = ["Loss", "cross_entropy"]
