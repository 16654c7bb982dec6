"""PackedLayout: which packed tokens see which, as one integer per key.

A packed batch is a forest of segments in depth-first order. All descendants of a segment follow it directly, so

    query q sees key k   <=>   k <= q < visible_until[k]

with `visible_until[k]` the end of the subtree of k's segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
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
        """Independent segments of these lengths, in order. Raises `ValueError` for a negative length."""
        if any(length < 0 for length in lengths):
            raise ValueError(f"PackedLayout: lengths must not be negative, got {list(lengths)}")
        sizes = torch.tensor(lengths, dtype=torch.int64)
        ends = sizes.cumsum(0)
        positions = torch.arange(int(sizes.sum())) - (ends - sizes).repeat_interleave(sizes)
        return PackedLayout(
            visible_until=ends.repeat_interleave(sizes).to(device, torch.int32),
            positions=positions.to(device, torch.int32),
            segment_starts=(0, *ends.tolist()),
        )

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.segment_starts[-1]

    @cached_property
    def independent(self) -> bool:
        """Whether every segment is a sequence of its own, seeing only itself. The first look synchronises a GPU."""
        ends = torch.tensor(self.segment_starts[1:], dtype=torch.int32)
        lengths = ends.diff(prepend=ends.new_zeros(1))
        return torch.equal(self.visible_until.cpu(), ends.repeat_interleave(lengths))

    def to(self, device: torch.device | str) -> "PackedLayout":
        """The same layout with its tensors on `device`."""
        return PackedLayout(self.visible_until.to(device), self.positions.to(device), self.segment_starts)
