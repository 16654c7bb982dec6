"""What changed between two runs on one kind of device, beyond their noise.

On a GPU the seconds of our functions are compared. On a CPU, which a run shares with whatever else the machine does,
it is their speed in times of plain PyTorch, measured in turns in the same run. A change counts if the medians differ by
more than `LEAST` and the ranges from the 20th to the 80th percentile don't touch. Peak memory counts as more if it grew
by more than `LEAST` and by a megabyte. A case that is wrong or fails now counts as worse.
"""

from dataclasses import dataclass

from posttrain.bench.interleave import Spread
from posttrain.bench.measure import OURS, PLAIN
from posttrain.bench.results import Key, ResultError, Run

LEAST = {True: 0.05, False: 0.25}  # on a GPU, on a CPU
_MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Change:
    """A figure of ours in both runs; `factor` above 1 is better in the second."""

    key: Key
    what: str
    factor: float

    def __str__(self) -> str:
        return f"{self.key}: {self.what} ({self.factor:.2f} times as good)"


@dataclass(frozen=True)
class Changes:
    """What became of the first run's figures in the second.

    Attributes:
        worse, better: figures that changed.
        compared: how many figures both have.
        failed: cases that have no figures because they are wrong or fail, and why.
        lost: other figures that are missing, and why if that is known.
        not_run: ops that the second run leaves out.
    """

    worse: list[Change]
    better: list[Change]
    compared: int
    failed: dict[str, str]
    lost: dict[Key, str | None]
    not_run: list[str]

    def text(self) -> str:
        """One line for each change, and a summary."""
        lines = [f"worse: {case} has no figure: {why}" for case, why in self.failed.items()]
        lines += [f"worse: {change}" for change in self.worse] + [f"better: {change}" for change in self.better]
        lines += [f"gone: {key}" + (f": {why}" if why else "") for key, why in self.lost.items()]
        lines += [f"not run: {', '.join(self.not_run)}"] if self.not_run else []
        rest = self.compared - len({change.key for change in (*self.worse, *self.better)})
        return "\n".join(
            [*lines, f"{len(self.worse) + len(self.failed)} worse, {len(self.better)} better, {rest} as before"]
        )


def compare(before: Run, after: Run) -> Changes:
    """Our figures in `after` against those in `before`. Raises `ResultError` if they have nothing in common."""
    if before.device != after.device:
        raise ResultError(f"{before.path} is of {before.device}, {after.path} of {after.device}: not comparable")
    ours = [key for key in before.figures if key.column == OURS]
    both = [key for key in ours if key in after.figures]
    failed, lost, not_run = _missing(before, after)
    if not both and not failed and not lost:
        raise ResultError(_nothing_in_common(before, after))
    changes = [change for key in both for change in _changes(key, before, after)]
    return Changes(
        sorted((c for c in changes if c.factor < 1), key=lambda c: c.factor),
        sorted((c for c in changes if c.factor > 1), key=lambda c: -c.factor),
        len(both),
        failed,
        lost,
        not_run,
    )


def _nothing_in_common(before: Run, after: Run) -> str:
    suites = [run.machine.get("suite") for run in (before, after)]
    if all(suites) and suites[0] != suites[1]:
        return f"{before.path} is of the suite {suites[0]}, {after.path} of {suites[1]}: no figure in common"
    return f"{before.path} and {after.path} have no figure in common"


def _missing(before: Run, after: Run) -> tuple[dict[str, str], dict[Key, str | None], list[str]]:
    """Of our figures that only `before` has: cases that fail now, figures that are gone, and ops that were not run."""
    reasons: list[str] = after.machine.get("left_out", [])
    run = {key.op for key in after.figures}
    same = before.machine.get("suite") == after.machine.get("suite")
    failed: dict[str, str] = {}
    lost: dict[Key, str | None] = {}
    not_run: list[str] = []
    for key in before.figures:
        if key.column != OURS or key in after.figures:
            continue
        case = f"{key.op} {key.case}"
        why = next((line.removeprefix(f"{case}: ") for line in reasons if line.startswith(f"{case}: ")), None)
        if why and why.startswith((OURS, PLAIN)):
            failed[case] = why
        elif same and (why or key.op in run):
            lost[key] = why or ("not run" if case in after.machine.get("not_run", []) else None)
        elif key.op not in run and key.op not in not_run:
            not_run.append(key.op)
    return failed, lost, not_run


def _changes(key: Key, before: Run, after: Run) -> list[Change]:
    a, b = before.figures[key], after.figures[key]
    least, found = LEAST[before.on_gpu], []
    if before.on_gpu:
        if _apart(a.seconds, b.seconds, least):
            milliseconds = f"{1e3 * a.seconds.median:.3f} to {1e3 * b.seconds.median:.3f} ms"
            found.append(Change(key, milliseconds, a.seconds.median / b.seconds.median))
    elif _apart(a.speed, b.speed, least):
        ratios = f"{a.speed.median:.2f} to {b.speed.median:.2f} times plain PyTorch's speed"
        found.append(Change(key, ratios, b.speed.median / a.speed.median))
    if a.peak is not None and b.peak is not None and abs(a.peak - b.peak) > max(_MEGABYTE, least * min(a.peak, b.peak)):
        found.append(
            Change(key, f"{a.peak / _MEGABYTE:.1f} to {b.peak / _MEGABYTE:.1f} MB", max(1, a.peak) / max(1, b.peak))
        )
    return found


def _apart(a: Spread, b: Spread, least: float) -> bool:
    """Whether two spreads don't touch, and their medians differ by more than `least` of the smaller one."""
    low, high = sorted((a, b), key=lambda spread: spread.median)
    return low.p80 < high.p20 and high.median > (1 + least) * low.median
