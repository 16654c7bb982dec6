"""What a completion says."""

from collections.abc import Mapping, Sequence
from typing import Any

Completion = str | Sequence[Mapping[str, Any]]


def text_of(completion: Completion) -> str:
    """A text as it is; of a list of chat messages the content of the assistant's last one, "" if there is none.

    Where an environment answered and no room was left for another turn, its message is the last.
    """
    if isinstance(completion, str):
        return completion
    said = (message["content"] for message in reversed(completion) if message.get("role", "assistant") == "assistant")
    return next(said, "") or ""


def check_column(name: str, column: Sequence[Any], completions: Sequence[Any], reward: str) -> None:
    """Raise `ValueError` if `column` isn't one value for each completion."""
    if len(column) != len(completions):
        raise ValueError(f"{reward}: {len(completions)} completions, but {len(column)} {name}")
