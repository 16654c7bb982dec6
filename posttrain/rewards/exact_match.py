"""Exact match: 1 if the number after the last `Answer:` is the right one, else 0."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_NUMBER = re.compile(r"\s*(-?\d+)(?![\d.,]*\d)")


def exact_match(
    prompts: Sequence[Any],
    completions: Sequence[str | Sequence[Mapping[str, Any]]],
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
    if len(answer) != len(completions):
        raise ValueError(f"exact_match: {len(completions)} completions, but {len(answer)} answers")
    return [
        None if right is None else float(extract(_text(completion)) == (extract(str(right)) or str(right).strip()))
        for completion, right in zip(completions, answer, strict=True)
    ]


def extract(text: str) -> str | None:
    """The number after the last `Answer:` of `text`, or None if no whole number is there."""
    _, marker, rest = text.rpartition("Answer:")
    number = _NUMBER.match(rest) if marker else None
    return number[1] if number else None


def _text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]
