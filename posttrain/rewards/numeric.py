"""Numeric answers: 1 if the last number of a completion is the right one, however it is written."""

import math
import re
from collections.abc import Sequence
from typing import Any

from posttrain.rewards.text import Completion, check_column, text_of

_PLAIN = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"(?<![\w.])([-+]?)({_PLAIN})(e[-+]?\d+)?(?:\s*/\s*({_PLAIN}))?\s*(%?)(?!\w)", re.IGNORECASE)
_TOLERANCE = 1e-6


def numeric(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    answer: Sequence[str | int | float | None],
    **columns: Any,
) -> list[float | None]:
    """Score completions against the column `answer`.

    Numbers may have thousands separators, an exponent, a fraction's bar or a percent sign: 1,234.5, 1e-3, 3/4, 75%.

    Returns:
        1.0 where the last numbers of completion and answer agree to a relative 1e-6, else 0.0; None where there is no
        answer.
    """
    check_column("answers", answer, completions, "numeric")
    return [
        None if right is None else float(_same(last_number(text_of(completion)), last_number(str(right))))
        for completion, right in zip(completions, answer, strict=True)
    ]


def last_number(text: str) -> float | None:
    """The value of the last number in `text`, or None if there is none (or a division by 0)."""
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    sign, digits, exponent, below, percent = numbers[-1]
    value = float(digits.replace(",", "") + exponent)
    if below:
        divisor = float(below.replace(",", ""))
        if divisor == 0:
            return None
        value /= divisor
    return (-value if sign == "-" else value) / (100 if percent else 1)


def _same(found: float | None, right: float | None) -> bool:
    return found is not None and right is not None and math.isclose(found, right, rel_tol=_TOLERANCE, abs_tol=1e-12)
