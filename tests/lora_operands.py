"""Operands of the LoRA ops."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

SCALING = (0.5, 1.0, 2.0)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def operands(rows: int, k: int, n: int, rank: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weight, A, B, bias, so small that gradients over many rows are still near 1."""
    shapes = [(rows, k), (n, k), (rank, k), (n, rank), (n,)]
    return [randn(*shape, seed=i, dtype=dtype) / 8 for i, shape in enumerate(shapes)]


def several(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """x, weight, three adapters, bias; and the adapter of each row."""
    x, weight, _, _, bias = operands(40, 30, 20, 4, dtype)
    a, b = randn(3, 4, 30, seed=5, dtype=dtype), randn(3, 20, 4, seed=6, dtype=dtype)
    return [x, weight, a, b, bias], torch.arange(40).remainder(4) - 1


def of(op: Callable[..., Tensor], scaling: float | Sequence[float] = 0.75, **options) -> Callable[..., Tensor]:
    """`op` as a function of the five operands."""
    return lambda x, weight, a, b, bias: op(x, weight, a, b, scaling, bias, **options)


def plain(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """What PEFT computes."""
    return functional.linear(x, weight, bias) + functional.linear(functional.linear(x, a), b) * 0.75


def rows_of_adapters(
    random: Callable[..., Tensor], rows: int, k: int, n: int, rank: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    """x, weight, A and B of three adapters, bias; and the adapter of each row, in no order."""
    shapes = [(rows, k), (n, k), (3, rank, k), (3, n, rank), (n,)]
    tensors = [random(*shape, dtype=dtype) for shape in shapes]
    adapter = (torch.arange(rows, device=tensors[0].device) * 7).remainder(4) - 1
    adapter[rows // 2 : rows // 2 + 20] = 1  # more rows of an adapter than one product takes
    return tensors, adapter
