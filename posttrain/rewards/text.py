"""What a completion says."""

from collections.abc import Mapping, Sequence
from typing import Any

Completion = str | Sequence[Mapping[str, Any]]


def text_of(completion: Completion) -> str:
    """A text as it is; of a list of chat messages the last one's content."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def check_column(name: str, column: Sequence[Any], completions: Sequence[Any], reward: str) -> None:
    """Raise `ValueError` if `column` isn't one value for each completion."""
    if len(column) != len(completions):
        raise ValueError(f"{reward}: {len(completions)} completions, but {len(column)} {name}")
