"""Values and errors in words, for messages of one line."""

from typing import Any

_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}


def kind(value: Any) -> str:
    """The kind of a JSON value in words."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8, which is what tokenizers read: half a surrogate pair can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind if it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__
