"""Where benchmark results go: one JSON file per benchmark and kind of machine.

$OUT/<device>/<name>.json if OUT is set, else bench/results/<device>/<name>.json of the checkout that this file lies in,
or of the current folder if it lies in none that can be written.
"""

import json
import os
import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from posttrain import _C

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("posttrain", "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")


def record(name: str, result: dict[str, Any]) -> Path:
    """Write `result` with date, commit, versions and device, and return the file."""
    path = results_folder() / re.sub(r"[^A-Za-z0-9.]+", "-", device_name()).strip("-") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**_circumstances(), **result}, indent=2) + "\n")
    return path


def results_folder() -> Path:
    """Where the results of all devices lie."""
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    ours = _ROOT / "bench" / "results"
    return ours if os.access(ours, os.W_OK) else Path("bench/results")


def device_name() -> str:
    """The GPU's name, or the CPU's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()} {os.cpu_count()} cores"


def _circumstances() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": device_name(),
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str | None:
    """Output of a git command in our checkout, or None without a checkout or without git."""
    if not (_ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
