"""Where results go, and what they say about the machine: the names by which two runs can be told apart.

    bench/results/<device>/<date>-<commit>-<suite>.json    a run of `posttrain bench`, in pytest-benchmark's format
    bench/results/<device>/<name>.json                     a comparison of `make bench` with targets of its own

with $OUT, if set, instead of bench/results of the checkout; and bench/results of the current folder where there is no
checkout that can be written to. The checkout is $POSTTRAIN_CHECKOUT, which bench/gpu.sh sets since it builds into a
folder of its own, or else the folder that this package lies in.
"""

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from posttrain import _C, __version__
from posttrain.bench.device import GPU, device_name, driver

_PACKAGES = (
    "posttrain",
    "torch",
    "triton",
    "transformers",
    "peft",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "bitsandbytes",
    "unsloth",
    "flash-attn",
    "prefix-grouper",
    "flashinfer-python",
    "vllm",
)


def busy() -> float | None:
    """Share of the cores that processes wanted during the last minute, this one among them; None if unknown."""
    if not hasattr(os, "getloadavg"):
        return None
    return round(os.getloadavg()[0] / (os.cpu_count() or 1), 2)


LOAD = busy()  # when this was imported, so before anything was measured: what others wanted


def record(name: str, result: dict[str, Any]) -> Path:
    """Write `result` with date, commit, versions and device, and return the file."""
    path = device_folder() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**circumstances(), **result}, indent=2) + "\n")
    return path


def run_file(suite: str, folder: str | None = None) -> Path:
    """The file of a run that starts now, in `folder` or by default in `results_folder()`."""
    commit = (_git("rev-parse", "HEAD") or f"v{__version__}")[:9]
    return device_folder(folder) / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}-{commit}-{suite}.json"


def device_folder(folder: str | None = None) -> Path:
    """Results of this device."""
    root = Path(folder) if folder else results_folder()
    return root / re.sub(r"[^A-Za-z0-9.]+", "-", device_name()).strip("-")


def results_folder() -> Path:
    """Where the results of all devices lie."""
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    ours = _checkout() / "bench" / "results"
    return ours if os.access(ours, os.W_OK) else Path("bench/results")


def earlier_runs(suite: str, out: str | None = None) -> list[Path]:
    """Runs of this suite on this device, oldest first: those that are committed or, if none are, those in `out`."""
    tracked = _git("ls-files", str(device_folder().resolve()))
    committed = [_checkout() / name for name in tracked.splitlines()] if tracked else []
    files = committed or device_folder(out).glob("*.json")
    return runs_of([path for path in files if path.exists()], suite)


def runs_of(files: Iterable[Path], suite: str | None = None) -> list[Path]:
    """The files of runs of a suite, by default of the one that ran last, oldest first by the date in their names."""
    found = [path for path in files if fnmatch(path.name, f"[0-9][0-9][0-9][0-9]-*-{suite or '*'}.json")]
    runs = sorted(found, key=lambda path: path.name)
    return runs if suite or not runs else runs_of(runs, runs[-1].stem.rsplit("-", 1)[1])


def circumstances() -> dict[str, Any]:
    """What a figure depends on besides the code, and the commit of the code."""
    versions = {"python": platform.python_version(), **_versions()}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": device_name(),
        "driver": driver(),
        "cuda": torch.version.cuda if GPU else None,
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "load": LOAD,
        "versions": versions,
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _checkout() -> Path:
    return Path(os.environ.get("POSTTRAIN_CHECKOUT") or Path(__file__).parents[2])


def _git(*arguments: str) -> str | None:
    """Output of a git command in our checkout, or None without a checkout or without git."""
    root = _checkout()
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
