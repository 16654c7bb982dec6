"""Operands of the LoRA ops."""

import torch
from torch import Tensor


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
