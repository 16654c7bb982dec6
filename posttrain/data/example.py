"""Example: one tokenised training sequence."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Example:
    """Token ids and, for each, whether the model is trained to predict it.

    Attributes:
        input_ids: int32 `[L]`.
        loss_mask: bool `[L]`; True where the token is a target. The first token never is: nothing predicts it.
        group: examples with the same number share a prompt; None if unknown.
        origin: the file and line it came from, for messages; None if unknown.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    group: int | None = None
    origin: str | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """How many tokens are predicted and counted in the loss."""
        return int(self.loss_mask[1:].sum())


@dataclass(frozen=True)
class Pair:
    """A chosen and a rejected answer to one prompt, which both begin with; the answers are the targets."""

    chosen: Example
    rejected: Example

    @property
    def origin(self) -> str | None:
        """Where it came from, for messages."""
        return self.chosen.origin
