"""Form of a completion: 1 if all of it matches a regular expression, else 0."""

import re
from collections.abc import Sequence
from typing import Any

from posttrain.rewards.text import Completion, text_of


class RegexFormat:
    """A reward function that says whether completions have a form.

    Args:
        pattern: must match a whole completion; `.` matches line ends, too.
        name: of the reward in metrics.

    Raises:
        ValueError: a pattern that is no regular expression.
    """

    def __init__(self, pattern: str, name: str = "regex_format") -> None:
        try:
            self._pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"RegexFormat: {pattern!r} is no regular expression: {error}") from error
        self.__name__ = name

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        """1.0 or 0.0 for each completion."""
        return [float(self._pattern.fullmatch(text_of(completion)) is not None) for completion in completions]


_SAID = r"(?:(?!</?think>).)*"
think_format = RegexFormat(f"<think>{_SAID}</think>{_SAID}", "think_format")
"""One <think> ... </think> at the beginning, and an answer behind it."""
