"""`posttrain bench report`: one HTML page about all devices that have results.

A device has a section: what was run, and for each suite an overview, plots and a table of every op. Of a figure that
several runs have, the newest counts. The page needs no other file and no network.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from posttrain.bench.interleave import Spread
from posttrain.bench.measure import OURS, PLAIN
from posttrain.bench.page import Number, charts, page, row, table
from posttrain.bench.plots import memory_plot, roofline_plot, scaling_plots, share_plot, speed_plot
from posttrain.bench.results import Figure, Key, ResultError, Run, date, merged, read

SCALING_SUITE = "scaling"
_MEGABYTE = 1 << 20
_COLUMNS = ["", *map(Number, ("ms", "p20", "p80", "speed", "TFLOP/s", "GB/s", "roof", "error", "MB"))]


@dataclass(frozen=True)
class Device:
    """Results of one device: runs of `posttrain bench` and comparisons of `make bench`, both with the oldest first."""

    name: str
    runs: list[Run]
    comparisons: list[Run]

    def suites(self) -> list[str]:
        """The suites that were run here, scaling last."""
        return sorted({run.machine["suite"] for run in self.runs}, key=lambda suite: (suite == SCALING_SUITE, suite))

    def of(self, suite: str) -> list[Run]:
        """The runs of a suite."""
        return [run for run in self.runs if run.machine["suite"] == suite]

    def merged(self, suite: str) -> Run:
        """The newest figures of a suite, as if of one run."""
        return merged(self.of(suite))


def devices(folder: Path) -> list[Device]:
    """The devices whose results lie in folders of `folder`, by name. Raises `ResultError` for a file that is none."""
    runs = [read(path) for path in sorted(folder.glob("*/*.json"))]
    if not runs:
        of_one = f"; those of one device lie in it, so give {folder.absolute().parent}" * any(folder.glob("*.json"))
        raise ResultError(f"{folder}: no results of posttrain bench in its folders{of_one}")
    found = []
    for name in sorted({run.device for run in runs}):
        own = sorted((run for run in runs if run.device == name), key=date)
        suites = [run for run in own if "suite" in run.machine]
        found.append(Device(name, suites, [run for run in own if "suite" not in run.machine and run.figures]))
    return found


def write_report(folder: Path, path: Path) -> list[Device]:
    """Write the page about the results in `folder` to `path`; returns the devices it is about."""
    found = devices(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html(found), encoding="utf-8")
    return found


def html(found: Sequence[Device]) -> str:
    """The page."""
    intro = (
        "<p>Medians of rounds in which all functions took turns, in one process, after each had agreed with the "
        "truth; all columns of a pass of a case are of the newest run that has it. Speed is in times of plain "
        "PyTorch's; the share of the roofline is the least time that the work takes at the rates of a copy and of a "
        "matrix product, the best that these runs measured, over the median; error is the largest difference from the "
        "truth over the largest true value; MB is the peak memory of a call beyond its arguments.</p>"
    )
    links = " · ".join(f'<a href="#device{i}">{escape(device.name)}</a>' for i, device in enumerate(found))
    return page("posttrain bench", f"{intro}<p>{links}</p>" + "".join(map(_device, range(len(found)), found)))


def _device(index: int, device: Device) -> str:
    parts = [f'<h2 id="device{index}">{escape(device.name)}</h2>']
    for suite in device.suites():
        run = device.merged(suite)
        parts += [f"<h3>Suite {escape(suite)}</h3>", _circumstances(device.of(suite), run)]
        parts += [charts(scaling_plots(run))] if suite == SCALING_SUITE else [_suite(run)]
        parts += [_op(op, run) for op in dict.fromkeys(key.op for key in run.figures)]
        parts.append(_left_out(run))
    if device.comparisons:
        parts += ["<h3>Comparisons of make bench</h3>", _comparisons(device.comparisons)]
    return "".join(parts)


def _circumstances(runs: Sequence[Run], together: Run) -> str:
    """Of the newest run, which others there are, and the roofline of all together."""
    machine = runs[-1].machine
    versions = machine.get("versions", {})
    facts = [f"{name} {machine[name]}" for name in ("driver", "cuda", "isa") if machine.get(name)]
    facts += [f"{name} {versions[name]}" for name in ("torch", "triton", "transformers") if name in versions]
    facts.append(_commit(runs[-1]))
    facts.append(date(runs[-1]))
    if machine.get("load") is not None:
        facts.append(f"load of {machine['load']:.2f} of the cores")
    if roofline := together.machine.get("roofline"):
        facts.append(f"roofline {roofline['gemm'] / 1e12:.3g} TFLOP/s, {roofline['copy'] / 1e9:.3g} GB/s")
    if len(runs) > 1:
        others = ", ".join(f"{date(run)} {_commit(run)}".strip() for run in runs[:-1])
        facts.insert(0, f"newest of {len(runs)} runs (before it: {others})")
    return f"<p class=faint>{escape('; '.join(filter(None, facts)))}</p>"


def _commit(run: Run) -> str:
    commit = run.machine.get("commit")
    return f"commit {commit[:9]}{' with changes' * bool(run.machine.get('changed'))}" if commit else ""


def _suite(run: Run) -> str:
    plots = [speed_plot(run), share_plot(run), memory_plot(run)]
    if run.machine.get("roofline"):
        plots.insert(0, roofline_plot(run))
    head, rows = overview(run)
    return table(head, map(row, rows)) + charts(plots)


def overview(run: Run) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for each op and pass: medians over the shapes, with the least and the most."""
    head = ["op", "pass", *map(Number, ("shapes", "speed against plain PyTorch", "share of the roofline"))]
    head.append(Number("plain PyTorch's memory over ours"))
    with_peers = any(key.is_peer for key in run.figures)
    head += ["fastest peer"] * with_peers
    rows = []
    for op, name in dict.fromkeys((key.op, key.name) for key in run.figures):
        ours = [key for key in run.figures if key[0] == op and key[2] == name and key.column == OURS]
        speeds = [run.figures[key].speed.median for key in ours]
        shares = [run.extra[key]["roofline"] for key in ours if run.extra[key].get("roofline")]
        cells = [op, name, Number(len(ours)), _range(speeds, "{:.2f}"), _range(shares, "{:.0%}")]
        cells.append(_range(_memory_ratios(run, ours), "{:.1f}"))
        rows.append([*cells, *[_fastest_peer(run, op, name)] * with_peers])
    return head, rows


def _range(values: Sequence[float], form: str) -> Number:
    if not values:
        return Number("")
    low, middle, high = (form.format(f(values)) for f in (min, statistics.median, max))
    return Number(middle if len(values) == 1 else f"{middle} ({low} to {high})")


def _memory_ratios(run: Run, ours: Iterable[Key]) -> list[float]:
    """Of plain PyTorch's peak over ours, where both are known and not 0."""
    pairs = ((run.figures[key].peak, run.figures.get(key._replace(column=PLAIN))) for key in ours)
    return [plain.peak / peak for peak, plain in pairs if peak and plain is not None and plain.peak]


def _fastest_peer(run: Run, op: str, name: str) -> str:
    """The peer with the largest median speed."""
    speeds: dict[str, list[float]] = {}
    for key, figure in run.figures.items():
        if key.op == op and key.name == name and key.is_peer:
            speeds.setdefault(key.column, []).append(figure.speed.median)
    if not speeds:
        return ""
    best = max(speeds, key=lambda peer: statistics.median(speeds[peer]))
    return f"{best} {statistics.median(speeds[best]):.2f}"


def _op(op: str, run: Run) -> str:
    rows = []
    for case, name in dict.fromkeys((key.case, key.name) for key in run.figures if key.op == op):
        rows.append(row([f"{case} {name}", *[""] * (len(_COLUMNS) - 1)], "group"))
        columns = [key for key in run.figures if key[:3] == (op, case, name)]
        rows += [_figure(key.column, run.figures[key], run.extra[key]) for key in columns]
    return f"<details><summary>{escape(op)}</summary>{table(_COLUMNS, rows)}</details>"


def _figure(column: str, figure: Figure, facts: dict[str, Any]) -> str:
    cells = [column, *_times(figure.seconds), Number(f"{figure.speed.median:.2f}")]
    cells += [Number(f"{facts[name]:.3g}" if facts.get(name) else "") for name in ("tflops", "gbytes")]
    cells.append(Number(f"{facts['roofline']:.0%}" if facts.get("roofline") else ""))
    cells.append(Number("" if figure.error is None else f"{figure.error:.1e}"))
    cells.append(Number("" if figure.peak is None else f"{figure.peak / _MEGABYTE:.1f}"))
    return row(cells, "ours" if column == OURS else "")


def _times(seconds: Spread) -> list[str]:
    return [Number(f"{1e3 * value:.4g}") for value in (seconds.median, seconds.p20, seconds.p80)]


def _left_out(run: Run) -> str:
    reasons = [*run.machine.get("left_out", []), *(f"{case}: not run" for case in run.machine.get("not_run", []))]
    if not reasons:
        return ""
    lines = "".join(f"<li>{escape(reason)}" for reason in reasons)
    return f"<details><summary>left out, and why ({len(reasons)})</summary><ul>{lines}</ul></details>"


def _comparisons(runs: Iterable[Run]) -> str:
    head = ["", Number("ms"), Number("p20"), Number("p80"), Number("speed"), Number("p20"), Number("p80")]
    rows = []
    for run in runs:
        against = f"{run.machine.get('title', run.path.stem)}; speed against {run.machine['baseline']}"
        rows.append(row([against, *[""] * (len(head) - 1)], "group"))
        for key, figure in run.figures.items():
            speed = [Number(f"{v:.2f}") for v in (figure.speed.median, figure.speed.p20, figure.speed.p80)]
            rows.append(row([key.column, *_times(figure.seconds), *speed], "ours" if key.column == OURS else ""))
    return f"<details><summary>{len(rows)} lines</summary>{table(head, rows)}</details>"
