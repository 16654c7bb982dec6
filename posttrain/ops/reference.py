"""Every op as plain PyTorch: the definition that the kernels are held to.

Written to be read, not to be fast. All functions take any floating dtype, are differentiable by autograd, and compute
in the precision of their inputs, but at least float32.
"""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`posttrain.ops.rms_norm`."""
    total = x if residual is None else x + residual
    wide = _wide(total)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = (wide * scale * weight.to(wide.dtype)).to(x.dtype)
    return y if residual is None else (y, total)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
