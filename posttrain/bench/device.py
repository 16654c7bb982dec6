"""The device that is measured: its name, its caches and free memory, and what it reaches at best.

The roofline is measured, not taken from a data sheet: the rate of copying memory, in bytes read plus written per
second, and the rate of a large square matrix product, 2 n^3 operations. An op that moves b bytes and computes f
operations takes at least max(b / copy, f / gemm) seconds; its share of the roofline is that over its time.
"""

import ctypes
import gc
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

from posttrain.bench.interleave import alternate
from posttrain.rollout.cache import free_memory

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
WIDER = torch.float32 if GPU else torch.float64  # in which the truth is computed
ROTATED = 1 << 29  # most bytes of inputs that take turns, where a cache is larger than that


class Roofline(NamedTuple):
    """Best rates: of copying, in bytes per second, and of a matrix product, in operations per second."""

    copy: float
    gemm: float

    def least(self, flops: float, moved: float) -> float:
        """Seconds that work of `flops` operations and `moved` bytes takes at least."""
        return max(flops / self.gemm, moved / self.copy)

    def share(self, flops: float, moved: float, seconds: float) -> float:
        """Share of the roofline that work of `flops` operations and `moved` bytes reaches in `seconds`."""
        return self.least(flops, moved) / seconds


def measure_roofline() -> Roofline:
    """The best of a few copies and products, in the dtype that is measured."""
    size = 8192 if GPU else 1536
    a, b, out = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(3))
    source = torch.ones(max(1 << 28, 2 * cache_bytes()) // DTYPE.itemsize, device=DEVICE, dtype=DTYPE)
    target = torch.empty_like(source)
    found = alternate({"copy": lambda: target.copy_(source), "gemm": lambda: torch.mm(a, b, out=out)}, rounds=5)
    return Roofline(2 * source.nbytes / min(found["copy"]), 2 * size**3 / min(found["gemm"]))


def cache_bytes() -> int:
    """Size of the largest cache, on a CPU at most what `ROTATED` can get past."""
    if GPU:
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [_size(path.read_text()) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return min(max(sizes, default=32 << 20), ROTATED // 2)


def _size(text: str) -> int:
    """Bytes of "32K", "260M" and the like."""
    number, unit = re.fullmatch(r"(\d+)([KMG]?)", text.strip()).groups()  # type: ignore[union-attr]
    return int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]


def free_bytes() -> int:
    """Memory that is free on the device, within the limits of control groups."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()  # memory that PyTorch keeps is free as well
    elif platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # and what the process keeps
    return free_memory(torch.device(DEVICE))


def device_name() -> str:
    """The GPU's name, or the CPU's with its cores."""
    if GPU:
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()} {os.cpu_count()} cores"


def driver() -> str | None:
    """Version of the GPU's driver."""
    if not GPU or shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return found[0] if found else None
