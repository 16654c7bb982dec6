"""Sources: which examples make an optimizer step, and how they are spread over micro-batches.

Everything is a pure function of the step's number: the position in the data is that number alone, and a run that is
resumed sees what it would have seen.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
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
        metrics: what is known of the step as a whole, before its micro-batches are run.
    """

    batches: list[Any]
    num_targets: int
    num_tokens: int
    num_packed_tokens: int
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Source(Protocol):
    """Where the loop gets its steps from."""

    @property
    def steps_per_epoch(self) -> int | Fraction:
        """Optimizer steps of one pass over the data."""

    def step(self, number: int) -> Step:
        """Optimizer step `number`, counted from 0 over all epochs."""

    def everything(self) -> Step:
        """All data as one step, for an evaluation."""

    def state(self, number: int) -> dict[str, Tensor]:
        """What `step(number)` and the steps after it need besides their numbers."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""


class EpochSource(ABC):
    """`num_sequences` sequences in seeded order, `sequences_per_step` at a time; `_pack` makes a step of them."""

    def __init__(self, num_sequences: int, sequences_per_step: int, shuffle_seed: int | None) -> None:
        self._num_sequences = num_sequences
        self._sequences_per_step = sequences_per_step
        self._shuffle_seed = shuffle_seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data; the last one may have fewer sequences."""
        return -(-self._num_sequences // self._sequences_per_step)

    def step(self, number: int) -> Step:
        """Optimizer step `number`, counted from 0 over all epochs."""
        epoch, within = divmod(number, self.steps_per_epoch)
        first = within * self._sequences_per_step
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return self._pack(self._order[first : first + self._sequences_per_step].tolist())

    def everything(self) -> Step:
        """All data as one step."""
        return self._pack(range(self._num_sequences))

    def state(self, number: int) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to do: the number of a step is all there is."""
        if state:
            raise ConfigError("resume_from_checkpoint: the checkpoint is another method's, with completions in hand")

    def _shuffled(self, epoch: int) -> Tensor:
        if self._shuffle_seed is None:
            return torch.arange(self._num_sequences)
        generator = torch.Generator().manual_seed(self._shuffle_seed + epoch)
        return torch.randperm(self._num_sequences, generator=generator)

    @abstractmethod
    def _pack(self, sequences: Sequence[int]) -> Step:
        """The step made of these sequences."""


class PackedSource(EpochSource):
    """Examples packed without padding.

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
            raise too_long(examples[longest].origin or f"example {longest}", len(examples[longest]), max_tokens)
        self._examples = examples
        self._max_tokens = max_tokens
        self._forest_of = share_prefixes if share else keep_apart
        lengths = [len(example) for example in examples]
        self._sequences = (
            [[i] for i in range(len(examples))] if bin_tokens is None else pack_best_fit(lengths, bin_tokens)
        )
        super().__init__(len(self._sequences), sequences_per_step, shuffle_seed)

    def _pack(self, sequences: Sequence[int]) -> Step:
        examples = [self._examples[i] for sequence in sequences for i in self._sequences[sequence]]
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


def too_long(name: str, num_tokens: int, max_tokens: int) -> ConfigError:
    """The error for an example that no micro-batch can hold."""
    return ConfigError(
        f"{name} has {num_tokens} tokens, more than max_tokens_per_batch {max_tokens}; "
        "raise max_tokens_per_batch or lower max_length"
    )
