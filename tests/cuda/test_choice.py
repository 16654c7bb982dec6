"""Which GPU tensors go to the CUDA kernels, and that a CPU's don't unless a test asks for it."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from posttrain.ops import BackendError, backend, layout_cuda, use_backend
from posttrain.ops.cuda_choice import WINS


@pytest.fixture
def on_gpu():
    """A tensor that says it is on a GPU."""
    with FakeTensorMode():
        return torch.empty(0, device="cuda", dtype=torch.bfloat16)


def test_table():
    for (op, _), grounds in WINS.items():
        assert "cuda" in backend.SUPPORT[op]
        assert grounds.startswith(("argued: ", "measured: "))


def test_a_win_is_chosen_for_its_case_where_the_build_has_cuda(on_gpu, monkeypatch):
    monkeypatch.setattr(backend, "WINS", {("sample", "few rows"): "argued: launches"})
    monkeypatch.setattr(backend, "_HAS_TRITON", True)
    monkeypatch.setattr(backend, "gpu_obstacle", lambda _: None)
    monkeypatch.setattr(backend, "_WITH_CUDA", True)
    assert backend.explain("sample", on_gpu, "few rows") == ("cuda", "argued: launches")
    assert backend.backend_for("sample", on_gpu) == "triton"
    monkeypatch.setattr(backend, "_WITH_CUDA", False)
    assert backend.backend_for("sample", on_gpu, "few rows") == "triton"


def test_a_gpu_that_the_kernels_are_not_compiled_for(on_gpu, monkeypatch):
    monkeypatch.setattr(backend, "_HAS_TRITON", True)
    monkeypatch.setattr(backend, "gpu_obstacle", backend.gpu_obstacle.__wrapped__)  # remembers nothing
    monkeypatch.setattr(backend, "_WITH_CUDA", True)
    monkeypatch.setattr(layout_cuda, "_BUILT", True)
    monkeypatch.setattr(layout_cuda, "gpu_obstacle", backend.gpu_obstacle)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert backend.backend_for("sample", on_gpu) == "triton"
    assert not layout_cuda.has_kernels(on_gpu.device)
    with use_backend("cuda"), pytest.raises(BackendError, match=r"compute capability is 7\.5, .* for 8\.0 and above"):
        backend.backend_for("sample", on_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert backend.backend_for("sample", on_gpu) == "cuda"
    assert layout_cuda.has_kernels(on_gpu.device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.backend_for("sample", on_gpu) == "triton"


@pytest.mark.parametrize("with_cuda", [False, True])
def test_the_choice_is_part_of_one_graph(with_cuda, monkeypatch):
    monkeypatch.setattr(backend, "_WITH_CUDA", with_cuda)
    monkeypatch.setattr(backend, "_HAS_TRITON", True)
    monkeypatch.setattr(backend, "gpu_obstacle", lambda _: None)
    tensor = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)

    def chosen(x):
        return x + ("triton", "cuda").index(backend.backend_for("sample", tensor))

    assert torch.compile(chosen, backend="eager", fullgraph=True)(torch.zeros(1)) == with_cuda


def test_cpu_tensors_only_where_a_test_asks(monkeypatch):
    x = torch.zeros(2)
    monkeypatch.setattr(backend, "_WITH_CUDA", True)
    monkeypatch.setattr(backend, "has_emulated_cuda", lambda: True)
    with use_backend("cuda"):
        monkeypatch.delenv("POSTTRAIN_EMULATE_CUDA", raising=False)
        with pytest.raises(BackendError, match="the tensor is on cpu"):
            backend.backend_for("linear_logprob", x)
        monkeypatch.setenv("POSTTRAIN_EMULATE_CUDA", "1")
        assert backend.backend_for("linear_logprob", x) == "cuda"
        monkeypatch.setattr(backend, "has_emulated_cuda", lambda: False)
        with pytest.raises(BackendError, match="POSTTRAIN_EMULATION=ON"):
            backend.backend_for("linear_logprob", x)
