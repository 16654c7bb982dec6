"""Linear layers of a model's own modules, each row by itself.

While the mode is active, `torch.nn.functional.linear` in float32 or float64 on a CPU is the kernel of
csrc/cpu/linear.cpp, which gives a row the same bits in any batch. `nf4_linear` on a CPU takes the rows in groups of
up to 16, in which each has the bits that it has alone. The rest of a model is PyTorch's, and docs/rollout.md says what
of it depends on the batch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from posttrain import _C
from posttrain.ops import nf4_linear
from posttrain.ops.nf4 import MATVEC_ROWS
from posttrain.ops.nf4_weight import NF4Weight


class RowByRow(TorchFunctionMode):
    """Use as a context, without gradients."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nf4_linear:
            return _nf4_linear(*args, **kwargs)
        return (_linear if func is F.linear and _fits(*args, **kwargs) else func)(*args, **kwargs)


def _fits(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    wide = input.is_cpu and input.dtype in (torch.float32, torch.float64)
    same = all(tensor.dtype == input.dtype for tensor in (weight, bias) if tensor is not None)
    return wide and same and weight.ndim == 2


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, weight = input.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(*x.shape[:-1], len(weight))
    rows, width = x.numel() // max(x.shape[-1], 1), x.shape[-1]
    address = 0 if bias is None else bias.data_ptr()
    _C.linear(x.itemsize, x.data_ptr(), rows, width, weight.data_ptr(), address, y.data_ptr(), len(weight))
    return y


def _nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if not x.is_cpu or len(rows) <= MATVEC_ROWS:
        return nf4_linear(x, weight, bias)
    groups = [nf4_linear(group, weight, bias) for group in rows.split(MATVEC_ROWS)]
    return torch.cat(groups).view(*x.shape[:-1], -1)
