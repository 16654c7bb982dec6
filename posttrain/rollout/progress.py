"""How far a long call of the engine is, on a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from posttrain.rollout.stats import Stats


class Bar:
    """Counts prompts, and says how fast tokens are drawn."""

    def __init__(self, bar: Any, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task("generate", total=total, status="")

    def report(self, done: int, stats: Stats) -> None:
        """`done` prompts are done."""
        speed = stats.metrics["rollout/decode_tokens_per_second"]
        self._bar.update(self._task, completed=done, status=f"{speed:,.0f} tokens/s")


@contextmanager
def show(total: int) -> Iterator[Bar | None]:
    """A bar for `total` prompts, or None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[status]}"))
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as bar:
        yield Bar(bar, total)
