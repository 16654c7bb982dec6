"""Where the kernels of a GPU run."""

from collections.abc import Iterator

import pytest
from places import PLACES, Place, place_of


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, triton_device: str) -> Iterator[Place]:
    """Everything runs on Triton, or on CUDA kernels."""
    with place_of(request.param) as place:
        yield place
