"""Where the kernels of a GPU run: on one, or on the CPU, Triton's interpreted and CUDA's emulated in both orders.

Without a GPU, the orders are those of blocks and threads: what depends on them differs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch

from posttrain import _C, ops
from posttrain.ops.backend import has_emulated_cuda

GPU = torch.cuda.is_available()
ORDERS = ("as scheduled",) if GPU else ("ascending", "descending")
PLACES = ("triton", *(f"cuda {order}" for order in ORDERS))


class Place(NamedTuple):
    """Whose kernels ops run on, "triton" or "cuda", and where their tensors lie: "cpu" where no GPU is."""

    backend: str
    device: str


@contextmanager
def place_of(name: str) -> Iterator[Place]:
    """One of PLACES, with its backend in use."""
    backend, _, order = name.partition(" ")
    if backend == "cuda":
        with device_of_cuda(order) as device, ops.use_backend(backend):
            yield Place(backend, device)
    else:
        with ops.use_backend(backend):
            yield Place(backend, "cuda" if GPU else "cpu")


@contextmanager
def device_of_cuda(order: str) -> Iterator[str]:
    """ "cuda", or "cpu" with `use_backend("cuda")` allowed there."""
    if GPU:
        if not _C.with_cuda():
            pytest.skip("this build has no CUDA kernels")
        yield "cuda"
        return
    if not has_emulated_cuda():
        pytest.skip("no GPU, and this build has no emulated CUDA kernels (-DPOSTTRAIN_EMULATION=ON makes them)")
    from posttrain import _emulated

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_EMULATE_CUDA", "1")
        _emulated.set_descending(order == "descending")
        try:
            yield "cpu"
        finally:
            _emulated.set_descending(False)


def with_dtypes(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    """The parameters `place` and `dtype`: all, but Triton's interpreter truncates to bfloat16 instead of rounding."""
    pairs = [(name, dtype) for name in PLACES for dtype in dtypes]
    wrong = [] if GPU else [("triton", torch.bfloat16)]
    return pytest.mark.parametrize(
        ("place", "dtype"), [pair for pair in pairs if pair not in wrong], indirect=["place"]
    )
