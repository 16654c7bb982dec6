"""Mathematical answers: 1 if an answer equals the right one as mathematics, by the package math-verify.

It reads LaTeX and plain expressions, prefers what is boxed, and compares by sympy: 1/2, 0.5 and \\frac{2}{4} are one.
`pip install posttrain[math]` brings it.
"""

import logging
import threading
from collections.abc import Sequence
from typing import Any

from posttrain.rewards.text import Completion, check_column, text_of

_SECONDS = 5


def math_equivalence(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    answer: Sequence[str | int | float | None] | None = None,
    solution: Sequence[str | int | float | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """Score completions against the column `answer` or `solution`.

    Returns:
        1.0, 0.0, or None where there is no right answer or nothing mathematical in it.

    Raises:
        ValueError: neither column, or both.
        ImportError: math-verify is not installed.
    """
    right = solution if answer is None else answer
    if right is None or (answer is not None and solution is not None):
        raise ValueError("math_equivalence needs the column 'answer' or 'solution', one of the two")
    check_column("answers", right, completions, "math_equivalence")
    return [
        None if gold is None else _score(text_of(completion), str(gold))
        for completion, gold in zip(completions, right, strict=True)
    ]


def _score(text: str, gold: str) -> float | None:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("math_equivalence needs math-verify: pip install posttrain[math]") from error
    # Its limits of time are alarms, which only the main thread has; without one it warns each time.
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
    wanted = parse(gold if "$" in gold or "\\boxed" in gold else f"${gold}$", parsing_timeout=seconds)
    if not wanted:
        return None
    return float(verify(wanted, parse(text, parsing_timeout=seconds), timeout_seconds=seconds))
