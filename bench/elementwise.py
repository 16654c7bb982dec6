"""What the benchmarks of single ops share: one training step, a copy of as many bytes, the target of the small ops."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from posttrain.bench.case import BOTH, Case, randn
from posttrain.bench.device import DEVICE, DTYPE
from posttrain.bench.interleave import interleave
from posttrain.bench.measure import OURS, PLAIN, calls_of
from posttrain.bench.shapes import ModelShape, Suite

__all__ = ["DEVICE", "DTYPE", "copies", "hold_to_target", "randn", "step", "suite_of"]
Function = Callable[..., Tensor | Sequence[Tensor]]
TARGET = 2.0  # times the speed of plain PyTorch


def suite_of(tokens: int, gate: str = "swiglu") -> Suite:
    """Cases of width 1024, inside the MLP as well, with 16 heads and as many key heads."""
    return Suite("targets", (ModelShape("targets", 1024, 1024, 1, 16, 16, 64, 8192, gate=gate),), (), tokens, rounds=21)


def hold_to_target(publish: Callable[..., None], name: str, case: Case) -> None:
    """Publish forward and backward of a case against plain PyTorch, beside peers and a copy of as many bytes."""
    problem = case.make()
    calls, missing = calls_of(problem, case.peers, BOTH)
    first = problem.arguments[0]
    calls["copying as many bytes"] = copies(case.work[BOTH].moved / first.nbytes, first)
    comparison = interleave(calls, PLAIN, rounds=21)
    publish(name, str(case), comparison, target=TARGET, **missing)
    assert comparison.speedup[OURS].median >= TARGET


def step(function: Function, inputs: Sequence[Tensor]) -> Callable[[], None]:
    """Forward and backward of `function` on `inputs`, leaving their gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    incoming = [torch.randn_like(y) for y in ([outputs] if isinstance(outputs, Tensor) else outputs)]

    def run() -> None:
        for x in leaves:
            x.grad = None
        torch.autograd.backward(function(*leaves), incoming)

    return run


def copies(tensors: float, like: Tensor) -> Callable[[], None]:
    """Reads and writes `tensors` tensors like `like`, by copying memory that is already there."""
    source = torch.zeros(int(tensors / 2 * like.numel()), device=like.device, dtype=like.dtype)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
