"""PackedBatch: sequences laid end to end, without padding, and what is predicted from where."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
    def pack(examples: Sequence[Example]) -> "PackedBatch":
        """Lay `examples` end to end. Only tokens that predict something get a row."""
        lengths = [len(example) for example in examples]
        input_ids = np.concatenate([example.input_ids for example in examples] or [np.empty(0, np.int32)])
        targeted = np.concatenate([_targeted(example) for example in examples] or [np.empty(0, np.bool_)])
        where = torch.from_numpy(np.flatnonzero(targeted))
        tokens = torch.from_numpy(input_ids.astype(np.int64))
        owner = torch.arange(len(examples)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        return PackedBatch(
            input_ids=tokens,
            layout=PackedLayout.from_lengths(lengths),
            rows=where - 1,
            targets=tokens[where],
            sequence=owner[where],
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
