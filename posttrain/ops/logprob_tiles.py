"""The tiles of logits that library GEMMs make for linear_logprob: blocks of targets by slabs of the vocabulary.

Everything is computed in float32 (float64 for float64); half-precision weights are widened slab by slab. The CUDA
kernels' GEMMs take bfloat16 as it is and give float32: logits come out the same, but what multiplies bfloat16 in a
second GEMM (x A^T, e^(z-m), the gradient of the logits) is rounded once, by the kernel that makes it, in the tile's own
memory. float16 can't hold e^(z-m), which may reach e^16, so it is widened there too.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain import _C
from posttrain.ops.backend import CUDA_DTYPES, cuda_device, cuda_kernels, cuda_stream
from posttrain.ops.logprob_problem import Problem

ROWS, COLUMNS = 4096, 2048  # no more columns than kLogprobColumns of csrc/cuda/kernels.h


class Slab(NamedTuple):
    """A run of the vocabulary."""

    columns: slice
    weight: Tensor  # [c, H], a factor of GEMMs
    lora_b: Tensor | None  # [c, R], a factor of GEMMs
    bias: Tensor | None  # [c] wide


class Tiles:
    """The tiles of m <= M targets, those that are `wanted`, bool `[M]`.

    Attributes:
        p: the problem.
        backend: "cpu" or "cuda", whose kernels work on the tiles.
        factor: the dtype of what GEMMs multiply.
        kept: indices of the targets among the M, None for all.
        rows: the row of hidden that predicts each, None for 0, 1, 2, ...
        y: the targets `[m]`.
        x: what predicts them `[m, H]`, a factor.
        lora_x: scaling * x A^T `[m, R]`, a factor, or None.
    """

    def __init__(self, p: Problem, backend: str, wanted: Tensor) -> None:
        self.p, self.backend = p, backend
        self.factor = p.hidden.dtype if backend == "cuda" and p.hidden.dtype == torch.bfloat16 else p.wide
        self.kept = None if bool(wanted.all()) else wanted.nonzero().squeeze(-1)
        self.rows, self.y = p.rows, p.targets
        if self.kept is not None:
            self.rows, self.y = self.kept if p.rows is None else p.rows[self.kept], p.targets[self.kept]
        self.x = (p.hidden if self.rows is None else p.hidden[self.rows]).to(self.factor)
        self.lora_x = None
        if p.lora_a is not None:
            self.lora_x = product(self.x, p.lora_a.to(self.factor).T).mul_(p.lora_scaling).to(self.factor)
        columns = min(COLUMNS, len(p.weight))
        self._height = max(1, min(ROWS, p.memory_budget // (columns * p.wide.itemsize)))
        self._room = self.x.new_empty(min(self._height, len(self.y)) * columns, dtype=p.wide)

    def slabs(self) -> Iterator[Slab]:
        """Runs of COLUMNS of the vocabulary."""
        p = self.p
        for start in range(0, len(p.weight), COLUMNS):
            columns = slice(start, min(start + COLUMNS, len(p.weight)))
            bias = None if p.bias is None else p.bias[columns].to(p.wide)
            lora_b = None if p.lora_b is None else p.lora_b[columns].to(self.factor)
            yield Slab(columns, p.weight[columns].to(self.factor), lora_b, bias)

    def blocks(self) -> Iterator[slice]:
        """Runs of ROWS targets, or of fewer where the memory budget is small."""
        for start in range(0, len(self.y), self._height):
            yield slice(start, min(start + self._height, len(self.y)))

    def room(self, block: slice, slab: Slab) -> Tensor:
        """A tile `[rows of block, columns of slab]`, contiguous, wide; all lie in the same memory."""
        shape = (block.stop - block.start, slab.columns.stop - slab.columns.start)
        return self._room[: shape[0] * shape[1]].view(shape)

    def fill(self, tile: Tensor, block: slice, slab: Slab) -> None:
        """Raw logits without bias into a tile."""
        add_product(tile, self.x[block], slab.weight.T, beta=0)
        if slab.lora_b is not None and self.lora_x is not None:
            add_product(tile, self.lora_x[block], slab.lora_b.T)

    def as_factor(self, tile: Tensor) -> Tensor:
        """What a kernel left in a tile, in the first part of each row if it takes less room than the logits did."""
        return tile.view(self.factor)[:, : tile.shape[1]]

    def kernel(self, name: str) -> Callable[..., None]:
        """The C++ kernel, or the CUDA kernel on the current stream, which writes what the next GEMM multiplies."""
        p = self.p
        if self.backend == "cpu":
            return partial(getattr(_C, name), p.wide.itemsize)
        kernel = getattr(cuda_kernels(p.hidden), f"cuda_{name}")

        def launch(*arguments: float) -> None:
            with cuda_device(p.hidden):
                kernel(cuda_stream(p.hidden), CUDA_DTYPES[self.factor], *arguments)

        return launch

    def transform(self) -> tuple[float, float, float]:
        """How kernels make logits of raw ones: logit scale, softcap (0 for none), 1 / temperature."""
        return self.p.logit_scale, self.p.softcap or 0.0, 1.0 / self.p.temperature

    def pick(self, x: Tensor) -> Tensor:
        """Of values for all M targets `[M]` those of the m, wide."""
        return (x if self.kept is None else x[self.kept]).to(self.p.wide).contiguous()

    def spread(self, x: Tensor | None) -> Tensor:
        """Values of the m `[m, ...]` back to all M, zero where a target is skipped; empty for None."""
        if x is None:
            return self.x.new_empty(0, dtype=self.p.wide)
        if self.kept is None:
            return x
        return x.new_zeros(len(self.p.targets), *x.shape[1:]).index_copy_(0, self.kept, x)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 or wider; `a` is rounded to the dtype of `b`."""
    total = b.new_empty(len(a), b.shape[1], dtype=torch.promote_types(b.dtype, torch.float32))
    return add_product(total, a, b, beta=0)


def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> Tensor:
    """total = beta total + a b, with `a` rounded to the dtype of `b`; a GPU multiplies half and sums in float32."""
    a = a.to(b.dtype)
    if b.dtype == total.dtype or not total.is_cuda:
        return total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)
    return torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)


def address(x: Tensor | None) -> int:
    """Where its data begin, as kernels take it; 0 for none."""
    return 0 if x is None else x.data_ptr()
