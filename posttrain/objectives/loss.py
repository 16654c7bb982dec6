"""Loss: what an objective returns for one micro-batch."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Loss(NamedTuple):
    """One micro-batch's share of the loss and of the metrics of an optimizer step.

    Everything is divided by counts of the whole step, so the shares of all micro-batches add up to the step's value,
    however the step is divided.

    Attributes:
        value: scalar, to be differentiated.
        metrics: scalars by name, detached, on the device of `value`; nothing waits for the device.
    """

    value: Tensor
    metrics: Mapping[str, Tensor]
