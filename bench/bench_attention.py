"""packed_attention: what `posttrain bench packed_attention` runs, comparisons with targets, and rates on a GPU.

Comparisons are of the forward alone and of forward and backward: dense, many documents, and a prompt that completions
share. FlexAttention has no backward on a CPU. The rates are what the targets of an H100 are made of: TFLOP/s of the
pairs that are seen, and tokens per second.
"""

from collections.abc import Callable

import pytest
import torch

from posttrain.bench import attention_peers as peers
from posttrain.bench.case import BOTH, FORWARD
from posttrain.bench.cases.attention import PEERS, problem, work
from posttrain.bench.device import GPU
from posttrain.bench.interleave import interleave
from posttrain.bench.measure import OURS, PLAIN, Call, calls_of
from posttrain.bench.suite import pytest_generate_tests, test_case

__all__ = ["pytest_generate_tests", "test_case"]
OPS = ("packed_attention",)
ROUNDS = 9
each_pass = pytest.mark.parametrize("kind", [FORWARD, BOTH])


def right_calls(
    kind: str, plain: str, lengths: list[int], parents: list[int], makers: peers.Makers, heads=(8, 2), width=64
) -> tuple[dict[str, Call], dict[str, str]]:
    """Calls of ours, of SDPA sequence by sequence, which is named `plain`, and of peers; and why peers are missing."""
    forest = problem(heads, width, lengths, parents, grad=kind == BOTH)
    calls, missing = calls_of(forest, makers, kind)
    calls[plain] = calls.pop(PLAIN)
    return calls, missing


def compare(
    publish: Callable[..., None], name: str, title: str, calls: dict[str, Call], baseline: str, target, **facts: object
) -> None:
    """Publish a comparison and, on a CPU, hold it to the target."""
    result = interleave(calls, baseline, rounds=ROUNDS)
    publish(f"attention-{name}", title, result, target=target, **facts)
    if target is not None and not GPU:
        assert result.speedup[OURS].median >= target


def lengths_between(low: int, high: int, count: int) -> list[int]:
    return torch.randint(low, high + 1, (count,), generator=torch.Generator().manual_seed(1)).tolist()


@each_pass
def test_dense(kind, publish) -> None:
    calls, missing = right_calls(kind, "SDPA", [2048], [-1], PEERS)
    compare(publish, f"dense-{kind}", f"dense causal 2048, {kind}", calls, "SDPA", 1.0, **missing)


@each_pass
@pytest.mark.parametrize(
    ("name", "lengths", "heads", "width", "target"),
    [
        ("documents", lengths_between(16, 1024, 32), (8, 2), 64, 2.0),
        ("short", lengths_between(20, 250, 24), (4, 2), 32, None),
    ],
    ids=["documents", "short"],
)
def test_documents(name, lengths, heads, width, target, kind, publish) -> None:
    parents = [-1] * len(lengths)
    calls, missing = right_calls(kind, "SDPA, one by one", lengths, parents, PEERS, heads, width)
    title = f"{len(lengths)} documents of {min(lengths)} to {max(lengths)}, {kind}"
    compare(publish, f"{name}-{kind}", title, calls, "SDPA padded", target, tokens=sum(lengths), **missing)


@each_pass
def test_shared_prompt(kind, publish) -> None:
    """Against ours and SDPA on copies of the prompt, which are made outside the time."""
    prompt, group, length, plain = 1024, 8, 64, "SDPA, unshared"
    makers = {"FlexAttention": peers.flex, "prefix-grouper over SDPA": peers.prefix_grouper}
    calls, missing = right_calls(kind, plain, [prompt] + [length] * group, [-1] + [0] * group, makers)
    copies, _ = right_calls(kind, plain, [prompt + length] * group, [-1] * group, {})
    calls |= {f"{OURS}, unshared": copies[OURS], plain: copies[plain]}
    pairs = prompt**2 / 2 + group * (prompt * length + length**2 / 2)
    theory = group * (prompt + length) ** 2 / 2 / pairs
    title = f"{group} completions of {length} share a prompt of {prompt}, {kind}"
    compare(publish, f"shared-{kind}", title, calls, f"{OURS}, unshared", 4.0, theory=theory, **missing)


@pytest.mark.skipif(not GPU, reason="shapes and targets of an H100")
@pytest.mark.parametrize(
    ("name", "lengths", "parents"),
    [
        ("16k", [16384], [-1]),
        ("2k", [2048] * 40, [-1] * 40),
        ("40", [40] * 2000, [-1] * 2000),
        ("shared-16R", [4096] + [256] * 8, [-1] + [0] * 8),
        ("unshared-16R", [4352] * 8, [-1] * 8),
    ],
)
def test_rate(name, lengths, parents, report) -> None:
    shape = ((32, 8), 128, lengths, parents)
    forest, least = problem(*shape), work(*shape)
    tensors, incoming = forest.arguments, torch.randn_like(forest.arguments[0])

    def forward() -> None:
        with torch.no_grad():
            forest.ours(*tensors)

    def both() -> None:
        torch.autograd.grad(forest.ours(*tensors), tensors, incoming)

    facts = {}
    for kind, function in ((FORWARD, forward), (BOTH, both)):
        seconds = interleave({kind: function}, kind, rounds=ROUNDS).seconds[kind].median
        facts[f"{kind} TFLOP/s"] = least[kind].flops / seconds / 1e12
        facts[f"{kind} tokens/s"] = sum(lengths) / seconds
    report(f"attention-rate-{name}", [f"attention, {name}", *(f"  {k}: {v:.4g}" for k, v in facts.items())], **facts)
