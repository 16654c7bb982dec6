"""What the benchmarks of the elementwise ops share: the peers, one training step, and a copy of as many bytes."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from posttrain.bench.interleave import Comparison, interleave

Function = Callable[..., Tensor | Sequence[Tensor]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32


def randn(*shape: int) -> Tensor:
    """Random numbers on the device, in the dtype that is measured there."""
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


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


def compare(functions: Mapping[str, Function], inputs: Sequence[Tensor], passes: float) -> Comparison:
    """Steps of `functions`, the first of them the baseline, beside a copy that moves as many bytes.

    `passes` is how many tensors of the size of inputs[0] a perfect forward and backward read and write.
    """
    steps = {name: step(function, inputs) for name, function in functions.items()}
    return interleave(
        {**steps, "copying as many bytes": copies(passes, inputs[0])}, baseline=next(iter(functions)), rounds=21
    )


def compiled(function: Function) -> Function:
    """`torch.compile(function)`, which also compiles its backward."""
    return torch.compile(function, dynamic=False)
