"""How a cost grows with a size: the exponent b of cost = a size^b.

log cost = log a + b log size is a line; b is its slope by least squares, over all sizes that were measured. The
residual is the root mean square of what remains, as a factor: 1.03 says that the measured costs lie 3% around the
power. At small sizes launches and threads take their time, so that b comes out below the true order there, and the
residual large.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Power(NamedTuple):
    """cost = factor size^exponent, and how far the costs lie around it."""

    factor: float
    exponent: float
    residual: float

    def __call__(self, size: float) -> float:
        return self.factor * size**self.exponent

    def text(self, size: str) -> str:
        """In words, for a size of this name."""
        return f"{size}^{self.exponent:.2f} (±{self.residual - 1:.0%})"


def fit(points: Sequence[tuple[float, float]]) -> Power | None:
    """The power through (size, cost); None with fewer than two sizes or with a cost that is 0 or less."""
    if len({size for size, _ in points}) < 2 or min(cost for _, cost in points) <= 0:
        return None
    logs = [(math.log(size), math.log(cost)) for size, cost in points]
    x, y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    slope = sum((a - x) * (b - y) for a, b in logs) / sum((a - x) ** 2 for a, _ in logs)
    left = [b - y - slope * (a - x) for a, b in logs]
    return Power(math.exp(y - slope * x), slope, math.exp(math.sqrt(sum(r * r for r in left) / len(left))))
