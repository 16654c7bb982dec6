"""Which backend computes an op, and why.

The choice depends only on the op, the tensor's device and its dtype:

    CPU    the C++ kernels ("cpu") for the dtypes they have, else plain PyTorch ("reference")
    CUDA   the CUDA C++ kernels ("cuda") where posttrain/ops/cuda_choice.py says why and this build and GPU have them,
           else the Triton kernels ("triton") for the dtypes they have, else plain PyTorch ("reference")

`use_backend` forces another one, for every op or for those it names. flash-attn ("flash-attn"), where it is installed,
runs only so. A forced backend that can't run is an error that says why; nothing falls back silently.

For tests without a GPU, POSTTRAIN_EMULATE_CUDA=1 lets a forced "cuda" compute CPU tensors, by the same kernels compiled
as C++ (posttrain._emulated, which a build with -DPOSTTRAIN_EMULATION=ON has).
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain import _C
from posttrain.ops.cuda_choice import WINS

BACKENDS = ("reference", "cpu", "triton", "cuda", "flash-attn")

_WIDE = (torch.float32, torch.float64)
_HALF = (torch.bfloat16, torch.float16)
_TRITON = (torch.float32, *_HALF)

# op -> backend -> dtypes; every op has the backend "reference", for every floating dtype.
SUPPORT: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "rms_norm": {"cpu": _WIDE, "triton": _TRITON, "cuda": _TRITON},
    "rope": {"cpu": _WIDE, "triton": _TRITON},
    "rope_cache": {"cpu": _WIDE, "triton": _TRITON, "cuda": _TRITON},
    "swiglu": {"cpu": _WIDE, "triton": _TRITON},
    "geglu": {"cpu": _WIDE, "triton": _TRITON},
    "packed_attention": {"cpu": (*_WIDE, *_HALF), "triton": _TRITON, "flash-attn": _HALF},
    "paged_attention": {"cpu": (*_WIDE, *_HALF), "triton": _TRITON, "cuda": _TRITON},
    "sample": {"cpu": (torch.float32, *_HALF), "triton": _TRITON, "cuda": _TRITON},
    "nf4_dequantize": {"cpu": (*_WIDE, *_HALF), "triton": _TRITON, "cuda": _TRITON},
    "nf4_linear": {"cpu": (*_WIDE, *_HALF), "triton": _TRITON, "cuda": _TRITON},
    "lora_linear": {"cpu": (*_WIDE, *_HALF), "triton": _TRITON, "cuda": _TRITON},
    "lora_qkv": {"cpu": (*_WIDE, *_HALF), "triton": _TRITON, "cuda": _TRITON},
    "lora_mlp": {"cpu": (*_WIDE, *_HALF), "triton": _TRITON, "cuda": _TRITON},
    "linear_logprob": {"cpu": (*_WIDE, *_HALF), "triton": _TRITON, "cuda": _TRITON},
}

CUDA_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Dtype of csrc/cuda/kernels.h

# What can't change is asked once: torch.compile could not trace the question.
_WITH_CUDA = _C.with_cuda()
_HAS_TRITON = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_FLASH_ATTN = find_spec("flash_attn") is not None
_forced: dict[str, str] = {}


class BackendError(RuntimeError):
    """A backend was asked for that can't compute this op on this tensor."""


class Choice(NamedTuple):
    """The backend an op uses for a kind of tensor, and the reason in words."""

    backend: str
    reason: str


def backend_for(op: str, tensor: Tensor, case: str = "") -> str:
    """Name of the backend that `op` uses for tensors like `tensor` (its device and dtype).

    `case` names the part of the op's inputs that a call belongs to, where posttrain/ops/cuda_choice.py tells parts
    apart. Raises `ValueError` for an unknown op and `BackendError` if `use_backend` forces one that can't run.
    """
    return explain(op, tensor, case).backend


def explain(op: str, tensor: Tensor, case: str = "") -> Choice:
    """Like `backend_for`, with the reason."""
    support = SUPPORT.get(op)
    if support is None:
        raise ValueError(f"unknown op {op!r}; the ops are {', '.join(SUPPORT)}")
    forced = _forced.get(op)
    if forced is not None:
        obstacle = _obstacle(op, forced, tensor.device, tensor.dtype)
        if obstacle:
            raise BackendError(f"backend {forced!r} can't compute {op}: {obstacle}")
        return Choice(forced, "forced by use_backend")
    wins = WINS.get((op, case))
    if tensor.device.type == "cuda" and wins and not _obstacle(op, "cuda", tensor.device, tensor.dtype):
        return Choice("cuda", wins)
    native = "triton" if tensor.device.type == "cuda" else "cpu"
    obstacle = _obstacle(op, native, tensor.device, tensor.dtype)
    if obstacle:
        return Choice("reference", f"not {native}: {obstacle}")
    if native == "cpu" and tensor.dtype in _HALF:
        return Choice(native, f"has cpu kernels for float32, which {_name(tensor.dtype)} is widened to")
    return Choice(native, f"has {tensor.device.type} kernels for {_name(tensor.dtype)}")


@contextmanager
def use_backend(name: str, *ops: str) -> Iterator[None]:
    """Within this context the `ops`, or all, use backend `name` or raise `BackendError` saying why they can't.

    For example `with use_backend("flash-attn", "packed_attention"): trainer.train()`. It holds for the whole process.
    The choice is made when an op's forward is called; its backward uses the same backend, wherever it runs.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; the backends are {', '.join(BACKENDS)}")
    unknown = set(ops) - set(SUPPORT)
    if unknown:
        raise ValueError(f"unknown op {min(unknown)!r}; the ops are {', '.join(SUPPORT)}")
    global _forced
    before, _forced = _forced, {**_forced, **dict.fromkeys(ops or SUPPORT, name)}
    try:
        yield
    finally:
        _forced = before


def forced() -> dict[str, str]:
    """The backend of each op that `use_backend` has forced."""
    return _forced


def has_emulated_cuda() -> bool:
    """Whether this build has the CUDA kernels compiled for the CPU."""
    return find_spec("posttrain._emulated") is not None


def cuda_kernels(tensor: Tensor) -> ModuleType:
    """The module with the CUDA kernels for tensors like `tensor`: on a CPU, the emulated ones."""
    return _C if tensor.is_cuda else import_module("posttrain._emulated")


def cuda_stream(tensor: Tensor) -> int:
    """The current stream of the tensor's device, as kernels take it; 0 on a CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def cuda_device(tensor: Tensor) -> AbstractContextManager[object]:
    """The context in which kernels for the tensor are launched: its GPU is the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def gpu_obstacle(device: torch.device) -> str | None:
    """Why this GPU can't run the CUDA kernels of a build that has them, or None if it can."""
    if not torch.cuda.is_available():
        return "no GPU is here"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return None
    return f"the GPU's compute capability is {major}.{minor}, and the CUDA kernels are compiled for 8.0 and above"


def _obstacle(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` can't compute `op` for this device and dtype, or None if it can."""
    if backend == "reference":
        return None
    dtypes = SUPPORT[op].get(backend)
    if dtypes is None:
        return f"{op} has no {backend} kernel"
    if dtype not in dtypes:
        return f"its {backend} kernel takes {', '.join(map(_name, dtypes))}, not {_name(dtype)}"
    if backend == "cpu" and device.type != "cpu":
        return f"the tensor is on {device.type}"
    if backend == "flash-attn":
        if not _HAS_FLASH_ATTN:
            return "flash-attn is not installed (pip install posttrain[flash-attn])"
        if device.type != "cuda":
            return f"the tensor is on {device.type}"
    if backend == "cuda":
        return _obstacle_of_cuda(device)
    if backend == "triton":
        if not _HAS_TRITON:
            return "triton is not installed"
        if device.type != "cuda" and not (device.type == "cpu" and _INTERPRETED):
            return (
                f"the tensor is on {device.type} (Triton runs there only with TRITON_INTERPRET=1 set before the start)"
            )
    return None


def _obstacle_of_cuda(device: torch.device) -> str | None:
    """Why the CUDA kernels can't compute on this device, or None if they can."""
    if device.type == "cpu" and os.environ.get("POSTTRAIN_EMULATE_CUDA") == "1":
        return (
            None if has_emulated_cuda() else "this build has no posttrain._emulated (-DPOSTTRAIN_EMULATION=ON makes it)"
        )
    if not _WITH_CUDA:
        return "this build has no CUDA kernels (nvcc was not found when it was built)"
    return gpu_obstacle(device) if device.type == "cuda" else f"the tensor is on {device.type}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
