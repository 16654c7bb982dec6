"""Steps in which every sequence draws one token, one after the other in C++.

Where each token goes, its angles and the numbers of its draws follow from the first step, so the arrays of all steps,
`[steps, S, ...]`, are made at once, and a step is two calls with the addresses of its rows.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain import _C
from posttrain.rollout.cache import pages_of
from posttrain.rollout.decoder import CompiledDecoder
from posttrain.rollout.sequence import Sequence


class Burst:
    """Up to `steps` tokens for each of `sequences`, whose pages have room for them.

    The parameters of the draws are not checked again: each sequence's first token was drawn by `sample`.
    """

    def __init__(self, sequences: list[Sequence], decoder: CompiledDecoder, page_size: int, steps: int) -> None:
        count, self._decoder = len(sequences), decoder
        numbers = np.arange(steps)[:, None]
        positions = np.array([s.computed for s in sequences]) + numbers
        table = pages_of(sequences)
        pages = table[np.arange(count), positions // page_size].astype(np.int64)
        cos, sin = decoder.angles(torch.from_numpy(positions.reshape(-1)))
        self._table, self._rows = torch.from_numpy(table), torch.arange(count)
        self._tokens = torch.empty(steps + 1, count, dtype=torch.int64)
        self._tokens[0] = torch.tensor([s.tokens[-1] for s in sequences])
        self._logprobs = torch.empty(steps, count)
        self._logits = torch.empty(count, len(decoder.head.weight), dtype=cos[0].dtype)
        self._slots = torch.from_numpy(pages * page_size + positions % page_size)
        self._contexts = torch.from_numpy((positions + 1).astype(np.int32))
        self._offsets = torch.from_numpy(np.array([s.drawn for s in sequences]) + numbers)
        self._angles = [x.view(steps, count, -1) for x in (cos[0], sin[0], cos[-1], sin[-1])]
        self._parameters = [
            torch.tensor([float(s.params.temperature) for s in sequences]),
            torch.tensor([int(s.params.top_k) for s in sequences]),
            torch.tensor([float(s.params.top_p) for s in sequences]),
            torch.tensor([float(s.params.min_p) for s in sequences]),
            torch.tensor([s.seed for s in sequences]),
        ]

    def step(self, number: int) -> Any:
        """Take step `number`, after those before it; the tokens drawn as an array `[S]`."""
        count, vocabulary = self._logits.shape
        self._decoder.run(
            (_row(self._tokens, number), _row(self._slots, number), self._rows.data_ptr()),
            tuple(_row(x, number) for x in self._angles),
            (count, count, self._angles[0].shape[2]),
            (self._table.data_ptr(), _row(self._contexts, number), 0, self._table.stride(0), *self._table.shape),
            self._logits,
        )
        logits = self._logits.float()
        _C.sample(
            logits.data_ptr(),
            vocabulary,
            count,
            vocabulary,
            (*(x.data_ptr() for x in self._parameters), _row(self._offsets, number)),
            _row(self._tokens, number + 1),
            _row(self._logprobs, number),
            torch.get_num_threads(),
        )
        return self._tokens[number + 1].numpy()

    def drawn(self, steps: int) -> tuple[list[list[int]], list[list[float]]]:
        """What each sequence drew in the first `steps` steps, and the log-probabilities of it."""
        return self._tokens[1 : steps + 1].T.tolist(), self._logprobs[:steps].T.tolist()


def _row(x: Tensor, number: int) -> int:
    """The address of x[number]."""
    return x.data_ptr() + number * x.stride(0) * x.itemsize
