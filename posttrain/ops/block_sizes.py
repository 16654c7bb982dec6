"""The block sizes that Triton kernels are launched with, and where they come from.

tuned    `posttrain tune` found them on this model of GPU with this version of Triton; they lie in the user's cache
shipped  the kernel's own table has a row for this compute capability, or one row for all
default  it has none, and the row of the newest capability below is taken

The cache is $XDG_CACHE_HOME/posttrain/block_sizes.json, without the variable ~/.cache/posttrain/block_sizes.json:

    {"NVIDIA H100 80GB HBM3": {"3.8.0": {"packed_attention forward 128": [128, 64, 8, 3]}}}

A process reads it once. Whoever deletes it is back at the tables. Other block sizes sum in another order: results agree
to rounding, not bit for bit.
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

Sizes = TypeVar("Sizes", bound=tuple[int, ...])
Row = TypeVar("Row")
_tried: dict[str, tuple[int, ...]] = {}


def chosen(name: str, shipped: Sizes, device: torch.device) -> Sizes:
    """The block sizes of the kernel `name`: tuned ones for this GPU, else `shipped`.

    Raises ValueError if the cache can't be read, or has another number of sizes.
    """
    sizes: Sequence[int] | None = _tried.get(name)
    if sizes is None and device.type == "cuda":
        sizes = tuned(gpu_name(device)).get(name)
    if sizes is None:
        return shipped
    if len(sizes) != len(shipped):
        raise ValueError(
            f"{cache_file()}: {name} has {len(sizes)} block sizes, and the kernel takes {len(shipped)}: "
            "run posttrain tune again, or delete the file"
        )
    return tuple.__new__(type(shipped), sizes)


def try_sizes(name: str, sizes: tuple[int, ...] | None) -> None:
    """From now on launch the kernel `name` with `sizes`, wherever it runs; None ends that."""
    if sizes is None:
        _tried.pop(name, None)
    else:
        _tried[name] = sizes


def newest(table: Mapping[int, Row], capability: int) -> Row:
    """The row of a table by compute capability (90 for sm_90): of the newest that isn't above this one.

    Below 80, which tables begin with, it is the row for 80: kernels are for sm_80 and later.
    """
    return table[max(known for known in table if known <= max(capability, 80))]


def capability_of(device: torch.device) -> int:
    """The compute capability of a GPU, as 90 for sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def gpu_name(device: torch.device) -> str:
    """The model of a GPU, as its driver calls it."""
    return torch.cuda.get_device_name(device)


@cache
def tuned(gpu: str) -> Mapping[str, list[int]]:
    """Sizes by kernel that the cache has for a model of GPU and this version of Triton."""
    return _read().get(gpu, {}).get(version("triton"), {})


def save(gpu: str, found: Mapping[str, tuple[int, ...] | None]) -> Path:
    """Write sizes by kernel into the cache, beside what it has; None takes an entry out. Returns the file."""
    path, content = cache_file(), _read()
    entries = content.setdefault(gpu, {}).setdefault(version("triton"), {})
    for name, sizes in found.items():
        entries.pop(name, None)
        if sizes is not None:
            entries[name] = list(sizes)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    tuned.cache_clear()
    return path


def cache_file() -> Path:
    """Where tuned sizes lie."""
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "posttrain" / "block_sizes.json"


def _read() -> dict[str, Any]:
    path = cache_file()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        valid = all(
            isinstance(size, int) and size > 0
            for versions in content.values()
            for kernels in versions.values()
            for sizes in kernels.values()
            for size in sizes
        )
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not block sizes as posttrain tune writes them ({error}); delete it") from error
    if not valid:
        raise ValueError(f"{path}: block sizes must be positive whole numbers; delete it, and run posttrain tune")
    return content
