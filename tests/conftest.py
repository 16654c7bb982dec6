"""What every test sees: the device kernels run on, and workspaces filled with NaN."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: spinning ones starve a busy machine

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels then run on CPU tensors


@pytest.fixture(scope="session")
def triton_device() -> str:
    """Where Triton kernels run: on the GPU, or interpreted on the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    from interpreter import patch_once_per_launch

    patch_once_per_launch()
    return "cpu"


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new empty floating tensor holds NaN, so that what a kernel doesn't write shows."""

    def poisoned(allocate):
        def call(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
