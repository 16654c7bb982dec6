"""Peak memory of a piece of work in a process of its own, beyond what it holds before."""

import subprocess
import sys
from pathlib import Path

_TEMPLATE = """
import ctypes, gc, torch
{setup}
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # memory that the set-up has freed counts as free

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM to what is resident now
before = status("VmRSS")
{work}
print("peak", status("VmHWM") - before)
"""


def peak_bytes(setup: str, work: str) -> int:
    """Bytes by which the resident memory of a fresh process grows at most while it executes `work` after `setup`.

    Both are Python source. `setup` should also do a small run of the work, so that libraries are loaded and warm.
    """
    program = _TEMPLATE.format(setup=setup, work=work)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent)
    if run.returncode != 0:
        raise RuntimeError(f"memory probe failed: {run.stderr}")
    return int(run.stdout.split("peak")[-1])
