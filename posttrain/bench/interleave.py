"""Side-by-side timing: several functions take turns in one process, so that whatever else the machine does hits all.

Within a round every function runs once, in an order that rotates from round to round. The ratio of two functions is
taken round by round; its median and its 20th and 80th percentiles say how fast and how sure.

On a CPU freed memory stays with the process, as with the allocators that PyTorch's tuning guide recommends: else every
large result, of ours as of the peers, would wait for the system's page faults, on a virtual machine for the host's.
"""

import ctypes
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

FEWEST = 3  # rounds, if there are to be more


@dataclass(frozen=True)
class Spread:
    """Median and 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(values: list[float]) -> "Spread":
        """The spread of at least two values."""
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        return Spread(statistics.median(values), fifths[0], fifths[-1])


@dataclass(frozen=True)
class Comparison:
    """Seconds per call, and how many times the baseline's speed, by name."""

    baseline: str
    seconds: dict[str, Spread]
    speedup: dict[str, Spread]

    @staticmethod
    def of(baseline: str, samples: Mapping[str, list[float]]) -> "Comparison":
        """From the seconds of each round, by name; the ratio of two is taken round by round."""
        ratios = {
            name: [b / s for b, s in zip(samples[baseline], values, strict=True)] for name, values in samples.items()
        }
        return Comparison(
            baseline,
            {name: Spread.of(values) for name, values in samples.items()},
            {name: Spread.of(values) for name, values in ratios.items()},
        )

    def table(self, title: str) -> str:
        """The comparison as text, one line per function."""
        width = max(map(len, (title, *self.seconds)))
        head = f"{title:<{width}}  {'median ms':>10} {'p20':>9} {'p80':>9}   speed against {self.baseline}"
        lines = [
            f"{name:<{width}}  {1e3 * t.median:>10.3f} {1e3 * t.p20:>9.3f} {1e3 * t.p80:>9.3f}   "
            f"{self.speedup[name].median:.2f} ({self.speedup[name].p20:.2f} to {self.speedup[name].p80:.2f})"
            for name, t in self.seconds.items()
        ]
        return "\n".join([head, *lines])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def interleave(
    functions: Mapping[str, Callable[[], object]],
    baseline: str,
    rounds: int = 15,
    min_seconds: float = 0.005,
    keep_freed_memory: bool = True,
) -> Comparison:
    """Time `functions` in turn, as `alternate` does, against the one named `baseline`."""
    if baseline not in functions:
        raise ValueError(f"interleave: no function named {baseline!r} among {', '.join(functions)}")
    return Comparison.of(baseline, alternate(functions, rounds, min_seconds, keep_freed_memory))


def alternate(
    functions: Mapping[str, Callable[[], object]],
    rounds: int = 15,
    min_seconds: float = 0.005,
    keep_freed_memory: bool = True,
    seconds: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds per call of `functions`, each of which takes no argument, by name and round.

    A sample is one call, or as many calls as last `min_seconds`. Every function is called before, twice if a call
    takes less than a second. Where `rounds` would take more than `seconds`, there are fewer, but at least three. Once
    freed memory is kept, it is for the rest of the process.
    """
    if keep_freed_memory:
        _keep_freed_memory()
    calls, whole = {}, 0.0
    for name, function in functions.items():
        first = _sample(function, 1)
        last = first if first > 1 else _sample(function, 1)
        calls[name] = max(1, math.ceil(min_seconds / last))
        whole += calls[name] * last
    if rounds * whole > seconds:
        rounds = min(rounds, max(FEWEST, int(seconds / whole)))
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            samples[name].append(_sample(functions[name], calls[name]))
    return samples


def _keep_freed_memory() -> None:
    """glibc's M_MMAP_MAX = 0 and M_TRIM_THRESHOLD = -1, "never"; other libraries are left as they are."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)
        libc.mallopt(-1, -1)


def _sample(function: Callable[[], object], calls: int) -> float:
    """Seconds per call."""
    _synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _synchronize()
    return (time.perf_counter() - start) / calls


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
