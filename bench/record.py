"""Where benchmark results go: one JSON file per benchmark and kind of machine.

bench/results/<device>/<name>.json    or $OUT/<device>/<name>.json when OUT is set
"""

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from posttrain import _C

_HERE = Path(__file__).parent
_PACKAGES = ("posttrain", "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")


def record(name: str, result: dict[str, Any]) -> Path:
    """Write `result` with date, commit, versions and device, and return the file."""
    root = Path(os.environ.get("OUT") or _HERE / "results")
    path = root / re.sub(r"[^A-Za-z0-9.]+", "-", device_name()).strip("-") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**_circumstances(), **result}, indent=2) + "\n")
    return path


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
    """Output of a git command here, or None outside a repository."""
    done = subprocess.run(["git", *arguments], cwd=_HERE, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
