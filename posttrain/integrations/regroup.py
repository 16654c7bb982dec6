"""Somebody else's batch as a forest in which common prefixes are there once, and padding isn't.

A batch `[B, T]` of token ids holds sequences: without a mask a row is one, or several where its positions don't go up
by one (a padding-free batch), as transformers reads it; with a mask a row is one, between its padding. Two sequences
have a common prefix where their first tokens agree, and the positions of those do, too: then what the model computes
for these tokens is the same. In a batch of TRL's GRPO, padded on the left, that is so for completions of one prompt.

The model runs the forest, and the hidden states `[B, T, H]` that the caller expects are copies of those of the forest.
The gradient of a copy adds to the gradient of what it is a copy of, which is what makes that of a shared token right.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.data.share import share_prefixes
from posttrain.ops.layout import PackedLayout


@dataclass(frozen=True, eq=False)
class Regrouped:
    """A batch `[B, T]` as a forest of F tokens.

    Attributes:
        input_ids: int64 `[F]`.
        layout: of the forest, with the positions that the tokens have in the batch.
        places: int64 `[B, T]`; which token of the forest each token of the batch is, F for padding.
        tokens: tokens of the batch without padding.
    """

    input_ids: Tensor
    layout: PackedLayout
    places: Tensor
    tokens: int

    def spread(self, hidden: Tensor) -> Tensor:
        """From `[F, H]` to `[B, T, H]`; padding gets zeros."""
        # embedding, since the gradients of its rows are added up in the same order every time, on a GPU too
        return torch.nn.functional.embedding(self.places, torch.nn.functional.pad(hidden, (0, 0, 0, 1)))


def regroup(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Regrouped | str:
    """The forest of a batch, or why there is none. Reading the batch on the host synchronises a GPU.

    Args:
        input_ids: `[B, T]`.
        attention_mask: `[B, T]`, 0 for padding, which must be at the ends of rows; or None.
        position_ids: `[B, T]` or `[1, T]`; None means that each row counts from 0, padding too.
    """
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        return f"the attention_mask is {list(attention_mask.shape)}, the input_ids are {list(input_ids.shape)}"
    if position_ids is not None and position_ids.shape not in (input_ids.shape, (1, input_ids.shape[1])):
        return f"the position_ids are {list(position_ids.shape)}, the input_ids {list(input_ids.shape)}"
    ids = input_ids.cpu().numpy()
    real = None if attention_mask is None else attention_mask.cpu().numpy() != 0
    count = torch.arange(input_ids.shape[1]) if position_ids is None else position_ids.cpu()
    positions = count.expand(input_ids.shape).numpy()
    bounds = _runs(positions) if real is None else _unpadded(real, positions)
    if isinstance(bounds, str):
        return bounds
    if not bounds:
        return "there is no token but padding"
    return _forest(ids.ravel(), positions.ravel(), bounds, input_ids)


def _runs(positions: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Where sequences start and end among the B T tokens: with a row, and where positions don't go up by one."""
    starts = np.ones(positions.shape, bool)
    starts[:, 1:] = np.diff(positions, axis=1) != 1
    first = np.flatnonzero(starts)
    return list(zip(first.tolist(), [*first[1:].tolist(), positions.size], strict=True))


def _unpadded(real: NDArray[np.bool_], positions: NDArray[np.int64]) -> list[tuple[int, int]] | str:
    """Where each row's tokens start and end among the B T tokens, or what is unusual about them."""
    bounds = []
    for row, (mask, position) in enumerate(zip(real, positions, strict=True)):
        where = np.flatnonzero(mask)
        if not len(where):
            continue
        start, end = int(where[0]), int(where[-1]) + 1
        if end - start != len(where):
            return f"row {row} of the attention_mask has padding between tokens"
        if (np.diff(position[start:end]) != 1).any():
            return f"the position_ids of row {row} don't go up by one, and an attention_mask makes it one sequence"
        bounds.append((row * len(mask) + start, row * len(mask) + end))
    return bounds


def _forest(
    ids: NDArray[np.int64], positions: NDArray[np.int64], bounds: list[tuple[int, int]], input_ids: Tensor
) -> Regrouped:
    """The forest of the sequences that lie within `bounds` among the tokens of `input_ids`."""
    sequences = []
    starts: dict[tuple[int, int], int] = {}  # first token and its position, as a token of its own
    for start, end in bounds:
        sequence = ids[start:end].astype(np.int32)
        sequence[0] = starts.setdefault((int(ids[start]), int(positions[start])), -1 - len(starts))
        sequences.append(sequence)
    forest = share_prefixes(sequences)
    places = np.full(ids.shape, forest.num_tokens)
    source = np.empty(forest.num_tokens, np.int64)
    for (start, end), path in zip(bounds, forest.places(), strict=True):
        places[start:end] = path
        source[path] = np.arange(start, end)
    device = input_ids.device
    layout = PackedLayout.from_forest(forest.lengths, forest.parents)
    return Regrouped(
        input_ids=torch.from_numpy(ids[source]).to(device),
        layout=replace(layout, positions=torch.from_numpy(positions[source]).int()).to(device),
        places=torch.from_numpy(places).view(input_ids.shape).to(device),
        tokens=sum(end - start for start, end in bounds),
    )
