"""PackedBatch: sequences laid end to end, without padding, and what is predicted from where."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from posttrain.data import share
from posttrain.data.example import Example
from posttrain.ops.layout import PackedLayout


@dataclass(frozen=True)
class PackedBatch:
    """T packed tokens with M targets.

    Attributes:
        input_ids: int64 `[T]`.
        layout: which token sees which, and positions.
        rows: int64 `[M]`; `rows[m]` is the packed token whose hidden state predicts `targets[m]`.
        targets: int64 `[M]`; token ids.
        sequence: int64 `[M]`; index of the example that target m belongs to.
        num_sequences: number of examples.
    """

    input_ids: Tensor
    layout: PackedLayout
    rows: Tensor
    targets: Tensor
    sequence: Tensor
    num_sequences: int

    @staticmethod
    def pack(examples: Sequence[Example], *, share_prefixes: bool = False) -> "PackedBatch":
        """Lay `examples` end to end. Only tokens that predict something get a row.

        With `share_prefixes`, tokens that several examples begin with are there once (posttrain/data/share.py). The
        last of them has a row for the first target of each branch; losses and gradients are those of copies.
        """
        sequences = [example.input_ids for example in examples]
        return PackedBatch.lay_out(
            examples, share.share_prefixes(sequences) if share_prefixes else share.keep_apart(sequences)
        )

    @staticmethod
    def lay_out(examples: Sequence[Example], forest: share.Forest) -> "PackedBatch":
        """Lay `examples` out as `forest` says, which has their tokens."""
        targeted = [np.flatnonzero(_targeted(example)) for example in examples]
        nothing = [np.empty(0, np.int64)]
        rows = [places[where - 1] for places, where in zip(forest.places(), targeted, strict=True)]
        targets = [example.input_ids[where] for example, where in zip(examples, targeted, strict=True)]
        counts = torch.tensor([len(where) for where in targeted], dtype=torch.int64)
        return PackedBatch(
            input_ids=torch.from_numpy(np.concatenate(forest.tokens or nothing).astype(np.int64)),
            layout=PackedLayout.from_forest(forest.lengths, forest.parents),
            rows=torch.from_numpy(np.concatenate(rows or nothing)),
            targets=torch.from_numpy(np.concatenate(targets or nothing).astype(np.int64)),
            sequence=torch.arange(len(examples)).repeat_interleave(counts),
            num_sequences=len(examples),
        )

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch with its tensors on `device`."""
        return PackedBatch(
            self.input_ids.to(device),
            self.layout.to(device),
            self.rows.to(device),
            self.targets.to(device),
            self.sequence.to(device),
            self.num_sequences,
        )


def _targeted(example: Example) -> np.ndarray:
    mask = example.loss_mask.copy()
    mask[:1] = False
    return mask
