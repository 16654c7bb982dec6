"""Measure a case: is there room for it, is everybody right, how much memory, how fast.

Nothing is timed before outputs and gradients agree with the truth, plain PyTorch in a wider dtype (float64 for float32,
else float32). Ours must keep the rules of the tests: in float32 be within 1e-5 + 1.3e-6 of the value; in other dtypes,
and where values are so large that plain PyTorch in float32 isn't within that either, have at most twice the error of
plain PyTorch in the same dtype, plus twice the rounding of the result. Of others it is asked that no value is off by
more than 2% of the largest, so that a peer that computes in a coarser dtype stays in the table, with its error beside
its speed.

A case has `Suite.seconds`. One that would take longer even at the device's best rates isn't begun, and one whose rounds
would take longer has fewer, but never below three, so that a run ends: the seconds are no bound, and peers add theirs.

All who are right take turns in one process; before every call, whoever's it is, the arguments move on to a copy that
caches have forgotten. `calls_of` is for comparisons that time the same arguments again and again.
"""

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.bench.case import (
    BOTH,
    Arguments,
    Case,
    Problem,
    Unavailable,
    Way,
    copied,
    leaves_of,
    outputs_of,
    tensors_of,
)
from posttrain.bench.device import ROTATED, WIDER, Roofline, cache_bytes, free_bytes
from posttrain.bench.interleave import Comparison, alternate
from posttrain.bench.memory import peak_of
from posttrain.bench.peers import Makers

OURS, PLAIN = "posttrain", "plain PyTorch"
Call = Callable[[], object]
_CALLS = 16  # of ours and of plain PyTorch before and in the fewest rounds, the truth counted as two
COARSE = 0.02  # of the largest value, the most by which a peer may be off


class NotMeasured(Exception):
    """There are no figures, and the message says why; of a failed gate of ours if `wrong`."""

    def __init__(self, why: str, wrong: bool = False) -> None:
        super().__init__(why)
        self.wrong = wrong


@dataclass(frozen=True)
class Column:
    """The figures of one function in one pass.

    Attributes:
        samples: seconds per call, round by round.
        error: largest difference from the truth, of outputs and gradients, as a share of the largest true value.
        peak: bytes that a call takes at most beyond its arguments: outputs, gradients and workspace; None if unknown.
    """

    samples: list[float]
    error: float
    peak: int | None


@dataclass(frozen=True)
class Table:
    """A pass of a case: its work, the columns that have figures, their comparison, and why others have none."""

    flops: float
    moved: float
    columns: dict[str, Column]
    comparison: Comparison
    missing: dict[str, str]


def least_seconds(case: Case, roofline: Roofline) -> float:
    """What a case takes at the device's best rates: the gate and the fewest rounds of ours and of plain PyTorch."""
    return _CALLS * sum(roofline.least(*work) for work in case.work.values())


def measure(
    case: Case, rounds: int, peers: bool = False, roofline: Roofline | None = None, seconds: float = math.inf
) -> dict[str, Table]:
    """The tables of a case, by pass.

    Args:
        case: what to measure.
        rounds: samples of each function.
        peers: whether others' functions are measured, too.
        roofline: the device's best rates, by which it is reckoned whether `seconds` are enough.
        seconds: that the case may take. What the gate leaves of them is for the rounds of the passes, of which there
            are three in any case.

    Raises:
        NotMeasured: without room or time, or if our function is wrong.
    """
    free = free_bytes()
    if case.need > free:
        raise NotMeasured(f"needs {case.need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free")
    if roofline and (least := least_seconds(case, roofline)) > seconds:
        raise NotMeasured(f"would take {least:.0f} s at the rates of the roofline, and a case may take {seconds:.0f} s")
    torch.manual_seed(0)
    try:
        return _tables(case, rounds, peers, time.perf_counter() + seconds)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise NotMeasured(f"out of memory, where {case.need / 2**30:.1f} GiB were reckoned with") from error


def _tables(case: Case, rounds: int, peers: bool, deadline: float) -> dict[str, Table]:
    problem = case.make()
    ways, absent = _ways(problem, case.peers if peers else {})
    missing = {name: dict(absent) for name in case.passes}
    right = {name: _gate(problem, name, ways, missing[name]) for name in case.passes}
    sets = _sets(problem)
    tables = {}
    for number, name in enumerate(case.passes):
        calls = _calls(ways, right[name], sets, name, missing[name])
        gc.collect()
        peaks = {who: peak_of(call) for who, call in calls.items()}
        samples = alternate(calls, rounds, seconds=(deadline - time.perf_counter()) / (len(case.passes) - number))
        columns = {who: Column(samples[who], right[name][who], peaks[who]) for who in calls}
        tables[name] = Table(*case.work[name], columns, Comparison.of(PLAIN, samples), missing[name])
    return tables


def calls_of(problem: Problem, peers: Makers, name: str) -> tuple[dict[str, Call], dict[str, str]]:
    """Calls of a pass by those who are right, all on the problem's own arguments, and why others have none.

    Raises `NotMeasured` if our function is wrong.
    """
    ways, missing = _ways(problem, peers)
    right = _gate(problem, name, ways, missing)
    return _calls(ways, right, [problem.arguments], name, missing), missing


def _ways(problem: Problem, peers: Makers) -> tuple[dict[str, Way], dict[str, str]]:
    """Ours, plain PyTorch's and the peers' functions, and why peers have none."""
    ways, missing = {OURS: Way(problem.ours), PLAIN: Way(problem.plain)}, {}
    for name, maker in peers.items():
        try:
            made = maker(problem)
            ways[name] = made if isinstance(made, Way) else Way(made)
        except Exception as error:  # whatever a peer does, the others are measured
            missing[name] = describe(error)
    return ways, missing


def describe(error: BaseException) -> str:
    """An error in one short line."""
    if isinstance(error, Unavailable):
        return str(error)
    if isinstance(error, ImportError):
        return f"not installed: {error}"
    return f"fails: {type(error).__name__} {' '.join(str(error).split())[:160]}"


def _gate(problem: Problem, name: str, ways: Mapping[str, Way], missing: dict[str, str]) -> dict[str, float]:
    """Errors of those who are right in a pass; others go to `missing`. Raises `NotMeasured` if ours is wrong."""
    wide = copied(problem.arguments, WIDER)
    incoming = _incoming(problem) if name == BOTH else []
    if problem.truth is None:
        truth = _results(problem, Way(problem.plain), wide, wide, incoming)
    else:
        truth = list(problem.truth())
    found, errors = {}, {}
    for who, way in ways.items():
        try:
            found[who] = _results(problem, way, problem.arguments, wide, incoming)
            errors[who] = max(map(_error, found[who], truth), default=0.0)
        except Exception as error:  # of a peer, or of ours, which is then raised below
            if who == OURS:
                raise NotMeasured(f"{OURS} {describe(error)}", wrong=True) from error
            missing[who] = describe(error)
    if PLAIN not in found:
        raise NotMeasured(f"plain PyTorch, the yardstick, {missing[PLAIN]}", wrong=True)
    if fault := _fault(found[OURS], found[PLAIN], truth):
        raise NotMeasured(f"{OURS} is wrong: {fault}", wrong=True)
    coarse = {who: off for who, off in errors.items() if who not in (OURS, PLAIN) and not off <= COARSE}
    missing.update({who: f"is wrong: off by {off:.2g} of the largest value" for who, off in coarse.items()})
    return {who: off for who, off in errors.items() if who not in coarse}


def _incoming(problem: Problem) -> list[Tensor]:
    """A random gradient for each output."""
    with torch.no_grad():
        outputs = outputs_of(problem.plain(*problem.arguments))
    return [torch.randn_like(y) for y in outputs]


def _results(problem: Problem, way: Way, given: Any, wide: Any, incoming: list[Tensor]) -> list[Tensor]:
    """What must be right: outputs without a gradient or, given gradients of them, those with one and the gradients."""
    arguments = way.prepare(copied(given))
    if not incoming:
        with torch.no_grad():
            result = way.call(*arguments)
        return list(problem.checked(wide, result)) if problem.checked else [way.back(x) for x in outputs_of(result)]
    outputs = outputs_of(way.call(*arguments))
    seeds = [way.into(g).to(y.dtype) for g, y in zip(incoming, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves_of(arguments), seeds)
    return [way.back(x.detach()) for x in (*outputs, *gradients)]


def _error(found: Tensor, true: Tensor) -> float:
    """Largest difference, as a share of the largest true value; a truth of zeros has absolute differences."""
    if not true.numel():
        return 0.0
    off = (found.to(true.dtype) - true).abs().max().item()
    return off / (true.abs().max().item() or 1.0) if math.isfinite(off) else math.inf


def _fault(found: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> str | None:
    """What is wrong with our results, or None."""
    for mine, other, true in zip(found, plain, truth, strict=True):
        if mine.dtype in (torch.float32, torch.float64):
            if _close(mine, true):
                continue
            if _close(other, true):
                off = (mine.to(true.dtype) - true).abs().max()
                return f"an error of {off:.3g}, more than 1e-5 + 1.3e-6 of the value"
        rounding = ((true.to(mine.dtype) + 0.3 - 0.3).to(true.dtype) - true).abs().max()
        error, limit = (mine.to(true.dtype) - true).abs().max(), 2 * (other.to(true.dtype) - true).abs().max()
        if not error <= limit + 2 * rounding:
            return f"an error of {error:.3g}, where {limit + 2 * rounding:.3g} are allowed"
    return None


def _close(found: Tensor, true: Tensor) -> bool:
    return torch.allclose(found.to(true.dtype), true, 1.3e-6, 1e-5)


def _sets(problem: Problem) -> list[Arguments]:
    """The arguments, and as many copies of them as exceed the caches twice over."""
    size = max(1, sum(x.nbytes for x in tensors_of(problem.arguments)))
    room = min(2 * cache_bytes(), ROTATED, free_bytes() // 4)
    return [problem.arguments, *(copied(problem.arguments) for _ in range(min(64, room // size)))]


def _calls(
    ways: Mapping[str, Way], right: Iterable[str], sets: list[Arguments], name: str, missing: dict[str, str]
) -> dict[str, Call]:
    """Calls of a pass that have run once; of peers that can't, `missing` gets to know why."""
    calls: dict[str, Call] = {}
    turns = itertools.count()
    for way_name in right:
        try:
            call = _call(ways[way_name], sets, turns, backward=name == BOTH)
            call()
            calls[way_name] = call
        except Exception as error:  # out of memory, say
            if way_name in (OURS, PLAIN):
                raise NotMeasured(f"{way_name} {describe(error)}", wrong=way_name == OURS) from error
            missing[way_name] = describe(error)
    return calls


def _call(way: Way, sets: list[Arguments], turns: Iterator[int], backward: bool) -> Call:
    """The function on one set of arguments after the other; others that share `turns` have those in between."""
    prepared = [way.prepare(arguments) for arguments in sets]
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                way.call(*prepared[next(turns) % len(prepared)])

        return forward
    with torch.no_grad():
        incoming = [torch.randn_like(y) for y in outputs_of(way.call(*prepared[0]))]

    def both() -> None:
        arguments = prepared[next(turns) % len(prepared)]
        torch.autograd.grad(outputs_of(way.call(*arguments)), leaves_of(arguments), incoming)

    return both
