"""A run of the suite: which cases, measured once each, told as they come, and written at the end.

It is a plugin of pytest, under which pytest-benchmark collects the columns as benchmarks of its own: a case is measured
by taking turns, and its samples are then replayed to pytest-benchmark as if they were timed one by one.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from posttrain.bench.case import Case
from posttrain.bench.cases import cases_of
from posttrain.bench.compare import compare
from posttrain.bench.device import GPU, Roofline, measure_roofline
from posttrain.bench.measure import OURS, PLAIN, NotMeasured, Table, measure
from posttrain.bench.record import LOAD, circumstances, earlier_runs, run_file
from posttrain.bench.results import ResultError, merged, read
from posttrain.bench.shapes import SUITES

_HEAD = f"{'':<28}{'ms':>10}{'p20':>10}{'p80':>10}{'speed':>8}{'TFLOP/s':>9}{'GB/s':>8}{'roof':>6}{'error':>9}{'MB':>9}"

_BUSY = 0.6  # of the cores, by the load before the run


@dataclass(frozen=True)
class Selection:
    """What to run: ops (all if none are named), the suite, whether peers join, and where the file goes."""

    ops: tuple[str, ...] = ()
    suite: str = "full" if GPU else "quick"
    peers: bool = False
    out: str | None = None


@dataclass(frozen=True)
class Entry:
    """A column of a pass of a case: one test."""

    case: Case
    name: str  # of the pass
    column: str

    def __str__(self) -> str:
        return f"{self.case} {self.name} {self.column}"


class Replay:
    """A timer for pytest-benchmark that gives samples back."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def load(self, samples: list[float]) -> None:
        """The next calls come in pairs, a sample apart."""
        self._times = [time for sample in reversed(samples) for time in (sample, 0.0)]

    def __call__(self) -> float:
        return self._times.pop()


class Session:
    """The plugin."""

    def __init__(self, selection: Selection | None = None) -> None:
        self.selection = selection or Selection()
        self.path: Path | None = None
        self._before: list[Path] = []
        self._roofline: Roofline | None = None
        self._tables: dict[str, dict[str, Table] | NotMeasured] = {}
        self._lines: list[str] = []
        self._left_out: Counter[str] = Counter()
        self._cases: list[str] = []

    def entries(self, ops: tuple[str, ...]) -> list[Entry]:
        """The tests of these ops, as far as they are selected."""
        suite, wanted = SUITES[self.selection.suite], self.selection.ops
        cases = [case for op in ops if not wanted or op in wanted for case in cases_of(op, suite)]
        self._cases += map(str, cases)
        return [
            Entry(case, name, column)
            for case in cases
            for name in case.passes
            for column in (OURS, PLAIN, *(case.peers if self.selection.peers else ()))
        ]

    def run(self, entry: Entry, benchmark: Any, replay: Replay) -> None:
        """Give an entry's samples to pytest-benchmark, or skip or fail for its reason."""
        tables = self._measured(entry.case)
        if isinstance(tables, NotMeasured):
            if tables.wrong and entry.column == OURS:
                pytest.fail(str(tables), pytrace=False)
            pytest.skip(f"no figures: {tables}")
        table = tables[entry.name]
        if entry.column in table.missing:
            pytest.skip(table.missing[entry.column])
        samples = table.columns[entry.column].samples
        replay.load(samples)
        benchmark.group = f"{entry.case} {entry.name}"
        benchmark.extra_info.update(self._facts(entry, table))
        benchmark.pedantic(lambda: None, rounds=len(samples))

    def _measured(self, case: Case) -> dict[str, Table] | NotMeasured:
        """A case's tables, or why there are none."""
        if self._roofline is None:
            if not GPU and LOAD is not None and LOAD > _BUSY:
                self._lines.append(f"other processes want {LOAD:.1f} times the cores there are: expect noise")
            self._roofline = measure_roofline()
            copy, gemm = self._roofline
            self._lines += [f"roofline of this device: {gemm / 1e12:.3g} TFLOP/s, {copy / 1e9:.3g} GB/s", _HEAD]
        if str(case) not in self._tables:
            try:
                suite = SUITES[self.selection.suite]
                limits = (suite.rounds, self.selection.peers, self._roofline, suite.seconds)
                self._tables[str(case)] = measure(case, *limits)
            except NotMeasured as reason:
                self._tables[str(case)] = reason
            self._tell(case)
        return self._tables[str(case)]

    def _tell(self, case: Case) -> None:
        tables = self._tables[str(case)]
        if isinstance(tables, NotMeasured):
            self._lines.append(f"{case}: no figures: {tables}")
            self._left_out[f"{case}: {tables}"] += 1
            return
        for name, table in tables.items():
            self._lines.append(f"{case} {name}")
            self._lines += [self._line(column, table) for column in table.columns]
            for peer, why in table.missing.items():
                everywhere = all(peer in other.missing for other in tables.values())
                self._left_out[f"{case.op if everywhere else f'{case.op} {name}'}: {peer} {why}"] += 1

    def _line(self, column: str, table: Table) -> str:
        facts = self._rates(column, table)
        seconds, peak = table.comparison.seconds[column], table.columns[column].peak
        times = "".join(f"{1e3 * t:>10.3f}" for t in (seconds.median, seconds.p20, seconds.p80))
        flops = f"{facts['tflops']:>9.3f}" if table.flops else f"{'':>9}"
        moved = f"{facts['gbytes']:>8.1f}" if table.moved else f"{'':>8}"
        memory = "" if peak is None else f"{peak / 2**20:>9.1f}"
        return (
            f"  {column:<26}{times}{table.comparison.speedup[column].median:>8.2f}{flops}{moved}"
            f"{facts['roofline']:>6.0%}{table.columns[column].error:>9.1e}{memory}"
        )

    def _rates(self, column: str, table: Table) -> dict[str, float]:
        assert self._roofline is not None
        median = table.comparison.seconds[column].median
        return {
            "tflops": table.flops / median / 1e12,
            "gbytes": table.moved / median / 1e9,
            "roofline": self._roofline.share(table.flops, table.moved, median),
        }

    def _facts(self, entry: Entry, table: Table) -> dict[str, Any]:
        """What the file says of an entry beside pytest-benchmark's own statistics."""
        comparison, column = table.comparison, table.columns[entry.column]
        return {
            "op": entry.case.op,
            "case": entry.case.title,
            "pass": entry.name,
            "column": entry.column,
            **({"axis": entry.case.axis, "size": entry.case.size} if entry.case.axis else {}),
            "seconds": vars(comparison.seconds[entry.column]),
            "speed": vars(comparison.speedup[entry.column]),
            "flops": table.flops,
            "bytes": table.moved,
            **self._rates(entry.column, table),
            "error": column.error,
            "peak_bytes": column.peak,
        }

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Choose the file, if there is anything for it and pytest was not told of another."""
        benchmarks: Any = session.config.pluginmanager.get_plugin("pytest-benchmark")
        if not benchmarks.json and any(_is_ours(item.nodeid) for item in session.items):
            self.path = run_file(self.selection.suite, self.selection.out)
            benchmarks.json = str(self.path)
            self._before = earlier_runs(self.selection.suite, self.selection.out)

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_generate_machine_info(self) -> dict[str, Any]:
        """The device and everything else that a figure depends on."""
        rates = self._roofline._asdict() if self._roofline else None
        found = {"suite": self.selection.suite, "roofline": rates, "left_out": sorted(self._left_out)}
        return {**circumstances(), **found, "not_run": self._not_run()}

    def _not_run(self) -> list[str]:
        """Cases that were deselected, or that an interrupted run didn't get to."""
        return [case for case in self._cases if case not in self._tables]

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_generate_commit_info(self) -> dict[str, Any]:
        """The commit, as in the machine info, or None without git."""
        found = circumstances()
        return {"id": found["commit"], "dirty": found["changed"]}

    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        """Leave the single samples out, and make the folder."""
        for benchmark in output_json["benchmarks"]:
            benchmark["stats"].pop("data", None)
            benchmark["params"] = benchmark["param"] = None  # the name says it all
            benchmark["options"] = {}
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """No dots among the tables."""
        if report.when == "call" and _is_ours(report.nodeid) and not report.failed:
            return report.outcome, "", ""
        return None

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Tell what was measured, now that nothing is captured."""
        lines, self._lines = self._lines, []
        for line in lines:
            print(line, flush=True)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
        """Name what is missing, in a file as well if there is nothing else, which pytest-benchmark writes none for."""
        if self.path and self._left_out and not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            found = {"machine_info": self.pytest_benchmark_generate_machine_info(), "benchmarks": []}
            self.path.write_text(json.dumps(found, indent=4))
        lines = [reason + (f" ({count} times)" if count > 1 else "") for reason, count in self._left_out.items()]
        not_run = self._not_run() if exitstatus == pytest.ExitCode.INTERRUPTED else []
        for title, named in (("left out:", sorted(lines)), ("not run:", not_run)):
            for line in [title, *(f"  {each}" for each in named)] if named else []:
                terminalreporter.write_line(line)
        if self.path and self.path.exists():
            terminalreporter.write_line(f"-> {self.path}")
            for line in self._since(self.path):
                terminalreporter.write_line(line)

    def _since(self, path: Path) -> list[str]:
        """What changed against the earlier runs."""
        if not self._before:
            return []
        more = len(self._before) - 1
        others = f" and {more} earlier run{'s' * (more > 1)}" if more else ""
        title = f"since {self._before[-1]}{others}:"
        try:
            return [title, compare(merged([*map(read, self._before)]), read(path)).text()]
        except ResultError as error:
            return [title, str(error)]


def session_of(config: pytest.Config) -> Session:
    """The session that runs."""
    return next(plugin for plugin in config.pluginmanager.get_plugins() if isinstance(plugin, Session))


def _is_ours(nodeid: str) -> bool:
    return "::test_case[" in nodeid
