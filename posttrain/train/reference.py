"""Reference: the policy a run starts from, or another model, to be compared with.

A reference is a function that gives a context in which a model says what the reference policy says: in evaluation mode
and without gradients. None of the three needs a second module beside the trained one, unless it is another model:

    adapter_off     the trained model with its adapter switched off: for an adapter that starts at nothing
    frozen_copy     the trained model with copies of its first weights (or adapter) put in place of those it has now
    other_model     a model of its own
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

Reference = Callable[[], AbstractContextManager[Any]]


def adapter_off(model: Any) -> Reference:
    """The PEFT model `model` without its adapter."""

    @contextmanager
    def reference() -> Iterator[Any]:
        with model.disable_adapter(), inference(model):
            yield model

    return reference


def frozen_copy(model: nn.Module, half: torch.dtype | None = None) -> Reference:
    """`model` as it is now; what is trained is copied, in `half` where it is float32 and the run computes in `half`."""
    first = [(parameter, _copy(parameter, half)) for parameter in model.parameters() if parameter.requires_grad]

    @contextmanager
    def reference() -> Iterator[Any]:
        with _exchanged(first), inference(model):
            yield model

    return reference


def other_model(model: nn.Module) -> Reference:
    """`model`, which nobody trains."""

    @contextmanager
    def reference() -> Iterator[Any]:
        with inference(model):
            yield model

    return reference


@contextmanager
def computing_in(model: nn.Module, half: torch.dtype | None) -> Iterator[None]:
    """`model` with its float32 weights rounded to `half`, as the run will compute; None: as it is."""
    wide = [parameter for parameter in model.parameters() if half is not None and parameter.dtype == torch.float32]
    with _exchanged([(parameter, _copy(parameter, half)) for parameter in wide]):
        yield


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode, without gradients."""
    before = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(before)


def _copy(parameter: nn.Parameter, half: torch.dtype | None) -> torch.Tensor:
    dtype = half if half is not None and parameter.dtype == torch.float32 else parameter.dtype
    return parameter.detach().to(dtype, copy=True)


@contextmanager
def _exchanged(pairs: list[tuple[nn.Parameter, torch.Tensor]]) -> Iterator[None]:
    """Each parameter holds the other tensor; nothing is copied."""
    own = [parameter.data for parameter, _ in pairs]
    try:
        for parameter, other in pairs:
            parameter.data = other
        yield
    finally:
        for (parameter, _), tensor in zip(pairs, own, strict=True):
            parameter.data = tensor
