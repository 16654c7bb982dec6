"""The shapes of rows that the trainers take, found by their columns.

    text                          SFT: language modelling on plain text
    messages (+ tools)            SFT: language modelling on a chat
    prompt, completion            SFT: both plain text, or both lists of chat messages (+ tools)
    prompt, chosen, rejected      preferences: all plain text, or all lists of chat messages (+ tools)
    chosen, rejected              the same, with the prompt at the beginning of both

The names are those that TRL and most public data sets use.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from posttrain.data.rows import DataError, Row, Rows
from posttrain.data.values import is_unicode, kind

_PREFERENCE_COLUMNS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
_SFT_COLUMNS = (("prompt", "completion"), ("messages",), ("text",))


class Format(NamedTuple):
    """Which columns hold the data, and whether they hold chat messages."""

    columns: tuple[str, ...]
    chat: bool


def detect_sft(rows: Rows) -> Format:
    """The format of the first row that has the columns of one. Raises `DataError` if none has."""
    return _detect(rows, _SFT_COLUMNS, "SFT needs the column 'text', or 'messages', or 'prompt' and 'completion'")


def detect_preference(rows: Rows) -> Format:
    """As `detect_sft`, for preference pairs."""
    return _detect(rows, _PREFERENCE_COLUMNS, "preferences need the columns 'chosen', 'rejected' and maybe 'prompt'")


def _detect(rows: Rows, known: tuple[tuple[str, ...], ...], needed: str) -> Format:
    for row in rows:
        for columns in known:
            if isinstance(row, Mapping) and all(row.get(column) is not None for column in columns):
                return Format(columns, columns == ("messages",) or isinstance(row[columns[0]], list))
    raise DataError(f"{rows.where(0)}: {needed}; {_found(rows[0])}")


def problem(row: Row, format: Format) -> str | None:
    """What keeps `row` from being of this format, or None."""
    if not isinstance(row, Mapping):
        return f"a row must be an object, not {kind(row)}"
    for column in format.columns:
        value = row.get(column)
        if value is None:
            return f"column {column!r} is missing; {_found(row)}"
        wrong = _wrong_messages(value) if format.chat else _wrong_text(value)
        if wrong:
            return f"column {column!r} {wrong}"
    if format.chat and not isinstance(row.get("tools"), list | str | None):
        return f"column 'tools' must be a list or a JSON string, not {kind(row['tools'])}"
    return None


def _wrong_text(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"must be a string, not {kind(value)}"
    return None if is_unicode(value) else "holds half of a surrogate pair, which no tokenizer can read"


def _wrong_messages(value: Any) -> str | None:
    if not isinstance(value, list):
        return f"must be a list of messages, not {kind(value)}"
    if not value:
        return "has no messages"
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"must hold messages with 'role' and 'content'; message {number} has no role"
        content = message.get("content")
        if content is None:
            if not message.get("tool_calls"):
                return f"has no content in message {number} ({message['role']})"
        elif isinstance(content, str):
            if not is_unicode(content):
                return f"holds half of a surrogate pair in message {number}, which no tokenizer can read"
        elif not isinstance(content, list):
            return f"has {kind(content)} as content of message {number} ({message['role']})"
    return None


def _found(row: Any) -> str:
    if not isinstance(row, Mapping):
        return f"the row is {kind(row)}"
    present = [name for name, value in row.items() if value is not None]
    return f"found {', '.join(map(repr, present)) or 'no columns'}"
