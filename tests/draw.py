"""Random tensors of a test, the same numbers every time."""

from collections.abc import Callable

import torch
from torch import Tensor


def drawer(device: torch.device | str, scale: float) -> Callable[..., Tensor]:
    """`random(*shape, dtype=...)` from a generator of its own, rounded to the dtype and then scaled."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return scale * torch.randn(shape, generator=generator).to(device, dtype)

    return random
