"""Read what was recorded: runs of `posttrain bench`, and the comparisons of `make bench` as files of their own."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.bench.interleave import Spread
from posttrain.bench.record import runs_of


class ResultError(ValueError):
    """A file or folder without results that can be read; the message is one line and names it."""


class Key(NamedTuple):
    """What a figure is of."""

    op: str
    case: str
    name: str  # of the pass
    column: str

    def __str__(self) -> str:
        return " ".join(part for part in self if part)


@dataclass(frozen=True)
class Figure:
    """Seconds per call, speed in times of plain PyTorch (or another baseline), error and peak bytes if known."""

    seconds: Spread
    speed: Spread
    error: float | None = None
    peak: int | None = None


@dataclass(frozen=True)
class Run:
    """A file of results.

    Attributes:
        path: the file.
        machine: device, driver, cuda, versions, commit, date, suite, roofline, what was left out and why, and the cases
            that the run didn't get to; what an older file lacks is absent.
        figures: by op, case, pass and column; a comparison of `make bench` has only a title.
        extra: all that pytest-benchmark's `extra_info` says of a figure: operations, bytes, rates.
    """

    path: Path
    machine: dict[str, Any]
    figures: dict[Key, Figure]
    extra: dict[Key, dict[str, Any]]

    @property
    def device(self) -> str:
        """The GPU's name, or the CPU's with its cores."""
        return self.machine["device"]

    @property
    def on_gpu(self) -> bool:
        """Whether seconds of two runs can be compared: a GPU's clocks are its own, a CPU is often shared."""
        return self.machine.get("cuda") is not None


def read(name: str | Path) -> Run:
    """The results in a file, or in a folder those of the suite that ran last there. Raises `ResultError`."""
    path = Path(name)
    if not path.exists():
        raise ResultError(f"{path}: no such file or folder")
    if path.is_dir():
        runs = [read(each) for each in runs_of(path.glob("*.json"))]
        if not runs:
            raise ResultError(f"{path}: no results of posttrain bench in this folder")
        return merged(runs)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ResultError(f"{path}: not readable as JSON: {error}") from error
    try:
        return _run(path, content) if "benchmarks" in content else _comparison(path, content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ResultError(f"{path}: not a result of posttrain bench: {type(error).__name__} {error}") from error


def date(run: Run) -> str:
    """When it was recorded, in a form that sorts; "" if the file doesn't say."""
    return run.machine.get("date", "")


def merged(runs: Sequence[Run]) -> Run:
    """The newest figures of runs of one suite, oldest first, as if of one run.

    The newest run of an op says which cases the op has, those among them that it didn't get to, and what of it is left
    out and why.
    """
    figures: dict[Key, Figure] = {}
    extra: dict[Key, dict[str, Any]] = {}
    reasons: dict[str, list[str]] = {}
    for run in runs:
        own = _left_out_of(run)
        cases = {f"{key.op} {key.case}" for key in run.figures} | set(run.machine.get("not_run", []))
        gone = [key for key in figures if key.op in own and f"{key.op} {key.case}" not in cases]
        for key in gone:
            del figures[key], extra[key]
        figures, extra, reasons = figures | run.figures, extra | run.extra, reasons | own
    left_out = sorted(reason for own_reasons in reasons.values() for reason in own_reasons)
    return Run(runs[-1].path, runs[-1].machine | {"left_out": left_out}, figures, extra)


def _left_out_of(run: Run) -> dict[str, list[str]]:
    """By op that a run measured or meant to: "op: why" or "op case: why"."""
    reasons: dict[str, list[str]] = {key.op: [] for key in run.figures}
    for reason in run.machine.get("left_out", []):
        reasons.setdefault(reason.split(maxsplit=1)[0].rstrip(":"), []).append(reason)
    return reasons


def _run(path: Path, content: dict[str, Any]) -> Run:
    figures, extra = {}, {}
    for benchmark in content["benchmarks"]:
        facts = benchmark["extra_info"]
        key = Key(facts["op"], facts["case"], facts["pass"], facts["column"])
        spreads = Spread(**facts["seconds"]), Spread(**facts["speed"])
        figures[key] = Figure(*spreads, facts["error"], facts["peak_bytes"])
        extra[key] = facts
    machine = content["machine_info"]
    return Run(path, machine | {"device": machine["device"]}, figures, extra)


def _comparison(path: Path, content: dict[str, Any]) -> Run:
    seconds = content.get("seconds", {})
    figures = {
        Key(path.stem, "", "", column): Figure(Spread(**spread), Spread(**content["speedup"][column]))
        for column, spread in seconds.items()
    }
    if seconds and "baseline" not in content:
        raise KeyError("baseline")
    return Run(path, content | {"device": content["device"]}, figures, {})
