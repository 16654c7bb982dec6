"""doctor: what this machine has, and which backend each op would use on it."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from posttrain import _C, __version__
from posttrain.ops.backend import SUPPORT, explain, has_emulated_cuda

_PACKAGES = ("torch", "triton", "transformers", "peft", "datasets", "numpy", "flash-attn", "bitsandbytes")
_KINDS = (("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.bfloat16))


def report() -> str:
    """Everything `posttrain doctor` prints."""
    sections = {"machine": _machine(), "packages": _packages(), "ops": _ops(), "block sizes": _block_sizes()}
    lines = []
    for title, pairs in sections.items():
        lines += ["", title]
        lines += [f"  {name:<29} {value}" for name, value in pairs]
    return "\n".join(lines[1:])


def _machine() -> Iterator[tuple[str, str]]:
    yield "system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    yield (
        "CPU",
        f"{_cpu_name()} ({platform.machine()}), {_cores()} cores, {torch.get_num_threads()} threads used",
    )
    yield "CPU kernels", _C.isa()
    yield "memory", f"{_memory() / 2**30:.1f} GiB"
    if not torch.cuda.is_available():
        yield "GPU", "none that torch can use" + ("" if torch.version.cuda else " (this torch is a CPU build)")
    else:
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            yield (
                f"GPU {index}",
                f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.1f} GiB",
            )
    yield "CUDA kernels", "built" if _C.with_cuda() else "not built (nvcc was not found when this was built)"
    yield "CUDA kernels on the CPU", "built, for tests" if has_emulated_cuda() else "not built (only tests need them)"


def _packages() -> Iterator[tuple[str, str]]:
    yield "posttrain", __version__
    for name in _PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"


def _ops() -> Iterator[tuple[str, str]]:
    with FakeTensorMode():
        for device, dtype in _KINDS:
            tensor = torch.empty(0, device=device, dtype=dtype)
            for op in SUPPORT:
                backend, reason = explain(op, tensor)
                yield f"{op}, {device} {str(dtype).removeprefix('torch.')}", f"{backend}: {reason}"


def _block_sizes() -> Iterator[tuple[str, str]]:
    """Of the Triton kernels on every model of GPU that is here."""
    if not torch.cuda.is_available() or find_spec("triton") is None:
        yield "of Triton kernels", "from their tables; posttrain tune measures them where there is a GPU"
        return
    from posttrain.bench.tune import choices

    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    for name, capability in dict.fromkeys((device.name, 10 * device.major + device.minor) for device in devices):
        for kernel, sizes in choices(name, capability):
            yield kernel, f"{sizes}, {name}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
