"""How often the hooks fired, and what has been said about it."""

import os
from collections import Counter

import torch

_counts: Counter[str] = Counter()
_said: set[str] = set()


def counters() -> dict[str, int]:
    """What the hooks did since `enable`: how many of each kind of replacement, and of each thing left alone, by reason.

    Calls inside a compiled graph aren't counted: a graph that changes a number of Python's would be compiled again.
    """
    return dict(_counts)


def count(what: str) -> None:
    if not torch.compiler.is_compiling():
        _counts[what] += 1


def say(text: str) -> None:
    """Print `text` the first time, in the first process of a distributed run; nothing in a compiled graph."""
    if torch.compiler.is_compiling():
        return
    if text not in _said and os.environ.get("RANK", "0") == "0":
        print(text)
    _said.add(text)


def forget() -> None:
    """Start again from nothing."""
    _counts.clear()
    _said.clear()
