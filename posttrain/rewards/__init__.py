"""Reward functions: scores of completions, for on-policy training and evaluation.

Every one has the signature `reward(prompts, completions, completion_ids, **columns) -> list[float | None]`; None means
that it does not apply to that completion.
"""

from posttrain.rewards.code_tests import CodeTests
from posttrain.rewards.exact_match import exact_match
from posttrain.rewards.length import OverlongPenalty
from posttrain.rewards.math_equivalence import math_equivalence
from posttrain.rewards.numeric import numeric
from posttrain.rewards.regex_format import RegexFormat, think_format

__all__ = [
    "CodeTests",
    "OverlongPenalty",
    "RegexFormat",
    "exact_match",
    "math_equivalence",
    "numeric",
    "think_format",
]
