"""`posttrain tune`: measure the block sizes of the Triton kernels on this GPU, and keep those that are faster.

From the shipped sizes the search goes to their neighbours, of which each has one size doubled or halved, or a stage
more or less; as long as one of them is faster, on to its neighbours. All sizes of a round take turns, as in
`posttrain bench`, on the shapes of a model of 8 billion weights. Sizes that don't compile, don't fit, or give results
further than twice as far from the truth as the shipped ones are out. What is measured has the features that take shared
memory (adapters, both passes), so that sizes that pass here fit there.

This happens only here, never in a training step: posttrain/ops/block_sizes.py says how kernels get to know.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain import ops
from posttrain.bench.case import BOTH, FORWARD, Case, Problem, Work, randn
from posttrain.bench.cases import attention, decode, lora, nf4
from posttrain.bench.device import DEVICE, WIDER
from posttrain.bench.measure import OURS, PLAIN, NotMeasured, measure
from posttrain.bench.shapes import SUITES, ModelShape
from posttrain.ops.backend import use_backend
from posttrain.ops.block_sizes import cache_file, try_sizes, tuned

Sizes = tuple[int, ...]
LEAST = 1.03  # times as fast, at least, as the sizes that were the best before
_ROUNDS = 9


class Range(NamedTuple):
    """Where a size may lie; it is doubled and halved, or else goes by steps of one."""

    low: int
    high: int
    doubled: bool = True


_TILE, _WARPS, _STAGES = Range(16, 256), Range(2, 8), Range(1, 5, False)
_GEMM = (_TILE, _TILE, _TILE, _WARPS, _STAGES)
_ATTENTION = (_TILE, _TILE, _WARPS, _STAGES)


@dataclass(frozen=True)
class Tunable:
    """A kernel's block sizes.

    Attributes:
        name: as the kernel asks posttrain/ops/block_sizes.py for them.
        shipped: what its table has for this GPU.
        ranges: of each size.
        source: whether the table has a row for this GPU: "shipped" or "default".
        case: what to measure, in its last pass; None if the kernel isn't used on this GPU.
    """

    name: str
    shipped: Sizes
    ranges: tuple[Range, ...]
    source: str
    case: Case | None

    @property
    def op(self) -> str:
        """The first word of the name."""
        return self.name.split()[0]


@dataclass(frozen=True)
class Measured:
    """Seconds by sizes, and why others have none."""

    seconds: dict[Sizes, float]
    missing: dict[Sizes, str]


@dataclass(frozen=True)
class Found:
    """The fastest sizes, how many times as fast they are as the shipped ones, and how many were tried."""

    sizes: Sizes
    factor: float
    tried: int
    missing: dict[Sizes, str]


Timer = Callable[[Tunable, Sequence[Sizes]], Measured]
Keeper = Callable[[str, Sizes | None], object]


def neighbours(sizes: Sizes, ranges: Sequence[Range]) -> Iterator[Sizes]:
    """Sizes that differ in one place by a step, within the ranges."""
    for i, (size, (low, high, doubled)) in enumerate(zip(sizes, ranges, strict=True)):
        for other in (size * 2, size // 2) if doubled else (size + 1, size - 1):
            if low <= other <= high:
                yield (*sizes[:i], other, *sizes[i + 1 :])


def search(tunable: Tunable, timer: Timer) -> Found:
    """Walk from the shipped sizes to faster neighbours until none is `LEAST` times as fast."""
    best, factor, tried = tunable.shipped, 1.0, {tunable.shipped}
    missing: dict[Sizes, str] = {}
    while new := [sizes for sizes in neighbours(best, tunable.ranges) if sizes not in tried]:
        tried.update(new)
        measured = timer(tunable, [best, *new])
        missing |= measured.missing
        fastest = min(measured.seconds, key=measured.seconds.__getitem__)
        gain = measured.seconds[best] / measured.seconds[fastest]
        if gain < LEAST:
            break
        best, factor = fastest, factor * gain
    return Found(best, factor, len(tried), missing)


def timed(tunable: Tunable, sizes: Sequence[Sizes]) -> Measured:
    """Measure sizes side by side, the first of which must be right. Raises `NotMeasured` if it isn't."""
    assert tunable.case is not None
    case = tunable.case
    name = case.passes[-1]

    made: list[Problem] = []

    def ours(chosen: Sizes) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            try_sizes(tunable.name, chosen)  # until the next call: the backward follows before that
            return made[-1].ours(*arguments)

        return call

    def make() -> Problem:
        made.append(case.make())
        return replace(made[-1], ours=ours(sizes[0]))

    labels = {str(each): each for each in sizes[1:]}
    makers = {label: lambda _, each=each: ours(each) for label, each in labels.items()}
    try:
        with use_backend("triton", case.op):
            table = measure(replace(case.only(name), make=make, peers=makers), _ROUNDS, peers=True)[name]
    finally:
        try_sizes(tunable.name, None)
    seconds = {sizes[0]: table.comparison.seconds[OURS].median}
    missing = {labels[label]: why for label, why in table.missing.items()}
    limit = 2 * table.columns[OURS].error
    for label, column in table.columns.items():
        if label in labels and column.error <= limit:
            seconds[labels[label]] = table.comparison.seconds[label].median
        elif label not in (OURS, PLAIN):
            missing[labels[label]] = f"is off by {column.error:.2g}, where {limit:.2g} are allowed"
    return Measured(seconds, missing)


def tune(tunables: Sequence[Tunable], timer: Timer, tell: Callable[[str], None], keep: Keeper) -> None:
    """Search all. `keep` gets each name and the sizes that are better than the shipped ones, or None; `tell` a line."""
    for tunable in tunables:
        if tunable.case is None:
            tell(f"{tunable.name}: not used on this GPU")
            continue
        try:
            best = search(tunable, timer)
        except NotMeasured as reason:
            tell(f"{tunable.name}: nothing measured: {reason}")
            continue
        better = None if best.sizes == tunable.shipped else best.sizes
        keep(tunable.name, better)
        result = f"{best.sizes} is {best.factor:.2f} times as fast" if better else "stays"
        tell(f"{tunable.name}: {tunable.shipped} {result}; {best.tried} tried, {len(best.missing)} of them can't run")


def choices(gpu: str, capability: int) -> Iterator[tuple[str, str]]:
    """(kernel, its block sizes and where they come from) on a GPU of this model and compute capability."""
    cached = tuned(gpu)
    for tunable in tunables(capability):
        if tunable.name in cached:
            yield tunable.name, f"{tuple(cached[tunable.name])}: tuned ({cache_file()})"
        else:
            yield tunable.name, f"{tunable.shipped}: {tunable.source}"


def tunables(capability: int) -> list[Tunable]:
    """Those of a GPU of this compute capability (90 for sm_90)."""
    from posttrain.kernels import logprob as logprob_kernels
    from posttrain.kernels import lora as lora_kernels
    from posttrain.kernels import nf4 as nf4_kernels
    from posttrain.kernels import packed_attention as attention_kernels
    from posttrain.kernels import paged_attention as paged_kernels

    found = []

    def add(name: str, table: dict[int, Any], ranges: tuple[Range, ...], case: Case | None, key: Any = None) -> None:
        row = max(known for known in table if known <= max(capability, 80))
        sizes = table[row] if key is None else table[row][key]
        found.append(Tunable(name, tuple(sizes), ranges, "shipped" if row == capability else "default", case))

    for width in (64, 128, 256):
        forward, both = _attention(width)
        for kernel, table, case in (
            ("forward", attention_kernels.FORWARD, forward),
            ("dkv", attention_kernels.DKV, both),
            ("dq", attention_kernels.DQ, both),
        ):
            add(f"packed_attention {kernel} {width}", table, _ATTENTION, case, width)
    add("linear_logprob wide", logprob_kernels.WIDE, _GEMM, _logprob(rich=False))
    add("linear_logprob narrow", logprob_kernels.NARROW, _GEMM, _logprob(rich=True))
    fused = lora_kernels.FUSED[max(known for known in lora_kernels.FUSED if known <= max(capability, 80))]
    add("lora_linear", lora_kernels.BLOCKS, _GEMM, _lora() if fused else None)
    everywhere = {capability: tuple(nf4_kernels.MATVEC.values())}
    add("nf4_linear", everywhere, (Range(1, 32), Range(64, 1024), _WARPS), _first(nf4.nf4_linear))
    for width, sizes in paged_kernels.DECODE.items():
        case = _first(decode.paged_attention, _shape(width))
        add(f"paged_attention decode {width}", {capability: sizes}, _ATTENTION, case)
    return found


def _shape(width: int) -> ModelShape:
    """Llama 3 8B with heads of another width."""
    model = SUITES["full"].models[0]
    return replace(model, width=width, heads=32 * 128 // width, key_heads=max(1, 8 * 128 // width))


def _first(cases: Callable[..., list[Case]], model: ModelShape | None = None) -> Case:
    """An op's first case of the forward alone, on one model."""
    case = cases(replace(SUITES["full"], models=(model or SUITES["full"].models[0],)))[0]
    return replace(case.only(case.passes[0]), peers={})


def _lora() -> Case:
    """Both passes with the largest rank that one block takes."""
    model = replace(SUITES["full"].models[0], rank=64)
    case = lora.lora_linear(replace(SUITES["full"], models=(model,)))[0]
    return replace(case.only(BOTH), peers={})


def _attention(width: int) -> tuple[Case, Case]:
    """One causal sequence: its forward, and both passes."""
    case = attention.packed_attention(replace(SUITES["full"], models=(_shape(width),)))[0]
    case = replace(case, peers={})
    return case.only(FORWARD), case.only(BOTH)


def _logprob(rich: bool) -> Case:
    """Forward and backward with an adapter on the head; `rich` also has a bias, a softcap and the entropy."""
    tokens, model = SUITES["full"].tokens, SUITES["full"].models[0]
    need = 8.0 * tokens * model.vocabulary * WIDER.itemsize

    def make() -> Problem:
        hidden, words, rank = model.hidden, model.vocabulary, 32
        x, weight = randn(tokens, hidden, grad=True), randn(words, hidden, scale=hidden**-0.5, grad=True)
        low, high = randn(rank, hidden, scale=hidden**-0.5, grad=True), randn(words, rank, scale=0.1, grad=True)
        y, bias = torch.randint(words, (tokens,), device=DEVICE), randn(words, grad=True)
        features: dict[str, Any] = {"softcap": 30.0, "need_entropy": True} if rich else {}

        def ours(x: Tensor, weight: Tensor, low: Tensor, high: Tensor, y: Tensor, *bias: Tensor) -> Tensor:
            first = bias[0] if bias else None
            out = ops.linear_logprob(x, weight, y, bias=first, lora=(low, high, 1.0), **features)
            return -out.logprob.sum() if out.entropy is None else out.entropy.sum() - out.logprob.sum()

        def plain(*arguments: Tensor) -> Tensor:
            with use_backend("reference", "linear_logprob"):
                return ours(*arguments)

        return Problem((x, weight, low, high, y, *[bias] * rich), ours, plain)

    work = {BOTH: Work(6.0 * tokens * model.hidden * model.vocabulary, 0.0)}
    return Case("linear_logprob", "rich" if rich else "plain", need, make, work)
