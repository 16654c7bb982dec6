"""Reward functions: scores of completions, for on-policy training and evaluation.

Every one has the signature `reward(prompts, completions, completion_ids, **columns) -> list[float | None]`; None means
that it does not apply to that completion.
"""

from posttrain.rewards.exact_match import exact_match

__all__ = ["exact_match"]
