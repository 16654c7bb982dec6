"""The choice of backend can be inspected and forced, and what can't run says why."""

import pytest
import torch

from posttrain import ops
from posttrain.ops import backend
from posttrain.ops.backend import BackendError, Choice


@pytest.mark.parametrize("op", backend.SUPPORT)
def test_cpu_tensors_use_the_cpu_kernels(op) -> None:
    assert ops.backend_for(op, torch.ones(1)) == "cpu"
    assert ops.explain(op, torch.ones(1)) == Choice("cpu", "has cpu kernels for float32")


def test_a_dtype_without_kernel_uses_the_reference_and_says_why() -> None:
    choice = ops.explain("rms_norm", torch.ones(1, dtype=torch.bfloat16))
    assert choice == Choice("reference", "not cpu: its cpu kernel takes float32, float64, not bfloat16")


def test_forced_backend_holds_within_the_context_and_nests() -> None:
    x = torch.ones(1)
    with ops.use_backend("reference"):
        assert ops.explain("rope", x) == Choice("reference", "forced by use_backend")
        with ops.use_backend("cpu"):
            assert ops.backend_for("rope", x) == "cpu"
        assert ops.backend_for("rope", x) == "reference"
    assert ops.backend_for("rope", x) == "cpu"


def test_forced_backend_ends_with_an_error_inside() -> None:
    with pytest.raises(RuntimeError, match="inside"), ops.use_backend("reference"):
        raise RuntimeError("inside")
    assert ops.backend_for("rope", torch.ones(1)) == "cpu"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("cpu", torch.ones(1, device="meta"), "'cpu' can't compute swiglu: the tensor is on meta"),
        ("cpu", torch.ones(1).half(), "its cpu kernel takes float32, float64, not float16"),
        ("triton", torch.ones(1).double(), "its triton kernel takes float32, bfloat16, float16, not float64"),
        ("triton", torch.ones(1, device="meta"), "the tensor is on meta .*TRITON_INTERPRET=1"),
        ("cuda", torch.ones(1), "swiglu has no cuda kernel"),
    ],
)
def test_a_forced_backend_that_cannot_run_says_why(name, tensor, message) -> None:
    with ops.use_backend(name), pytest.raises(BackendError, match=message):
        ops.swiglu(tensor, tensor)


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch) -> None:
    monkeypatch.setattr(backend, "_INTERPRETED", False)
    with ops.use_backend("triton"), pytest.raises(BackendError, match="the tensor is on cpu"):
        ops.swiglu(torch.ones(1), torch.ones(1))


def test_triton_missing_is_said(monkeypatch) -> None:
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    with ops.use_backend("triton"), pytest.raises(BackendError, match="triton is not installed"):
        ops.swiglu(torch.ones(1), torch.ones(1))


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown op 'norm'; the ops are rms_norm, rope"):
        ops.backend_for("norm", torch.ones(1))
    with (
        pytest.raises(ValueError, match="unknown backend 'gpu'; the backends are reference, cpu"),
        ops.use_backend("gpu"),
    ):
        pass


def test_the_backward_uses_the_backend_of_the_forward(monkeypatch, triton_device) -> None:
    from posttrain.kernels import glu

    calls = []
    run = glu.glu_backward
    monkeypatch.setattr(glu, "glu_backward", lambda *arguments: calls.append("triton") or run(*arguments))
    gate = torch.randn(2, 8, device=triton_device, requires_grad=True)
    with ops.use_backend("triton"):
        y = ops.swiglu(gate, gate.detach())
    y.sum().backward()
    assert calls == ["triton"]
