"""Progress: how far a run is, on a terminal as a bar, elsewhere as plain lines."""

import resource
import sys
import time
from types import TracebackType
from typing import Any, Self

import torch


class Progress:
    """Shows step, loss, tokens per second, memory and time left. Use as a context."""

    def __init__(self, num_steps: int, first_step: int, bar: bool) -> None:
        self._num_steps = num_steps
        self._first = first_step
        self._start = time.perf_counter()
        self._rate: float | None = None
        self._bar: Any = _make_bar() if bar and sys.stderr.isatty() else None
        self._task = self._bar and self._bar.add_task("train", total=num_steps, completed=first_step, status="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, record: dict[str, float]) -> None:
        """Show a log record."""
        self._rate = record.get("tokens_per_second", self._rate)
        numbers = ", ".join(
            f"{name} {record[name]:.4g}" for name in ("loss", "reward", "eval_loss", "eval_reward") if name in record
        )
        speed = "" if self._rate is None else f"{self._rate:,.0f} tokens/s, "
        status = f"{numbers}, {speed}{peak_memory() / 2**30:.1f} GiB"
        if self._bar:
            self._bar.update(self._task, completed=step, status=status)
        else:
            self.say(f"step {step}/{self._num_steps}: {status}, {_clock(self._seconds_left(step))} left")

    def say(self, line: str) -> None:
        """Print a line without disturbing the bar."""
        if self._bar:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _seconds_left(self, step: int) -> float:
        done = max(1, step - self._first)
        return (time.perf_counter() - self._start) / done * (self._num_steps - step)


def peak_memory() -> int:
    """Most bytes held so far: on the GPU if one is used, else by the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _make_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[status]}"))
    return RichProgress(*columns, console=Console(stderr=True), refresh_per_second=2)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
