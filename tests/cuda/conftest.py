"""Where CUDA kernels run: on the GPU, or emulated on the CPU, in both orders of blocks and threads."""

from collections.abc import Iterator

import pytest
import torch

from posttrain import _C
from posttrain.ops.backend import has_emulated_cuda

ORDERS = ("as scheduled",) if torch.cuda.is_available() else ("ascending", "descending")


@pytest.fixture(params=ORDERS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """ "cuda", or "cpu" with `use_backend("cuda")` allowed there."""
    if torch.cuda.is_available():
        if not _C.with_cuda():
            pytest.skip("this build has no CUDA kernels")
        yield "cuda"
        return
    if not has_emulated_cuda():
        pytest.skip("no GPU, and this build has no emulated CUDA kernels (-DPOSTTRAIN_EMULATION=ON makes them)")
    from posttrain import _emulated

    monkeypatch.setenv("POSTTRAIN_EMULATE_CUDA", "1")
    _emulated.set_descending(request.param == "descending")
    yield "cpu"
    _emulated.set_descending(False)
