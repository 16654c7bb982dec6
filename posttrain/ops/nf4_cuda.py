"""Launches of csrc/cuda/nf4.cu and nf4_matvec.cu: NF4 matrices on a GPU, dequantised, or multiplied with up to 16 rows,
to which a LoRA adapter's part is added in the same launch.

The blocks of that launch count how many have started and how many are done, in counters that begin and end at 0. They
belong to a stream, whose launches follow each other. A captured graph may be replayed on any stream, so it has counters
of its own, which it sets to 0 itself.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.ops.backend import CUDA_DTYPES, cuda_device, cuda_kernels, cuda_stream
from posttrain.ops.nf4 import Parts, addresses

SPAN = 64  # elements of a row that a warp multiplies at a time on tensor cores


class Adapter(NamedTuple):
    """`scale (x A^T) B^T` for A `[R, K]` and B `[N, R]`."""

    a: Tensor
    b: Tensor
    scale: float


def dequantize(weight: Parts, first: int, out: Tensor) -> None:
    """Write the elements of the matrix from `first` on to `out`, contiguous, in its dtype."""
    with cuda_device(out):
        cuda_kernels(out).cuda_nf4_dequantize(
            cuda_stream(out), addresses(weight), first, out.numel(), CUDA_DTYPES[out.dtype], out.data_ptr()
        )


def matvec(x: Tensor, weight: Parts, base: Tensor | None, y: Tensor, adapter: Adapter | None = None) -> None:
    """`y = base + x W^T + scale (x A^T) B^T`, summed in float32.

    For x `[rows, K]` of up to 16 rows, base `[rows, N]`, `[N]` or None, and y `[rows, N]`, which may be base.
    """
    x = aligned(x)
    base = base if base is None or base.stride(-1) == 1 else base.contiguous()
    spans = x.dtype != torch.float32 and x.shape[1] % SPAN == 0
    spans &= weight.block % SPAN == 0 and weight.packed.data_ptr() % 8 == 0
    a = b = u = counters = None
    if adapter is not None and adapter.a.numel():
        a, b = factors(x.dtype if spans else torch.float32, adapter.a, adapter.b)
        u, counters = x.new_empty(len(x), len(a), dtype=torch.float32), _counters(x)
    with cuda_device(x):
        cuda_kernels(x).cuda_nf4_matvec(
            cuda_stream(x), addresses(weight), x.data_ptr(), CUDA_DTYPES[x.dtype], *x.shape, weight.height,
            _address(base), 0 if base is None or base.ndim == 1 else base.stride(0), y.data_ptr(), y.stride(0),
            _address(a), _address(b), 0 if a is None else CUDA_DTYPES[a.dtype], 0 if a is None else len(a),
            1.0 if adapter is None else adapter.scale, _address(u), _address(counters), spans,
        )  # fmt: skip


def factors(dtype: torch.dtype, *matrices: Tensor) -> list[Tensor]:
    """The matrices of an adapter as kernels take them: in `dtype` if all have it, else in float32."""
    dtype = dtype if all(x.dtype == dtype for x in matrices) else torch.float32
    return [aligned(x.to(dtype)) for x in matrices]


def aligned(x: Tensor) -> Tensor:
    """`x` contiguous, from a multiple of 16 bytes on."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _counters(x: Tensor) -> Tensor:
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return x.new_zeros(3, dtype=torch.int32)
    return _counters_of_stream(x.device, cuda_stream(x))


@cache
def _counters_of_stream(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(3, dtype=torch.int32, device=device)
