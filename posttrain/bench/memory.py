"""Peak memory of a piece of work, in this process or in one of its own.

On a CPU that is resident memory, which Linux tells; a process of its own is exact where the work lasts long or keeps
what it allocates.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

_TEMPLATE = """
import ctypes, gc, torch
{setup}
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # memory that the set-up has freed counts as free

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

setup_peak = status("VmHWM")
open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM to what is resident now
before = status("VmRSS")
{work}
peak = status("VmHWM")
print("peaks", peak - before, max(peak, setup_peak))
"""


def peak_of(work: Callable[[], object]) -> int | None:
    """Bytes that `work()` takes at most beyond what is taken now; None where the system doesn't tell.

    `work` should have run before, so that libraries are loaded and warm.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process keeps counts as free
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM to what is resident now
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


class Peaks(NamedTuple):
    """Most resident bytes: while the work ran, beyond what was resident before; and of the process, set-up and all."""

    beyond: int
    whole: int


def peak_bytes(setup: str, work: str) -> int:
    """Bytes by which the resident memory of a fresh process grows at most while it executes `work` after `setup`."""
    return peaks(setup, work).beyond


def peaks(setup: str, work: str) -> Peaks:
    """What a fresh process needs to execute `work` after `setup`.

    Both are Python source. `setup` should also do a small run of the work, so that libraries are loaded and warm.
    """
    program = _TEMPLATE.format(setup=setup, work=work)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # imports what the caller could import
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    if run.returncode != 0:
        raise RuntimeError(f"memory probe failed: {run.stderr}")
    beyond, whole = run.stdout.split("peaks")[-1].split()
    return Peaks(int(beyond), int(whole))


def report_peaks(report: Callable[..., None], name: str, title: str, found: Mapping[str, Peaks]) -> dict[str, float]:
    """Record the peaks of trainers under `name`; those beyond the trainer, in MB."""
    beyond = {trainer: peak.beyond / 2**20 for trainer, peak in found.items()}
    whole = {trainer: peak.whole / 2**20 for trainer, peak in found.items()}
    lines = [f"{title}: peak memory (MB), beyond the trainer and of the process"]
    lines += [f"  {trainer:<10} {beyond[trainer]:>9.1f} {whole[trainer]:>9.1f}" for trainer in found]
    report(name, lines, megabytes=beyond, process_megabytes=whole)
    return beyond
