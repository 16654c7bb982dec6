"""A model as it is in use, for a moment."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def evaluating(causal: Any) -> Iterator[None]:
    """No gradient and no dropout, and afterwards every module in the mode it was in."""
    training = [module for module in causal.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
