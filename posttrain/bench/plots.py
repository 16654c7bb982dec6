"""The plots of the report, each of one run."""

from collections.abc import Callable, Iterator
from typing import Any

from posttrain.bench.measure import OURS, PLAIN
from posttrain.bench.power import fit
from posttrain.bench.results import Figure, Key, Run
from posttrain.bench.svg import Axis, Chart, Series, Tick, short

_MEGABYTE = 1 << 20
_PLAIN_COLOUR = 7
Value = Callable[[Figure, dict[str, Any]], float | None]


def roofline_plot(run: Run) -> str:
    """Our operations per second over operations per byte, under what a matrix product and a copy allow."""
    roof = run.machine["roofline"]
    copy, gemm = roof["copy"], roof["gemm"]
    found: dict[str, list[tuple[float, float, str]]] = {}
    for key, facts in run.extra.items():
        if key.column == OURS and facts["flops"] and facts["bytes"]:
            title = f"{key.op} {key.case} {key.name}: {facts['tflops']:.3g} TFLOP/s, {facts['roofline']:.0%}"
            found.setdefault(key.op, []).append((facts["flops"] / facts["bytes"], facts["tflops"], title))
    across = [point[0] for points in found.values() for point in points] or [gemm / copy]
    low, high = min(*across, gemm / copy / 4), max(*across, gemm / copy * 4)
    bound = [(low, low * copy / 1e12), (gemm / copy, gemm / 1e12), (high, gemm / 1e12)]
    series = [_dots(op, points, index) for index, (op, points) in enumerate(found.items())]
    series.append(Series("roofline", bound, dots=False, dashed=True, colour=_PLAIN_COLOUR))
    axes = Axis("operations per byte, at least", log=True), Axis("TFLOP/s", log=True)
    return Chart("Roofline: ours, ops that compute", *axes, series).html()


def _dots(name: str, points: list[tuple[float, float, str]], colour: int) -> Series:
    return Series(
        name, [point[:2] for point in points], line=False, titles=[title for _, _, title in points], colour=colour
    )


def speed_plot(run: Run) -> str:
    """Speed against plain PyTorch."""
    return _strip(run, "Speed in times of plain PyTorch's", lambda figure, _: figure.speed.median, 1.0, (OURS, "peers"))


def share_plot(run: Run) -> str:
    """Share of the roofline, of ours and of plain PyTorch."""
    return _strip(run, "Share of the roofline, %", lambda _, facts: 100 * facts.get("roofline", 0), 100, (OURS, PLAIN))


def memory_plot(run: Run) -> str:
    """Peak memory of a call."""

    def megabytes(figure: Figure, _: dict[str, Any]) -> float | None:
        return figure.peak and figure.peak / _MEGABYTE

    return _strip(run, "Peak memory of a call, MB", megabytes, None, (OURS, PLAIN))


def _strip(run: Run, title: str, value: Value, mark: float | None, names: tuple[str, str]) -> str:
    """Dots for each op on a line of its own, those of the two names above each other; "peers" are all others."""
    ops = list(dict.fromkeys(key.op for key in run.figures))
    place = {op: len(ops) - 1 - index for index, op in enumerate(ops)}
    series = []
    for number, (name, up, colour) in enumerate(zip(names, (0.15, -0.2), (0, _PLAIN_COLOUR), strict=True)):
        points = []
        for key, figure in run.figures.items():
            known = value(figure, run.extra[key])
            if known and (key.column == name or (name == "peers" and key.is_peer)):
                points.append((known, place[key.op] + up, f"{key}: {short(known)}"))
        if points or number == 0:
            series.append(_dots(name, points, colour))
    if mark is not None:
        bounds = [(mark, -0.6), (mark, len(ops) - 0.4)]
        series.append(Series("", bounds, dots=False, dashed=True, colour=_PLAIN_COLOUR))
    rows = Axis("", ticks=tuple(Tick(at, op) for op, at in place.items()))
    return Chart(title, Axis(title, log=True), rows, series, height=70 + 19 * len(ops)).html()


def scaling_plots(run: Run) -> Iterator[str]:
    """Time and peak memory over each size that was varied, of every function, with the fitted powers."""
    axes = dict.fromkeys((key.op, facts["axis"], key.name) for key, facts in run.extra.items() if facts.get("axis"))
    for op, axis, name in axes:
        own = {
            key: facts for key, facts in run.extra.items() if (key.op, facts.get("axis"), key.name) == (op, axis, name)
        }
        title = f"{op} {name} over {axis}"
        seconds = {key: 1e3 * run.figures[key].seconds.median for key in own}
        peaks = {key: (run.figures[key].peak or 0) / _MEGABYTE for key in own}
        yield _curves(f"{title}: time", axis, "ms", own, seconds)
        yield _curves(f"{title}: peak memory", axis, "MB", own, peaks)


def _curves(title: str, axis: str, unit: str, own: dict[Key, dict[str, Any]], values: dict[Key, float]) -> str:
    sizes = sorted({facts["size"] for facts in own.values()})
    series: list[Series] = []
    for column in dict.fromkeys(key.column for key in own):
        colour = {OURS: 0, PLAIN: _PLAIN_COLOUR}.get(column, 1 + len(series) % (_PLAIN_COLOUR - 1))
        points = sorted((own[key]["size"], values[key]) for key in own if key.column == column)
        power = fit([point for point in points if point[1] > 0])
        titles = [f"{column}, {axis} = {size}: {short(value)} {unit}" for size, value in points]
        series.append(
            Series(f"{column} ∝ {power.text(axis)}" if power else column, points, False, titles=titles, colour=colour)
        )
        if power:
            ends = [(size, power(size)) for size in (sizes[0], sizes[-1])]
            series.append(Series("", ends, dots=False, dashed=True, colour=colour))
    ticks = tuple(Tick(size, short(size) if size < 1024 or size % 1024 else f"{size // 1024}k") for size in sizes)
    return Chart(title, Axis(axis, log=True, ticks=ticks), Axis(unit, log=True), series).html()
