"""Steps in which every sequence that isn't complete draws one token, one after the other in C++ (csrc/burst.h)."""

import torch
from torch import Tensor

from posttrain.rollout.cache import pages_of
from posttrain.rollout.decoder import CompiledDecoder
from posttrain.rollout.sequence import Sequence


class Burst:
    """Up to `steps` tokens for each of `sequences`, whose pages have room for them.

    The parameters of the draws are not checked again: each sequence's first token was drawn by `sample`.

    Args:
        ends: the end-of-sequence tokens.
        until_one: whether to stop when one sequence is complete.

    Attributes:
        done: how many steps were taken.
    """

    def __init__(
        self, sequences: list[Sequence], decoder: CompiledDecoder, steps: int, ends: frozenset[int], until_one: bool
    ) -> None:
        count, params = len(sequences), [s.params for s in sequences]
        self.done = 0
        self._decoder, self._until_one = decoder, until_one
        self._longest = max(min(s.limit, len(s.tokens) + steps) for s in sequences)
        self._table = torch.from_numpy(pages_of(sequences))
        self._contexts = torch.tensor([s.computed for s in sequences], dtype=torch.int32)
        self._tokens = torch.empty(steps + 1, count, dtype=torch.int64)
        self._tokens[0] = torch.tensor([s.tokens[-1] for s in sequences])
        self._logprobs = torch.empty(steps, count)
        self._drawn = torch.zeros(count, dtype=torch.int64)
        self._ends = (
            torch.tensor([min(steps, s.limit - len(s.tokens)) for s in sequences]),
            torch.tensor([not p.ignore_eos for p in params], dtype=torch.int64),
            torch.tensor(sorted(ends), dtype=torch.int64),
        )
        self._draws = (
            torch.tensor([float(p.temperature) for p in params]),
            torch.tensor([int(p.top_k) for p in params]),
            torch.tensor([float(p.top_p) for p in params]),
            torch.tensor([float(p.min_p) for p in params]),
            torch.tensor([s.seed for s in sequences]),
            torch.tensor([s.drawn for s in sequences]),
        )

    def advance(self) -> bool:
        """Some steps; whether more are to come."""
        before, table = self.done, self._table
        self.done = self._decoder.burst(
            (table.data_ptr(), self._contexts.data_ptr(), 0, table.stride(0), *table.shape),
            (*_addresses(*self._ends), len(self._ends[-1])),
            _addresses(*self._draws),
            _addresses(self._tokens, self._logprobs, self._drawn),
            before,
            longest=self._longest,
            until_one=self._until_one,
        )
        return self.done > before

    @property
    def some_complete(self) -> bool:
        """Whether a sequence was complete before the last step."""
        return bool((self._drawn < self.done).any())

    def results(self) -> tuple[list[list[int]], list[list[float]]]:
        """What each sequence drew, and the log-probabilities of it."""
        columns = (self._tokens[1:].T.tolist(), self._logprobs.T.tolist())
        tokens, logprobs = ([x[:n] for x, n in zip(rows, self._drawn.tolist(), strict=True)] for rows in columns)
        return tokens, logprobs


def _addresses(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)
