"""rms_norm, forward and backward, against transformers' LlamaRMSNorm, torch.compile of it, and torch's own."""

import torch
from elementwise import compare, compiled, randn
from torch import Tensor

from posttrain import ops

ROWS, WIDTH = 4096, 1024
TARGET = 2.0


def as_transformers(x: Tensor, weight: Tensor) -> Tensor:
    """LlamaRMSNorm.forward."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


def test_rms_norm(publish) -> None:
    functions = {
        "plain PyTorch": as_transformers,
        "torch.compile": compiled(as_transformers),
        "torch rms_norm": lambda x, weight: torch.nn.functional.rms_norm(x, (WIDTH,), weight, 1e-6),
        "posttrain": ops.rms_norm,
    }
    comparison = compare(functions, [randn(ROWS, WIDTH), randn(WIDTH)], passes=5)
    publish("rms_norm", f"rms_norm [{ROWS}, {WIDTH}]", comparison, target=TARGET)
    assert comparison.speedup["posttrain"].median >= TARGET


def test_rms_norm_with_residual(publish) -> None:
    def plain(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return as_transformers(total, weight), total

    functions = {
        "plain PyTorch": plain,
        "torch.compile": compiled(plain),
        "posttrain": lambda x, weight, residual: ops.rms_norm(x, weight, 1e-6, residual),
    }
    inputs = [randn(ROWS, WIDTH), randn(WIDTH), randn(ROWS, WIDTH)]
    comparison = compare(functions, inputs, passes=8)
    publish("rms_norm_residual", f"rms_norm with residual [{ROWS}, {WIDTH}]", comparison, target=TARGET)
    assert comparison.speedup["posttrain"].median >= TARGET
