"""Small plots as SVG inside HTML, without a script and without a network.

    Chart(...).html()    a <figure> with axes, lines and dots, and a legend below

Colours are CSS variables of posttrain/bench/page.py, so that a page in the dark has its own. Hovering over a dot shows
its title.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

COLOURS = 8  # that the page's style has
_RIGHT, _TOP, _BOTTOM = 14, 12, 40


class Tick(NamedTuple):
    """A mark of an axis."""

    value: float
    label: str


@dataclass(frozen=True)
class Series:
    """Points under one name.

    Attributes:
        name: in the legend; without one the series isn't there.
        points: (x, y).
        line: whether they are joined.
        dots: whether they are marked.
        dashed: whether the line is a bound or a fit, not a measurement.
        titles: of each dot, shown when hovering.
        colour: its number, by default the series' place in the chart.
    """

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = True
    dots: bool = True
    dashed: bool = False
    titles: Sequence[str] = ()
    colour: int | None = None


@dataclass(frozen=True)
class Axis:
    """A direction of a chart: its label, whether it is logarithmic, and ticks if they are not to be chosen here."""

    label: str
    log: bool = False
    ticks: tuple[Tick, ...] = ()


@dataclass(frozen=True)
class Chart:
    """A plot of `width` x `height` CSS pixels; what an axis can't have (NaN, on a logarithmic one 0) is left out."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    width: int = 560
    height: int = 270

    def html(self) -> str:
        """The figure; without any point only its title and that there is nothing to show."""
        if not any(_shown(each, self) for each in self.series):
            return f"<figure><figcaption><b>{escape(self.title)}</b> nothing measured</figcaption></figure>"
        shown = [point for each in self.series for point in _shown(each, self)]
        up = _Scale.of(self.y, [y for _, y in shown], self.height - _BOTTOM, _TOP)
        left = 34 + 6.2 * max((len(tick.label) for tick in up.ticks), default=0)
        across = _Scale.of(self.x, [x for x, _ in shown], left, self.width - _RIGHT)
        marks = "".join(_marks(each, index, self, across, up) for index, each in enumerate(self.series))
        keys = " ".join(
            f'<span class="key {"dashed " * each.dashed}c{_colour(each, index)}">{escape(each.name)}</span>'
            for index, each in enumerate(self.series)
            if each.name and each.points
        )
        return (
            f"<figure><figcaption><b>{escape(self.title)}</b></figcaption>"
            f'<svg viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}" role="img" '
            f'aria-label="{escape(self.title)}">{self._grid(across, up)}{marks}</svg>'
            f'<figcaption class="legend">{keys}</figcaption></figure>'
        )

    def _grid(self, across: "_Scale", up: "_Scale") -> str:
        left, right, bottom = across.start, across.end, self.height - _BOTTOM
        parts = []
        for tick in across.ticks:
            x = across(tick.value)
            parts.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{bottom}"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{escape(tick.label)}</text>')
        for tick in up.ticks:
            y = up(tick.value)
            parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right}"/>')
            parts.append(f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(tick.label)}</text>')
        middle, height = (left + right) / 2, (_TOP + bottom) / 2
        parts.append(
            f'<text x="{middle:.1f}" y="{self.height - 6}" text-anchor="middle">{escape(self.x.label)}</text>'
            f'<text transform="translate(11 {height}) rotate(-90)" text-anchor="middle">{escape(self.y.label)}</text>'
        )
        return "".join(parts)


@dataclass(frozen=True)
class _Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[Tick, ...]

    @staticmethod
    def of(axis: Axis, values: Sequence[float], start: float, end: float) -> "_Scale":
        given = [tick.value for tick in axis.ticks]
        low, high = min([*values, *given]), max([*values, *given])
        if axis.log:
            margin = (high / low) ** 0.04 if high > 1.01 * low else 2.0
            low, high = low / margin, high * margin
        else:
            margin = 0.05 * (high - low) if high - low > 1e-6 * abs(high) else abs(high) or 1.0
            low, high = low - margin if low < 0 or given or low > 0.5 * high else 0.0, high + margin
        ticks = axis.ticks or (_log_ticks(low, high) if axis.log else _linear_ticks(low, high))
        return _Scale(low, high, start, end, axis.log, ticks)

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def _log_ticks(low: float, high: float) -> tuple[Tick, ...]:
    """Powers of ten, with others between them where there would be few, and round numbers in less than a decade."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
        if len(found) >= 4:
            break
    else:
        return _linear_ticks(low, high)
    step = -(-len(found) // 8)
    return tuple(Tick(value, short(value)) for value in found[::step])


def _linear_ticks(low: float, high: float) -> tuple[Tick, ...]:
    """About five round numbers."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    values = [i * step for i in range(first, last + 1)]
    labels = [short(value) for value in values]
    if len(set(labels)) < len(labels):
        labels = [f"{value:.10g}" for value in values]
    return tuple(map(Tick, values, labels))


def short(value: float) -> str:
    """A number in three digits or fewer: 0.002, 1.5, 64k, 2.1M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / min(size, 1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"


def _shown(series: Series, chart: Chart) -> list[tuple[float, float]]:
    """Its points that the axes can have."""
    finite = [point for point in series.points if all(map(math.isfinite, point))]
    return [(x, y) for x, y in finite if (x > 0 or not chart.x.log) and (y > 0 or not chart.y.log)]


def _colour(series: Series, index: int) -> int:
    return (index if series.colour is None else series.colour) % COLOURS


def _marks(series: Series, index: int, chart: Chart, across: _Scale, up: _Scale) -> str:
    titles = dict(zip(series.points, series.titles, strict=False))
    shown = _shown(series, chart)
    if not shown:
        return ""
    places = [(across(x), up(y)) for x, y in shown]
    parts = []
    if series.line:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="line{" dashed" * series.dashed}" d="{path}"/>')
    for point, (x, y) in zip(shown, places, strict=True) if series.dots else ():
        title = f"<title>{escape(titles[point])}</title>" if point in titles else ""
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2">{title}</circle>')
    return f'<g class="c{_colour(series, index)}">{"".join(parts)}</g>'
