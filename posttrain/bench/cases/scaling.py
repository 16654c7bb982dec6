"""The suite `scaling`: the cost of an op over one size that grows, all others held.

N        targets of linear_logprob, with a frozen head
V        its vocabulary
T        tokens of one causal sequence under packed_attention
batch    sequences that are generated together, each with a prompt of its own
G        completions of each of two prompts in a step of GRPO

The cases are those of the other suites on other sizes, of which the last pass is measured: with the backward, where
there is one. The report draws them and fits a power to each.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from posttrain.bench.case import Case
from posttrain.bench.cases import attention, logprob, rollout, steps
from posttrain.bench.shapes import Suite

_FACTORS = (0.25, 0.5, 1, 2, 4)
_BATCHES = (1, 2, 4, 8, 16, 32)
_GENERATIONS = (2, 4, 8, 16, 32)


def linear_logprob(suite: Suite) -> list[Case]:
    """Over N and over V."""
    model = suite.models[0]
    tokens = [int(factor * suite.tokens) for factor in _FACTORS]
    words = [int(factor * model.vocabulary) for factor in _FACTORS]
    over_n = {size: logprob.linear_logprob(replace(suite, tokens=size))[0] for size in tokens}
    models = {size: (replace(model, vocabulary=size),) for size in words}
    over_v = {size: logprob.linear_logprob(replace(suite, models=models[size]))[0] for size in words}
    return [*_over("N", over_n), *_over("V", over_v)]


def packed_attention(suite: Suite) -> list[Case]:
    """Over T."""
    sizes = [int(factor * suite.tokens) for factor in _FACTORS]
    return list(_over("T", {size: attention.packed_attention(replace(suite, tokens=size))[0] for size in sizes}))


def rollout_batch(suite: Suite) -> list[Case]:
    """Over the batch."""
    return list(_over("batch", {size: rollout.rollout(suite, size, 1)[0] for size in _BATCHES}))


def grpo(suite: Suite) -> list[Case]:
    """Over G."""
    return list(_over("G", {size: steps.grpo(suite, size)[0] for size in _GENERATIONS}))


def _over(axis: str, cases: dict[int, Case]) -> Iterator[Case]:
    for size, case in cases.items():
        last = case.only(case.passes[-1])
        yield replace(last, title=f"{axis} = {size}: {case.title}", axis=axis, size=size)


SCALING: dict[str, Callable[[Suite], list[Case]]] = {
    "packed_attention": packed_attention,
    "linear_logprob": linear_logprob,
    "grpo": grpo,
    "rollout": rollout_batch,
}
