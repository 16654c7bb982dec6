"""Steps of generation for the tests of paged_attention: random caches, and what is true of them."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from posttrain.ops import paged_attention, reference, write_cache
from posttrain.ops.layout import PackedLayout


@dataclass
class Step:
    """The arguments of one step, and the keys and values of each sequence."""

    q: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    context_lens: Tensor
    query_lens: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    def run(self, function=paged_attention, **options) -> Tensor:
        tensors = self.q, self.key_cache, self.value_cache
        return function(*tensors, self.block_table, self.context_lens, self.query_lens, **options)

    def to(self, dtype: torch.dtype) -> "Step":
        return replace(self, **{name: getattr(self, name).to(dtype) for name in ("q", "key_cache", "value_cache")})

    def on(self, device: str) -> "Step":
        """Its arguments on `device`; what is true of it stays on the CPU."""
        moved = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def decoding(self) -> "Step":
        """The same without query_lens, which are all 1."""
        return replace(self, query_lens=None)

    def part(self, sequence: int, end: int, queries: int) -> "Step":
        """A sequence alone, with the last `queries` of its first `end` tokens."""
        first = int(self.query_lens[:sequence].sum()) + end - int(self.context_lens[sequence])
        last = first + int(self.query_lens[sequence])
        return replace(
            self,
            q=self.q[last - queries : last],
            block_table=self.block_table[sequence : sequence + 1],
            context_lens=torch.tensor([end], dtype=torch.int32),
            query_lens=torch.tensor([queries], dtype=torch.int32),
        )

    def truth(self, **options) -> Tensor:
        """In float64, without pages: the last queries of a packed sequence."""
        options = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
        parts = [self.q[:0].double()]
        for q, k, v in zip(self.q.double().split(self.query_lens.tolist()), self.keys, self.values, strict=True):
            whole = torch.cat([q.new_zeros(len(k) - len(q), *q.shape[1:]), q])
            layout = PackedLayout.from_lengths([len(k)])
            out = reference.packed_attention(whole, k.double(), v.double(), layout, **options)
            parts.append(out[len(k) - len(q) :])
        return torch.cat(parts)


def make(
    contexts: list[int],
    queries: list[int],
    heads: tuple[int, int] = (4, 2),
    width: int = 16,
    page_size: int = 16,
    shared: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Step:
    """Sequences in pages in any order, NaN where nothing was written, and page numbers that aren't there.

    The first `shared` whole pages are those of the first sequence, for all that are long enough.
    """
    generator = torch.Generator().manual_seed(seed)
    randn = partial(torch.randn, generator=generator)
    needed = [-(-context // page_size) for context in contexts]
    order = torch.randperm(sum(needed) + 2, generator=generator).int()
    table = torch.full((len(contexts), max(needed, default=0) + 1), 2**30, dtype=torch.int32)
    key_cache, value_cache = (torch.full((len(order), page_size, heads[1], width), torch.nan) for _ in range(2))
    keys, values = [], []
    for s, (context, pages) in enumerate(zip(contexts, order.split([*needed, 2]), strict=False)):
        table[s, : needed[s]] = pages
        k, v = (randn(context, heads[1], width).to(dtype).float() for _ in range(2))
        common = min(shared, context // page_size, contexts[0] // page_size)
        if s and common:
            table[s, :common] = table[0, :common]
            k[: common * page_size], v[: common * page_size] = (x[0][: common * page_size] for x in (keys, values))
        position = torch.arange(context)
        slots = table[s].long()[position // page_size] * page_size + position % page_size
        write_cache(k, v, key_cache, value_cache, slots)
        keys.append(k)
        values.append(v)
    lens = (torch.tensor(x, dtype=torch.int32) for x in (contexts, queries))
    q = randn(sum(queries), heads[0], width).to(dtype).float()
    return Step(q, key_cache, value_cache, table, *lens, keys, values).to(dtype)


def plain(step: Step, softcap: float) -> Tensor:
    """PyTorch's way in the dtype of its inputs."""
    parts = []
    for q, k, v in zip(step.q.split(step.query_lens.tolist()), step.keys, step.values, strict=True):
        k, v = (x.to(q.dtype).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = softcap * torch.tanh(torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5 / softcap)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(len(k) - len(q) + 1)
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(parts)
