"""PackedSource: which examples make an optimizer step, and how they are spread over micro-batches.

Everything is a pure function of the step's number: the position in the data is that number alone, and a run that is
resumed sees what it would have seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from posttrain.data import Example, PackedBatch
from posttrain.data.pack import pack_best_fit
from posttrain.data.share import keep_apart, share_prefixes
from posttrain.train.config import ConfigError


@dataclass(frozen=True)
class Step:
    """The data of one optimizer step.

    Attributes:
        batches: its micro-batches; each has a method `to(device)`.
        num_targets: target tokens of all of them.
        num_tokens: tokens of its examples.
        num_packed_tokens: tokens of its micro-batches, in which a shared prefix is there once.
    """

    batches: list[Any]
    num_targets: int
    num_tokens: int
    num_packed_tokens: int


class Source(Protocol):
    """Where the loop gets its steps from."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data."""

    def step(self, number: int) -> Step:
        """Optimizer step `number`, counted from 0 over all epochs."""

    def everything(self) -> Step:
        """All data as one step, for an evaluation."""


class PackedSource:
    """Examples in seeded order, `sequences_per_step` at a time, packed without padding.

    A sequence is an example or, with `bin_tokens`, a bin of that many tokens filled with examples (best fit). In either
    case the examples of a step are spread anew over micro-batches of at most `max_tokens` tokens.

    With `share`, examples of a step that begin alike go into the same micro-batch, which has what they share once
    (posttrain/data/share.py). Which examples make a step, and its loss and gradient, stay the same.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        sequences_per_step: int,
        max_tokens: int,
        bin_tokens: int | None = None,
        shuffle_seed: int | None = None,
        share: bool = False,
    ) -> None:
        if not examples:
            raise ConfigError("there is no example to train on")
        longest = max(range(len(examples)), key=lambda i: len(examples[i]))
        if len(examples[longest]) > max_tokens:
            name = examples[longest].origin or f"example {longest}"
            raise ConfigError(
                f"{name} has {len(examples[longest])} tokens, more than max_tokens_per_batch {max_tokens}; "
                "raise max_tokens_per_batch or lower max_length"
            )
        self._examples = examples
        self._max_tokens = max_tokens
        self._sequences_per_step = sequences_per_step
        self._shuffle_seed = shuffle_seed
        self._forest_of = share_prefixes if share else keep_apart
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        lengths = [len(example) for example in examples]
        self._sequences = (
            [[i] for i in range(len(examples))] if bin_tokens is None else pack_best_fit(lengths, bin_tokens)
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data; the last one may have fewer sequences."""
        return -(-len(self._sequences) // self._sequences_per_step)

    def step(self, number: int) -> Step:
        """Optimizer step `number`, counted from 0 over all epochs."""
        epoch, within = divmod(number, self.steps_per_epoch)
        first = within * self._sequences_per_step
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        chosen = self._order[first : first + self._sequences_per_step]
        return self._pack([i for sequence in chosen.tolist() for i in self._sequences[sequence]])

    def everything(self) -> Step:
        """All examples as one step."""
        return self._pack(range(len(self._examples)))

    def _shuffled(self, epoch: int) -> Tensor:
        if self._shuffle_seed is None:
            return torch.arange(len(self._sequences))
        generator = torch.Generator().manual_seed(self._shuffle_seed + epoch)
        return torch.randperm(len(self._sequences), generator=generator)

    def _pack(self, indices: Sequence[int]) -> Step:
        examples = [self._examples[i] for i in indices]
        forest = self._forest_of([example.input_ids for example in examples])
        batches = [
            PackedBatch.lay_out([examples[i] for i in members], forest.select(members))
            for members in forest.divide(self._max_tokens)
        ]
        return Step(
            batches=batches,
            num_targets=sum(example.num_targets for example in examples),
            num_tokens=sum(len(example) for example in examples),
            num_packed_tokens=sum(len(batch.input_ids) for batch in batches),
        )
