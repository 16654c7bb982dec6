"""What the benchmarks of single ops share: one training step, and a copy of as many bytes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from posttrain.bench.case import randn
from posttrain.bench.device import DEVICE, DTYPE

__all__ = ["DEVICE", "DTYPE", "copies", "randn", "step"]
Function = Callable[..., Tensor | Sequence[Tensor]]


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
