"""Keys and values of every layer, in pages, and what a step needs to know to use them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.rollout.scheduler import Chunk
from posttrain.rollout.sequence import Sequence


class LayerShape(NamedTuple):
    """Key heads of a layer and their width, and what its attention is."""

    heads: int
    width: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


@dataclass
class StepLayout:
    """Where the tokens of a step lie, for `write_cache` and `paged_attention`.

    Attributes:
        slots: int64 `[T]`, where keys and values of each token go.
        block_table: int32 `[S, max_pages]`.
        context_lens: int32 `[S]`.
        query_lens: int32 `[S]`, or None if each sequence has one token.
    """

    slots: Tensor
    block_table: Tensor
    context_lens: Tensor
    query_lens: Tensor | None


class KVCache:
    """`keys[i]` and `values[i]` of layer i are `[num_pages + 1, page_size, heads, width]`; after `release` there are
    none. The last page, `spare`, is nobody's: rows without a sequence write there (graphs.py)."""

    def __init__(
        self, shapes: list[LayerShape], num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_pages = self.spare = num_pages
        self.page_size = page_size
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.shapes = shapes
        self._options: Any = {"dtype": dtype, "device": device}

    @property
    def device(self) -> torch.device:
        """Of all pages."""
        return self._options["device"]

    @property
    def dtype(self) -> torch.dtype:
        """Of all pages."""
        return self._options["dtype"]

    def allocate(self) -> None:
        """Have memory. On a CPU the system hands it out page by page, as it is first written."""
        if not self.keys:
            for heads, width, *_ in self.shapes:
                for caches in (self.keys, self.values):
                    caches.append(torch.empty(self.num_pages + 1, self.page_size, heads, width, **self._options))

    def release(self) -> None:
        """Give all memory back."""
        self.keys, self.values = [], []

    def copy_pages(self, copies: Mapping[int, int]) -> None:
        """Copy pages: new page -> old page."""
        if copies:
            new, old = (torch.tensor(list(part), device=self._options["device"]) for part in (copies, copies.values()))
            for pages in (*self.keys, *self.values):
                pages[new] = pages[old]


def page_bytes(shapes: list[LayerShape], page_size: int, dtype: torch.dtype) -> int:
    """Bytes of a page over all layers."""
    return page_size * dtype.itemsize * sum(2 * shape.heads * shape.width for shape in shapes)


def lay_out(chunks: list[Chunk], page_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, StepLayout]:
    """(token ids `[T]`, positions `[T]`, rows `[n]` after which a token is drawn, all int64, layout) of a step."""
    table = pages_of([chunk.sequence for chunk in chunks])
    starts = np.array([chunk.start for chunk in chunks])
    ends = np.array([chunk.end for chunk in chunks])
    counts = ends - starts
    owner = np.repeat(np.arange(len(chunks)), counts)
    positions = np.arange(len(owner)) + np.repeat(ends - np.cumsum(counts), counts)
    tokens = np.concatenate([np.array(c.sequence.tokens[c.start : c.end], np.int64) for c in chunks])
    slots = table[owner, positions // page_size].astype(np.int64) * page_size + positions % page_size
    layout = StepLayout(
        torch.from_numpy(slots).to(device),
        torch.from_numpy(table).to(device),
        torch.from_numpy(ends.astype(np.int32)).to(device),
        None if len(owner) == len(chunks) else torch.from_numpy(counts.astype(np.int32)).to(device),
    )
    rows = (np.cumsum(counts) - 1)[[chunk.draws for chunk in chunks]]
    tokens_, positions_, rows_ = (torch.from_numpy(x).to(device) for x in (tokens, positions, rows))
    return tokens_, positions_, rows_, layout


def pages_of(sequences: list[Sequence]) -> NDArray[np.int32]:
    """The block table `[S, max_pages]`."""
    table = np.zeros((len(sequences), max(len(sequence.pages) for sequence in sequences)), np.int32)
    for row, sequence in zip(table, sequences, strict=True):
        row[: len(sequence.pages)] = sequence.pages
    return table


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as lines:
            free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), free)
    if os.path.exists("/proc/self/cgroup"):
        groups = Path("/proc/self/cgroup").read_text().splitlines()
        own = next((group.removeprefix("0::") for group in groups if group.startswith("0::")), "")
        free = cgroup_room(Path("/sys/fs/cgroup"), own.strip("/"), free)
    return free


def cgroup_room(root: Path, own: str, most: int) -> int:
    """Bytes left, at most `most`, to the control group `own` (version 2, mounted at `root`) and all above it.

    Cached files count as left: the kernel gives them up first.
    """
    for folder in (root / own, *(root / own).parents):
        if not folder.is_relative_to(root) or not (folder / "memory.max").exists():
            continue
        limit = (folder / "memory.max").read_text().strip()
        if limit != "max":
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / "memory.current").read_text())
            used -= int(stat["inactive_file"]) + int(stat["active_file"])
            most = min(most, max(int(limit) - used, 0))
    return most
