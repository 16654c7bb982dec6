"""PairSource: preference pairs in optimizer steps, the two answers of a pair over one prompt in one micro-batch."""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.data import PackedBatch, Pair
from posttrain.data.share import Forest, keep_apart, share_prefixes
from posttrain.train.config import ConfigError
from posttrain.train.source import EpochSource, Step, too_long


@dataclass(frozen=True)
class PairBatch:
    """P pairs with M target tokens.

    Attributes:
        packed: the answers, chosen and rejected in turns, over their prompts.
        lengths: int64 `[P, 2]`, target tokens of the chosen and the rejected answers.
        longest: target tokens of the longest answer.
        numbers: int64 `[P]`, which pairs of the step these are.
        reference: float64 `[P, 2]`, log-probabilities under the reference, or None if they aren't known yet.
    """

    packed: PackedBatch
    lengths: Tensor
    longest: int
    numbers: Tensor
    reference: Tensor | None

    def to(self, device: torch.device | str) -> "PairBatch":
        """The same batch with its tensors on `device`."""
        reference = None if self.reference is None else self.reference.to(device)
        return PairBatch(
            self.packed.to(device), self.lengths.to(device), self.longest, self.numbers.to(device), reference
        )


@dataclass(frozen=True, kw_only=True)
class PairStep(Step):
    """A step of pairs.

    Attributes:
        num_pairs: of all its micro-batches.
        num_chosen_targets: target tokens of the chosen answers.
    """

    num_pairs: int
    num_chosen_targets: int


class PairSource(EpochSource):
    """Pairs packed without padding, `pairs_per_step` at a time.

    The pairs of a step are spread over micro-batches of at most `max_tokens` tokens. With `share`, what they begin with
    alike is there once: the prompt of a pair, a prompt with several pairs, a system prompt (posttrain/data/share.py).
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        pairs_per_step: int,
        max_tokens: int,
        shuffle_seed: int | None = None,
        share: bool = False,
    ) -> None:
        if not pairs:
            raise ConfigError("there is no pair to train on")
        self._pairs = pairs
        self._max_tokens = max_tokens
        self._forest_of = share_prefixes if share else keep_apart
        self._reference: Tensor | None = None
        for number, pair in enumerate(pairs):
            if len(pair.chosen) + len(pair.rejected) > max_tokens:
                num_tokens = self._forest([pair]).num_tokens
                if num_tokens > max_tokens:
                    raise too_long(f"{pair.origin or f'pair {number}'}, with both answers,", num_tokens, max_tokens)
        super().__init__(len(pairs), pairs_per_step, shuffle_seed)

    def with_reference(self, logprobs: Tensor, kept: Tensor | None = None) -> "PairSource":
        """The same with log-probabilities `[len(pairs), 2]` under the reference; only pairs `kept` (bool), if given."""
        kept = torch.ones(len(logprobs), dtype=torch.bool) if kept is None else kept
        source = copy(self)
        source._pairs = [pair for pair, keep in zip(self._pairs, kept.tolist(), strict=True) if keep]
        source._reference = logprobs[kept]
        source._num_sequences = len(source._pairs)
        return source

    @property
    def lengths(self) -> Tensor:
        """int64 `[len(pairs), 2]`, target tokens of all answers."""
        return _lengths(self._pairs)

    def in_order(self) -> Iterator[PairStep]:
        """All pairs once, unshuffled, in portions of the size of a step."""
        for first in range(0, len(self._pairs), self._sequences_per_step):
            yield self._pack(range(first, min(first + self._sequences_per_step, len(self._pairs))))

    def _forest(self, pairs: Sequence[Pair]) -> Forest:
        return self._forest_of([answer.input_ids for pair in pairs for answer in (pair.chosen, pair.rejected)])

    def _pack(self, sequences: Sequence[int]) -> PairStep:
        pairs = [self._pairs[i] for i in sequences]
        lengths = _lengths(pairs)
        reference = None if self._reference is None else self._reference[torch.tensor(sequences)]
        forest = self._forest(pairs)
        batches = []
        for members in forest.divide(self._max_tokens, units=[i // 2 for i in range(2 * len(pairs))]):
            numbers = torch.tensor([member // 2 for member in members[::2]])
            answers = [answer for n in numbers.tolist() for answer in (pairs[n].chosen, pairs[n].rejected)]
            batches.append(
                PairBatch(
                    packed=PackedBatch.lay_out(answers, forest.select(members)),
                    lengths=lengths[numbers],
                    longest=int(lengths[numbers].max()),
                    numbers=numbers,
                    reference=None if reference is None else reference[numbers],
                )
            )
        return PairStep(
            batches=batches,
            num_targets=int(lengths.sum()),
            num_tokens=sum(len(pair.chosen) + len(pair.rejected) for pair in pairs),
            num_packed_tokens=sum(len(batch.packed.input_ids) for batch in batches),
            num_pairs=len(pairs),
            num_chosen_targets=int(lengths[:, 0].sum()),
        )


def _lengths(pairs: Sequence[Pair]) -> Tensor:
    return torch.tensor([[pair.chosen.num_targets, pair.rejected.num_targets] for pair in pairs])
