"""Where CUDA kernels run: on the GPU, or emulated on the CPU, in both orders of blocks and threads."""

from collections.abc import Iterator

import pytest
from places import ORDERS, device_of_cuda

from posttrain import ops


@pytest.fixture(params=ORDERS)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """ "cuda", or "cpu" with `use_backend("cuda")` allowed there."""
    with device_of_cuda(request.param) as device:
        yield device


@pytest.fixture
def cuda(device: str) -> Iterator[None]:
    """Ops run on CUDA kernels."""
    with ops.use_backend("cuda"):
        yield
