"""Exact match: 1 if the number after the last `Answer:` is the right one, else 0."""

import re
from collections.abc import Sequence
from typing import Any

from posttrain.rewards.text import Completion, check_column, text_of

_NUMBER = re.compile(r"\s*([+-]?\d+)(?![\d.,]*\d)")


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
        answer: the right number of each, or a text that ends in `Answer: N`; None or an empty
            text where there is none.
        columns: not looked at.

    Returns:
        1.0, 0.0, or None where there is no right answer.
    """
    check_column("answers", answer, completions, "exact_match")
    return [
        None if (wanted := _wanted(right)) is None else float(extract(text_of(completion)) == wanted)
        for completion, right in zip(completions, answer, strict=True)
    ]


def _wanted(right: str | int | None) -> str | None:
    text = "" if right is None else str(right).strip()
    alone = f"Answer: {text}" if re.fullmatch(r"[+-]?\d+", text) else text
    return (extract(alone) or text) if text else None


def extract(text: str) -> str | None:
    """The number after the last `Answer:` of `text`, +7 and 007 as 7, or None if no whole number is there."""
    _, marker, rest = text.rpartition("Answer:")
    number = _NUMBER.match(rest) if marker else None
    if number is None:
        return None
    digits = number[1].lstrip("+-").lstrip("0") or "0"
    return f"-{digits}" if number[1][0] == "-" and digits != "0" else digits
