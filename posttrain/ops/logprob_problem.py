"""What every backend of linear_logprob takes and gives, in one place."""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # a target that is skipped: log-probability 0, no gradient


class Problem(NamedTuple):
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

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits, statistics and sums: float32, or float64 for float64."""
        return torch.promote_types(self.hidden.dtype, torch.float32)


class Results(NamedTuple):
    """What the forward finds of each target, `[M]`; the entropy is empty if nobody asked for it."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    lse_low: Tensor  # what rounding took from lse


class Incoming(NamedTuple):
    """The gradients of a forward's results, `[M]`, None where there is none."""

    logprob: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None


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


def has_gradient(p: Problem, incoming: Incoming) -> Tensor:
    """Which targets send a gradient back, bool `[M]`: not skipped, and not all of their `incoming` are exactly 0."""
    return torch.stack([g != 0 for g in incoming if g is not None]).any(0) & (p.targets != IGNORED)
