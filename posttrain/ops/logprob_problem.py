"""What every backend of linear_logprob takes and gives, in one place."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # a target that is skipped: log-probability 0, no gradient


@dataclass(frozen=True)
class Problem:
    """The arguments of `posttrain.ops.linear_logprob`, checked.

    Shapes: hidden `[N, H]`, weight `[V, H]`, targets int64 `[M]`, rows int64 `[M]` or None (then M = N and
    target m is predicted by row m), bias `[V]`, lora_a `[R, H]`, lora_b `[V, R]`. `memory_budget` bounds the
    workspace, in bytes.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    rows: Tensor | None
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    lora_scaling: float
    temperature: float
    softcap: float | None
    logit_scale: float
    need_entropy: bool
    memory_budget: int


class Needs(NamedTuple):
    """Which inputs want a gradient."""

    hidden: bool
    weight: bool
    bias: bool
    lora: bool


class Grads(NamedTuple):
    """Gradients in the dtypes of their inputs, None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None


def has_gradient(p: Problem, *incoming: Tensor | None) -> Tensor:
    """Which targets send a gradient back, bool `[M]`: not skipped, and not all of their `incoming` are exactly 0."""
    return torch.stack([g != 0 for g in incoming if g is not None]).any(0) & (p.targets != IGNORED)
