"""Read what was recorded: runs of `posttrain bench`, and the comparisons of `make bench` as files of their own."""

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.bench.device import Roofline
from posttrain.bench.interleave import Spread
from posttrain.bench.measure import OURS, PLAIN
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

    @property
    def title(self) -> str:
        """The case with its op, as in reasons."""
        return f"{self.op} {self.case}"

    @property
    def is_peer(self) -> bool:
        """Whether the column is neither ours nor plain PyTorch's."""
        return self.column not in (OURS, PLAIN)


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

    All columns of a pass of a case are of one run, the newest that has it, since only they took turns; a peer that an
    older run measured is then left out, and named. The newest run of an op says which cases the op has and, of those
    that it got to, what is left out and why; for peers if it asked for them. Of the others older runs say it. Shares of
    the roofline are of the best rates that the runs measured.
    """
    owners: dict[Key, Run] = {}
    reasons: set[str] = set()
    not_run: set[str] = set()
    passes = {key.name for run in runs for key in run.figures}
    for run in runs:
        said = _Said.of(run, passes)
        reasons = {reason for reason in reasons if said.leaves(reason, passes, owners)} | said.reasons
        reasons |= set(said.older_peers(owners))
        not_run = {case for case in not_run if _op_of(case) not in said.ops} | said.not_run
        kept = {key: owner for key, owner in owners.items() if key in run.figures or said.keeps(key)}
        owners = kept | dict.fromkeys(run.figures, run)
    known = {key.title for key in owners} | {_case_of(reason, passes) for reason in reasons}
    rates = [owner.machine["roofline"] for owner in owners.values() if owner.machine.get("roofline")]
    best = Roofline(*(max(rate[name] for rate in rates) for name in Roofline._fields)) if rates else None
    machine = runs[-1].machine | {"left_out": sorted(reasons), "not_run": sorted(not_run - known)}
    if best:
        machine["roofline"] = best._asdict()
    figures = {key: owner.figures[key] for key, owner in owners.items()}
    return Run(runs[-1].path, machine, figures, {key: _under(best, key, owner) for key, owner in owners.items()})


class _Said(NamedTuple):
    """What a run says of its ops: cases it measured (with their passes), couldn't, and didn't get to; and of peers."""

    ops: set[str]
    passes: set[tuple[str, ...]]  # op, case and pass
    cases: set[str]
    peers: set[str]  # ops whose peers it asked for
    reasons: set[str]
    not_run: set[str]

    @classmethod
    def of(cls, run: Run, passes: Container[str]) -> "_Said":
        reasons, not_run = set(run.machine.get("left_out", [])), set(run.machine.get("not_run", []))
        cases = {key.title for key in run.figures}
        asked = {key.op for key in run.figures if key.is_peer}
        asked |= {_op_of(reason) for reason in reasons if _case_of(reason, passes) is None}
        ops = {_op_of(text) for text in cases | reasons | not_run}
        return cls(ops, {key[:3] for key in run.figures}, cases, asked, reasons, not_run)

    def keeps(self, key: Key) -> bool:
        """Whether an older figure still counts."""
        if key.op not in self.ops or key.title in self.not_run:
            return True
        return key.title in self.cases and key[:3] not in self.passes

    def leaves(self, reason: str, passes: Container[str], older: Iterable[Key]) -> bool:
        """Whether an older reason still counts."""
        op, case = _op_of(reason), _case_of(reason, passes)
        if case is not None:
            return op not in self.ops or case in self.not_run
        return op not in self.peers or any(key.op == op and self.keeps(key) for key in older)

    def older_peers(self, older: Mapping[Key, Run]) -> Iterator[str]:
        """Reasons for the peers that an older run measured, in cases that this one measured without asking for them."""
        for key, owner in older.items():
            if key.is_peer and key[:3] in self.passes and key.op not in self.peers:
                yield f"{key.op}: {key.column} was measured in another run than the newest figures ({owner.path.name})"


def _op_of(text: str) -> str:
    """The op of a case, or of a reason: "op: peer why", "op pass: peer why" or "op case: why"."""
    return text.partition(" ")[0].rstrip(":")


def _case_of(reason: str, passes: Container[str]) -> str | None:
    """The case that a reason is about, or None if it is about a peer."""
    place = reason.split(": ", 1)[0]
    return None if place == _op_of(reason) or place.partition(" ")[2] in passes else place


def _under(best: Roofline | None, key: Key, run: Run) -> dict[str, Any]:
    """What is known of a figure, its share of the roofline being that of `best`."""
    facts, own = run.extra[key], run.machine.get("roofline")
    if best is None or not own or Roofline(**own) == best:
        return facts
    return facts | {"roofline": best.share(facts["flops"], facts["bytes"], run.figures[key].seconds.median)}


def _run(path: Path, content: dict[str, Any]) -> Run:
    figures, extra = {}, {}
    for benchmark in content["benchmarks"]:
        facts = benchmark["extra_info"]
        key = Key(facts["op"], facts["case"], facts["pass"], facts["column"])
        spreads = _spread(facts["seconds"]), _spread(facts["speed"])
        figures[key] = Figure(*spreads, _number(facts["error"]), _number(facts["peak_bytes"]))
        extra[key] = facts
    machine = content["machine_info"]
    return Run(path, _checked(machine), figures, extra)


def _comparison(path: Path, content: dict[str, Any]) -> Run:
    seconds = content.get("seconds", {})
    figures = {
        Key(path.stem, "", "", column): Figure(_spread(spread), _spread(content["speedup"][column]))
        for column, spread in seconds.items()
    }
    if seconds and "baseline" not in content:
        raise KeyError("baseline")
    return Run(path, _checked(content), figures, {})


def _checked(machine: dict[str, Any]) -> dict[str, Any]:
    """`machine`, if what is read of it has the right type."""
    for name, form in {"device": str, "suite": str, "date": str, "left_out": list, "not_run": list}.items():
        value = machine.get(name, form())
        if not isinstance(value, form) or any(not isinstance(part, str) for part in value):
            raise TypeError(f"{name!r} is {json.dumps(value)}")
    return machine | {"device": machine["device"]}


def _spread(values: dict[str, Any]) -> Spread:
    for name, value in values.items():
        if _number(value) is None:
            raise TypeError(f"{name!r} is null")
    return Spread(**values)


def _number(value: Any) -> Any:
    """`value`, if it is a number or unknown."""
    if value is not None and not isinstance(value, int | float):
        raise TypeError(f"{json.dumps(value)} is not a number")
    return value
