"""A case: an op on one shape, computed by several functions that are held to one truth.

Case       what there is to measure, before any memory is taken
Problem    its tensors, our function and plain PyTorch's, and how much work they do
Way        a function of somebody's, and how our tensors become its own
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.bench.device import DEVICE, DTYPE
from posttrain.ops import NF4Weight

Arguments = tuple[Any, ...]
Function = Callable[..., Any]
FORWARD, BOTH = "forward", "forward+backward"


class Unavailable(RuntimeError):
    """A peer has nothing for this device or problem; the message says what."""


class Work(NamedTuple):
    """Least work of a pass: arithmetic operations, and bytes read and written."""

    flops: float
    moved: float


def same(value: Any) -> Any:
    """`value`."""
    return value


class Way(NamedTuple):
    """How somebody computes the problem.

    Attributes:
        call: function of its own arguments.
        prepare: makes these of the problem's, outside the time.
        into: makes a gradient of its output of one of ours.
        back: makes a tensor of our shape of its output or of a gradient.
    """

    call: Function
    prepare: Callable[[Arguments], Arguments] = same
    into: Callable[[Tensor], Tensor] = same
    back: Callable[[Tensor], Tensor] = same


@dataclass(frozen=True)
class Problem:
    """An op with its arguments.

    Attributes:
        arguments: of all functions; tensors that require a gradient get one in the backward.
        ours: the op.
        plain: what transformers or PyTorch does, in any floating dtype: the yardstick, and in a wider dtype the truth.
        context: what peers want to know beside the arguments.
        checked: makes of arguments in the wider dtype and of a function's output the tensors that must agree with
            those of the truth; by default the output as it is.
        truth: the tensors that the outputs must agree with, where plain PyTorch in a wider dtype doesn't give them.
    """

    arguments: Arguments
    ours: Function
    plain: Function
    context: SimpleNamespace = field(default_factory=SimpleNamespace)
    checked: Callable[[Arguments, Any], Sequence[Tensor]] | None = None
    truth: Callable[[], Sequence[Tensor]] | None = None


@dataclass(frozen=True)
class Case:
    """An op on one shape.

    Attributes:
        op: name of the op, or of the training step.
        title: the shape in words.
        need: bytes that the arguments, the truth and the most wasteful function take.
        make: makes the problem.
        work: by pass; a case without a backward has only a forward.
        peers: functions of others, by name.
        axis, size: in the suite scaling the name of the size that grows, and the size.
    """

    op: str
    title: str
    need: float
    make: Callable[[], Problem]
    work: Mapping[str, Work]
    peers: Mapping[str, Callable[[Problem], Way | Function]] = field(default_factory=dict)
    axis: str | None = None
    size: int | None = None

    def __str__(self) -> str:
        return f"{self.op} {self.title}"

    @property
    def passes(self) -> tuple[str, ...]:
        """Names of the passes."""
        return tuple(self.work)

    def only(self, name: str) -> "Case":
        """The case with one of its passes."""
        return replace(self, work={name: self.work[name]})


def randn(*shape: int, scale: float = 1.0, grad: bool = False) -> Tensor:
    """Random numbers on the device, in the dtype that is measured there."""
    return (scale * torch.randn(shape, device=DEVICE)).to(DTYPE).requires_grad_(grad)


def tensors_of(arguments: Arguments) -> list[Tensor]:
    """The tensors among `arguments` and inside their 4-bit matrices."""
    found = []
    for value in arguments:
        found += [value] if isinstance(value, Tensor) else []
        found += [value.packed, value.absmax] if isinstance(value, NF4Weight) else []
    return found


def copied(arguments: Arguments, dtype: torch.dtype | None = None) -> Arguments:
    """The same values elsewhere in memory, floating tensors in `dtype`."""

    def copy(value: Any) -> Any:
        if isinstance(value, NF4Weight):
            return replace(value, packed=value.packed.clone(), absmax=value.absmax.clone())
        if not isinstance(value, Tensor):
            return value
        wanted = dtype if dtype and value.is_floating_point() else value.dtype
        return value.detach().to(wanted, copy=True).requires_grad_(value.requires_grad)

    return tuple(copy(value) for value in arguments)


def leaves_of(arguments: Arguments) -> list[Tensor]:
    """The tensors that get a gradient."""
    return [value for value in arguments if isinstance(value, Tensor) and value.requires_grad]


def outputs_of(result: Any) -> list[Tensor]:
    """The tensors of a result that is one or several."""
    return [result] if isinstance(result, Tensor) else list(result)
