"""Exact match: 1 if the number after the last `Answer:` is the right one, else 0."""

import re
from collections.abc import Sequence
from typing import Any

from posttrain.rewards.text import Completion, check_column, text_of

_NUMBER = re.compile(r"\s*(-?\d+)(?![\d.,]*\d)")


def exact_match(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    answer: Sequence[str | int | None],
    **columns: Any,
) -> list[float | None]:
    """Score completions against the column `answer`.

    Args:
        prompts: not looked at.
        completions: texts, or lists of chat messages, of which the last counts.
        completion_ids: not looked at.
        answer: the right number of each, or a text that ends in `Answer: N`; None where there is none.
        columns: not looked at.

    Returns:
        1.0, 0.0, or None where `answer` is None.
    """
    check_column("answers", answer, completions, "exact_match")
    return [
        None if right is None else float(extract(text_of(completion)) == (extract(str(right)) or str(right).strip()))
        for completion, right in zip(completions, answer, strict=True)
    ]


def extract(text: str) -> str | None:
    """The number after the last `Answer:` of `text`, or None if no whole number is there."""
    _, marker, rest = text.rpartition("Answer:")
    number = _NUMBER.match(rest) if marker else None
    return number[1] if number else None
