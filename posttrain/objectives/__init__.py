"""Objectives: pure functions from per-token log-probabilities to a loss."""

from posttrain.objectives.advantage import group_advantages
from posttrain.objectives.loss import Loss
from posttrain.objectives.policy import policy_loss
from posttrain.objectives.preference import Pairs, Preference, preference_loss, sum_answers
from posttrain.objectives.supervised import cross_entropy

__all__ = [
    "Loss",
    "Pairs",
    "Preference",
    "cross_entropy",
    "group_advantages",
    "policy_loss",
    "preference_loss",
    "sum_answers",
]
