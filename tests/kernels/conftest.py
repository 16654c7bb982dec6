"""Where the kernels of a GPU run."""

from collections.abc import Iterator

import pytest
from places import PLACES, Place, place_of

from posttrain import ops


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, triton_device: str) -> Iterator[Place]:
    """Ops run on Triton's kernels, or on CUDA's."""
    with place_of(request.param) as place:
        yield place


@pytest.fixture
def triton(triton_device: str) -> Iterator[None]:
    """Ops run on Triton's kernels."""
    with ops.use_backend("triton"):
        yield
