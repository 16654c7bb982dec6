"""Decoding on a GPU: a step is a captured graph, and a block of steps runs without waiting for the device.

A step of a small batch is some hundred short kernels, which Python launches more slowly than the device runs them. As a
graph it is one launch. All it reads and writes lies at addresses that stay, for a number of rows and of pages:

    tokens, positions        what is computed; the step puts the drawn token and the next position there
    last                     where positions end: beyond them a model may have no position embeddings
    table                    the pages of each row, and behind them the cache's spare page
    temperature ... offsets  how each row draws; the step counts the offsets up
    drawn                    tokens and log-probabilities of a block of steps, which the host reads in one copy

Who is complete, the host sees after a block: what a row drew after its end is dropped. Where its pages end it writes to
the spare page, as do rows without a sequence. Until then it writes into its own pages, which nobody else holds there.

Graphs are captured when a batch first needs them. They hold addresses of weights and pages, so whoever owns them throws
them away when `read_by` says that something else would be read.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from posttrain.ops import sample
from posttrain.ops.backend import forced
from posttrain.rollout.cache import KVCache, StepLayout, pages_of
from posttrain.rollout.sequence import Sequence

BLOCK = 8
_LEAST_PAGES = 64  # of a table: fewer graphs for a little more work in finding out where sequences end

Forward = Callable[[Tensor, Tensor, StepLayout], Tensor]  # tokens [B], positions [B] -> logits [B, V]
Capture = Callable[[Callable[[], None]], Callable[[], None]]  # a step -> what runs it again, on the same memory


class CudaCapture:
    """Captures steps on `device`; their graphs share the memory of what they compute on the way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """`step` runs once before: kernels are compiled then, and libraries get their workspaces.

        Raises `RuntimeError` if the step does what a graph can't hold, such as wait for the device.
        """
        with torch.cuda.device(self._device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            caching = torch.is_autocast_cache_enabled()
            torch.set_autocast_cache_enabled(False)  # what it keeps is freed when autocast ends
            try:
                with torch.cuda.stream(aside):
                    step()
                torch.cuda.current_stream().wait_stream(aside)
                with torch.cuda.graph(graph, pool=self._pool):
                    step()
            finally:
                torch.set_autocast_cache_enabled(caching)
        return graph.replay


class DecodeGraph:
    """A step for up to `rows` sequences that have fewer than `pages` pages.

    Attributes:
        logits: `[rows, V]`, of the last step.
    """

    def __init__(self, rows: int, pages: int, forward: Forward, cache: KVCache, capture: Capture) -> None:
        full = partial(torch.full, device=cache.device)
        self._forward, self._cache = forward, cache
        self._tokens, self._positions = (full((rows,), 0, dtype=torch.int64) for _ in range(2))
        self._last = full((rows,), 0, dtype=torch.int64)
        self._table = full((rows, pages), cache.spare, dtype=torch.int32)
        self._draws = {name: full((rows,), fill, dtype=_dtype(fill)) for name, fill in _DRAWS.items()}
        self._step = full((1,), 0, dtype=torch.int64)
        self._drawn = full((BLOCK, 2, rows), 0, dtype=torch.int32)
        self.logits: Tensor | None = None
        self._replay = capture(self._run)

    def load(self, sequences: list[Sequence]) -> None:
        """Begin where `sequences` are."""
        rows, params = len(self._tokens), [s.params for s in sequences]
        table, pages = np.full(self._table.shape, self._cache.spare, np.int32), pages_of(sequences)
        table[: len(pages), : pages.shape[1]] = pages
        self._table.copy_(torch.from_numpy(table))
        columns: list[tuple[Tensor, list[Any], float]] = [
            (self._tokens, [s.tokens[-1] for s in sequences], 0),
            (self._positions, [s.computed for s in sequences], 0),
            (self._last, [s.limit - 1 for s in sequences], 0),
            (self._draws["seeds"], [s.seed for s in sequences], 0),
            (self._draws["offsets"], [s.drawn for s in sequences], 0),
        ]
        for name in ("temperature", "top_k", "top_p", "min_p"):
            columns.append((self._draws[name], [getattr(p, name) for p in params], _DRAWS[name]))
        for column, values, fill in columns:
            column.copy_(torch.tensor(values + [fill] * (rows - len(values)), dtype=column.dtype))

    def run(self, steps: int) -> None:
        """`steps` steps, at most BLOCK; the host goes on at once."""
        self._step.zero_()
        for _ in range(steps):
            self._replay()

    def drawn(self, steps: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Tokens and log-probabilities `[steps, count]` of the first rows in the last `steps` steps."""
        drawn = self._drawn[:steps].cpu().numpy()[:, :, :count].copy()
        return drawn[:, 0], drawn[:, 1].view(np.float32)

    def _run(self) -> None:
        size, positions = self._cache.page_size, self._positions
        pages = self._table.gather(1, positions[:, None] // size)[:, 0].long()
        layout = StepLayout(pages * size + positions % size, self._table, (positions + 1).int(), None)
        self.logits = self._forward(self._tokens, positions, layout)
        tokens, logprobs = sample(self.logits, **self._draws)
        self._drawn.index_copy_(0, self._step, torch.stack([tokens.int(), logprobs.view(torch.int32)])[None])
        self._tokens.copy_(tokens)
        torch.minimum(positions + 1, self._last, out=positions)
        self._draws["offsets"] += 1
        self._step += 1


_DRAWS: dict[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seeds": 0, "offsets": 0}


def _dtype(fill: float) -> torch.dtype:
    return torch.float32 if isinstance(fill, float) else torch.int64


class DecodeGraphs:
    """Graphs of one model as it is, for any batch: for powers of two of rows and of pages."""

    def __init__(self, forward: Forward, cache: KVCache, capture: Capture) -> None:
        self._make = partial(DecodeGraph, forward=forward, cache=cache, capture=capture)
        self._graphs: dict[tuple[int, int], DecodeGraph] = {}

    def loaded(self, sequences: list[Sequence]) -> DecodeGraph:
        """The graph for `sequences`, which begins where they are. Raises what capturing it raises."""
        pages = max(_LEAST_PAGES, *(len(sequence.pages) + 1 for sequence in sequences))
        rows, pages = (1 << (size - 1).bit_length() for size in (len(sequences), pages))
        if (rows, pages) not in self._graphs:
            self._graphs[rows, pages] = self._make(rows, pages)
        graph = self._graphs[rows, pages]
        graph.load(sequences)
        return graph


class GraphBurst:
    """Up to `steps` tokens for each of `sequences`, whose pages have room for them, as burst.py's `Burst`.

    It looks for ends after every block, and a batch in which one is complete is better left to a smaller graph.

    Args:
        graph: with `sequences` loaded.
        ends: the end-of-sequence tokens.

    Attributes:
        done: how many steps were taken.
    """

    def __init__(self, sequences: list[Sequence], graph: DecodeGraph, steps: int, ends: frozenset[int]) -> None:
        self.done = 0
        self._graph = graph
        self._most = np.array([min(steps, s.limit - len(s.tokens)) for s in sequences])
        self._heeds = np.array([not s.params.ignore_eos for s in sequences])
        self._ends = sorted(ends)
        self._drawn = self._most.copy()
        self._blocks: list[tuple[NDArray[np.int32], NDArray[np.float32]]] = []

    def advance(self) -> bool:
        """A block of steps; whether there was one to take."""
        steps = min(BLOCK, int(self._drawn.max()) - self.done)
        if steps <= 0:
            return False
        self._graph.run(steps)
        tokens, logprobs = self._graph.drawn(steps, len(self._most))
        ended = np.isin(tokens, self._ends) & self._heeds
        first = self.done + ended.argmax(0) + 1
        self._drawn = np.where(ended.any(0), np.minimum(self._drawn, first), self._drawn)
        self._blocks.append((tokens, logprobs))
        self.done += steps
        return True

    @property
    def some_complete(self) -> bool:
        """Whether a sequence is complete."""
        return bool((self._drawn <= self.done).any())

    def results(self) -> tuple[list[list[int]], list[list[float]]]:
        """What each sequence drew, and the log-probabilities of it."""
        columns = (np.concatenate(parts).T.tolist() for parts in zip(*self._blocks, strict=True))
        tokens, logprobs = ([x[:n] for x, n in zip(rows, self._drawn.tolist(), strict=True)] for rows in columns)
        return tokens, logprobs


def read_by(causal: nn.Module) -> tuple[Any, ...]:
    """What a graph of `causal` has in it: where its tensors are, and the numbers and switches of its modules.

    Equal as long as a graph reads what the modules would: training steps in place keep it, merged or exchanged adapters
    and loaded or moved weights don't.
    """
    kind = next(causal.parameters()).device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    modules = tuple(_content(vars(module), {"training"}) for module in causal.modules())
    return (*modules, autocast, forced())


def _content(value: Any, without: Iterable[str] = ()) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    if isinstance(value, dict):
        return tuple((str(key), _content(part)) for key, part in value.items() if key not in without)
    if isinstance(value, list | tuple | set):
        return tuple(_content(part) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return tuple(_content(getattr(value, field.name)) for field in fields(value))
    return value if isinstance(value, bool | int | float | str | None) else id(value)
