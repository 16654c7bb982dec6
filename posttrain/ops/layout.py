"""PackedLayout: which packed tokens see which, as one integer per key.

A packed batch is a forest of segments in depth-first order. All descendants of a segment follow it directly, so

    query q sees key k   <=>   k <= q < visible_until[k]

with `visible_until[k]` the end of the subtree of k's segment. Proof: k <= q < visible_until[k] says that q lies in the
subtree of k's segment and not before k, which is what a causal path from the root to q means.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from posttrain import _C
from posttrain.ops import layout_cuda

BLOCK = 32  # tokens that `schedule` describes together


class Varlen(NamedTuple):
    """Prompts with completions as two calls of an attention over sequences of different lengths.

    Attributes:
        segments: int32 `[S + 1]`, boundaries of the segments: each attends to itself, causally.
        prompts: int32 `[2, C + 1]`, boundaries of queries and of keys: the completions of a prompt attend to all of it.
            Sequences without queries or without keys stand for the tokens that have no part in this call. None if
            nothing is shared.
        longest: most tokens of a segment, and of the queries and keys of a sequence in `prompts`.
        tree: most tokens of a prompt and its completions together.
    """

    segments: Tensor
    prompts: Tensor | None
    longest: tuple[int, int, int]
    tree: int


@dataclass(frozen=True, eq=False, repr=False)
class PackedLayout:
    """How T packed tokens are divided into segments, and what each of them sees.

    Attributes:
        visible_until: int32 `[T]`; key k is seen by the queries k <= q < visible_until[k].
        positions: int32 `[T]`; position of each token in its sequence, for rotary embeddings and windows.
        segment_starts: the S + 1 boundaries of the segments, on the host.
    """

    visible_until: Tensor
    positions: Tensor
    segment_starts: tuple[int, ...]

    @staticmethod
    def from_lengths(lengths: Sequence[int], device: torch.device | str = "cpu") -> "PackedLayout":
        """Independent segments of these lengths, in order. Raises `ValueError` as `from_forest` does."""
        return PackedLayout.from_forest(lengths, [-1] * len(lengths), device)

    @staticmethod
    def from_forest(
        lengths: Sequence[int], parents: Sequence[int], device: torch.device | str = "cpu"
    ) -> "PackedLayout":
        """Segments of which each continues its parent: a prompt and its completions, a tree of turns.

        Args:
            lengths: of the S segments, in depth-first order; 0 is allowed.
            parents: index of each segment's parent, below its own; -1 for a root.
            device: where the tensors go.

        A segment's positions go on where its parent's end.

        Raises:
            ValueError: lists of different lengths or not of integers, a negative length, a parent that doesn't come
                before its child, another order than depth-first, 2^31 tokens or more; with the segment and the numbers.
        """
        if len(lengths) != len(parents):
            raise ValueError(f"PackedLayout: {len(lengths)} lengths, but {len(parents)} parents")
        sizes, above = _integers("lengths", lengths), _integers("parents", parents)
        forest = sizes.ctypes.data, above.ctypes.data, len(sizes)
        tokens = _C.forest_tokens(*forest)
        place = torch.empty(0, device=device).device  # "cuda" with the index of the current one
        if layout_cuda.has_kernels(place):
            boundaries = (0, *sizes.cumsum().tolist())
            layout = PackedLayout(*layout_cuda.expand(sizes, above, tokens, place), boundaries)
            vars(layout).update(segment_ends=_segment_ends(boundaries, above.tolist()), consecutive=True)
            return layout
        visible_until, positions = (torch.empty(tokens, dtype=torch.int32) for _ in range(2))
        starts = np.empty(len(sizes) + 1, np.int64)
        _C.forest_layout(*forest, visible_until.data_ptr(), positions.data_ptr(), starts.ctypes.data)
        return PackedLayout(visible_until, positions, tuple(starts.tolist())).to(place)

    @staticmethod
    def from_position_ids(position_ids: Tensor) -> "PackedLayout":
        """The packing that position ids `[T]` or `[1, T]` imply: a sequence starts wherever they don't go up by one.

        The layout is on the device of `position_ids`; reading them synchronises a GPU. Raises `ValueError` for another
        shape, for numbers that aren't integers, and for integers below 0 or beyond int32.
        """
        ids = position_ids.squeeze(0) if position_ids.ndim == 2 else position_ids
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(
                f"PackedLayout: position ids must be [T] or [1, T] integers, got {list(position_ids.shape)} "
                f"{position_ids.dtype}"
            )
        host = ids.to("cpu", torch.int64).contiguous()
        visible_until = torch.empty(len(host), dtype=torch.int32)
        starts = np.empty(len(host) + 1, np.int64)
        segments = _C.sequence_layout(host.data_ptr(), len(host), visible_until.data_ptr(), starts.ctypes.data)
        return PackedLayout(visible_until, host.int(), tuple(starts[: segments + 1].tolist())).to(ids.device)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.segment_starts[-1]

    @cached_property
    def segment_ends(self) -> tuple[int, ...]:
        """Where each segment and all that continues it end, on the host.

        Known of a layout that was moved from the CPU, as all are that the functions above make; else this waits for
        the GPU.
        """
        until = self.visible_until.cpu().numpy()
        return tuple(int(until[start]) if start < end else end for start, end in pairwise(self.segment_starts))

    @cached_property
    def consecutive(self) -> bool:
        """Whether positions go up by one within every segment. Known on the host when `segment_ends` are."""
        steps = np.diff(self.positions.cpu().numpy())
        inside = np.ones(len(steps) + 1, bool)
        inside[[start - 1 for start in self.segment_starts if 0 < start < self.num_tokens]] = False
        return bool((steps == 1)[inside[:-1]].all())

    @cached_property
    def restart(self) -> int | None:
        """The first token whose position isn't its index, or None: on the host, so this waits for a GPU."""
        others = np.flatnonzero(self.positions.cpu().numpy() != np.arange(self.num_tokens))
        return int(others[0]) if len(others) else None

    @property
    def independent(self) -> bool:
        """Whether every segment is a sequence of its own, seeing only itself."""
        return self.segment_ends == self.segment_starts[1:]

    @cached_property
    def schedule(self) -> Tensor:
        """For blocks of `BLOCK` tokens, int32 `[5, blocks]`.

        The rows are the largest `visible_until`, the smallest, the largest position, the first token of the block in
        which the first token's tree starts, and the smallest position. Computed once, on the device, without
        synchronising it; zeros fill it up to a multiple of 4 blocks.
        """
        kernels = layout_cuda.has_kernels(self.visible_until.device)
        return (layout_cuda.schedule if kernels else torch_schedule)(self.visible_until, self.positions)

    @cached_property
    def varlen(self) -> Varlen:
        """Computed once. Raises `ValueError` for a segment that continues one that continues another."""
        own, queries, keys = [0], [0], [0]
        root_until = tree = 0
        for (start, end), until in zip(pairwise(self.segment_starts), self.segment_ends, strict=True):
            if start == end:
                continue
            if start < root_until and until > end:
                raise ValueError(
                    f"PackedLayout: tokens {start} to {end} continue a segment and are continued up to {until}; "
                    "one shared level can be computed by variable-length attention, not two"
                )
            own.append(end)
            if until > end:
                queries += [end, end, until]
                keys += [keys[-1], start, end]
                tree = max(tree, until - start)
            root_until = max(root_until, until)
        queries += [self.num_tokens, self.num_tokens]
        keys += [keys[-1], self.num_tokens]
        longest = [max((b - a for a, b in pairwise(bounds)), default=0) for bounds in (own, queries, keys)]
        device = self.visible_until.device
        return Varlen(
            torch.tensor(own, dtype=torch.int32, device=device),
            torch.tensor([queries, keys], dtype=torch.int32, device=device) if tree else None,
            (longest[0], longest[1], longest[2]),
            tree,
        )

    def to(self, device: torch.device | str) -> "PackedLayout":
        """The same layout with its tensors on `device`."""
        device = torch.empty(0, device=device).device  # "cuda" with the index of the current one
        if self.visible_until.device == device:
            return self
        moved = PackedLayout(self.visible_until.to(device), self.positions.to(device), self.segment_starts)
        for known in ("segment_ends", "consecutive"):
            if self.visible_until.is_cpu or known in vars(self):
                vars(moved)[known] = getattr(self, known)  # reading it there would wait for the GPU
        return moved

    def draw(self, largest: int = 64) -> str:
        """The mask as text: a line for each query, a column for each key, `#` where it is seen and `.` where not.

        Raises `ValueError` for more than `largest` tokens.
        """
        if self.num_tokens > largest:
            raise ValueError(f"PackedLayout: {self.num_tokens} tokens are too many to draw (at most {largest})")
        index = torch.arange(self.num_tokens)
        visible = (index <= index[:, None]) & (index[:, None] < self.visible_until.cpu())
        return "\n".join("".join("#" if seen else "." for seen in row) for row in visible.tolist())

    def __repr__(self) -> str:
        """For example `PackedLayout(14 tokens on cpu, segments of 4(3, 2), 5)`: children are in brackets."""
        until = self.visible_until.tolist()
        spans = [span for span in pairwise(self.segment_starts) if span[0] < span[1]]
        text = ""
        open_until: list[int] = []
        for start, end in spans[:_SHOWN]:
            depth = len(open_until)
            open_until = [limit for limit in open_until if limit > start]
            closed = depth - len(open_until)
            text += ")" * (closed - 1) + (", " if closed else "(" if depth else "") + str(end - start)
            open_until.append(until[start])
        more = f" and {len(spans) - _SHOWN} more" if len(spans) > _SHOWN else ")" * (len(open_until) - 1)
        return f"PackedLayout({self.num_tokens} tokens on {self.visible_until.device}, segments of {text}{more})"


def torch_schedule(visible_until: Tensor, positions: Tensor) -> Tensor:
    """`PackedLayout.schedule` by PyTorch's ops."""
    fill = (0, -len(visible_until) % (4 * BLOCK))
    until, positions = (torch.nn.functional.pad(x, fill) for x in (visible_until, positions))
    index = torch.arange(len(until), dtype=torch.int32, device=until.device)
    starts = torch.where(until.cummax(0).values.roll(1) <= index, index, 0) if len(until) else until
    until, positions = until.view(-1, BLOCK), positions.view(-1, BLOCK)
    tree_start = starts.cummax(0).values[::BLOCK] // BLOCK * BLOCK
    return torch.stack([until.amax(1), until.amin(1), positions.amax(1), tree_start, positions.amin(1)])


_SHOWN = 12


def _segment_ends(starts: Sequence[int], parents: list[int]) -> tuple[int, ...]:
    """Where each segment of a forest and all that continues it end; where it has no tokens, where it starts."""
    ends = list(starts[1:])
    for segment, parent in reversed(list(enumerate(parents))):
        if parent >= 0:
            ends[parent] = max(ends[parent], ends[segment])
    return tuple(end if start < own else own for (start, own), end in zip(pairwise(starts), ends, strict=True))


def _integers(name: str, values: Sequence[int]) -> np.ndarray:
    """`values` as int64 `[S]`."""
    numbers = np.asarray(values, object)
    if numbers.ndim != 1:
        raise ValueError(f"PackedLayout: {name} must be one list of integers, got the shape {list(numbers.shape)}")
    for i, number in enumerate(numbers):
        whole = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
        if not whole or not -(2**31) <= number < 2**31:
            raise ValueError(f"PackedLayout: {name}[{i}] is {number}, not an integer that int32 holds")
    return numbers.astype(np.int64)
