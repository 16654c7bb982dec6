"""Linear layers whose weight is kept in NF4 (posttrain/ops/nf4_weight.py describes the format).

    y = x W^T + b        dx = dy W        db = sum over rows of dy

W is frozen: it has no gradient. Up to 16 rows of x multiply the 4-bit weights directly. For more, W is dequantised slab
by slab of its rows, and each slab goes into a library GEMM: a whole W is never in memory.

Saved for the backward: nothing but W itself.
"""

from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from posttrain import _C
from posttrain.ops import reference
from posttrain.ops.backend import backend_for
from posttrain.ops.library import define
from posttrain.ops.nf4_weight import NF4Weight

MATVEC_ROWS = 16
_SLAB = {"cpu": 1 << 20, "triton": 1 << 26, "cuda": 1 << 26}  # elements that are dequantised at a time


class Parts(NamedTuple):
    """An NF4 matrix `[height, width]` as registered ops take it."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None
    height: int
    width: int
    block: int
    nested_block: int

    @staticmethod
    def of(weight: NF4Weight) -> "Parts":
        """The parts of `weight`."""
        shape, block, nested = weight.shape, weight.blocksize, weight.nested
        if nested is None:
            return Parts(weight.packed, weight.absmax, None, None, None, *shape, block, 0)
        inner = nested.absmax, nested.code, nested.offset
        return Parts(weight.packed, weight.absmax, *inner, *shape, block, nested.blocksize)


PARTS = (
    "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, SymInt height, "
    "SymInt width, SymInt block, SymInt nested_block"
)


def nf4_dequantize(weight: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix `[N, K]` in full, in `dtype`, by default that of the matrix that was quantised.

    Equal to bitsandbytes' result bit for bit: products in float32, rounded once to a half precision (float64 has
    products in float64, which bitsandbytes lacks).
    """
    _check_type("nf4_dequantize", weight)
    dtype = weight.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ValueError(f"nf4_dequantize: dtype must be floating, got {dtype}")
    backend = backend_for("nf4_dequantize", weight.packed.new_empty(0, dtype=dtype))
    if backend == "reference":
        return reference.nf4_dequantize(weight, dtype)
    return _nf4_dequantize(*Parts.of(weight), dtype, backend)


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """`x W^T + bias`.

    Args:
        x: `[..., K]`, floating.
        weight: `[N, K]`, frozen.
        bias: `[N]`, dtype of `x`, or None.

    Returns:
        `[..., N]`, in the dtype of `x`, differentiable with respect to `x` and `bias`. Up to 16 rows are computed in
        float32 (float64 for float64), and each gives the same bits alone as beside others. On tensor cores ("cuda",
        half precision) the 16 values of NF4 are rounded to 2^-17.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, with the numbers.
    """
    if has_torch_function_unary(x):  # a mode may take the rows otherwise (posttrain/rollout/row_by_row.py)
        return handle_torch_function(nf4_linear, (x,), x, weight, bias)
    _check_type("nf4_linear", weight)
    height, width = weight.shape
    if x.ndim == 0 or x.shape[-1] != width or not x.is_floating_point():
        raise ValueError(f"nf4_linear: x must be floating [..., {width}] for W {[height, width]}; got {_described(x)}")
    if x.device != weight.packed.device:
        raise ValueError(f"nf4_linear: x is on {x.device}, the weight on {weight.packed.device}")
    if bias is not None and (bias.shape != (height,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(
            f"nf4_linear: bias must be [{height}] {x.dtype} on {x.device}; got {_described(bias)} on {bias.device}"
        )
    few = x.dtype != torch.float32 and x.shape[:-1].numel() <= MATVEC_ROWS
    backend = backend_for("nf4_linear", x, "up to 16 rows of NF4" if few else "")
    if backend == "reference":
        return reference.nf4_linear(x, weight, bias)
    return _nf4_linear(x, bias, *Parts.of(weight), backend)


def _check_type(op: str, weight: NF4Weight) -> None:
    if not isinstance(weight, NF4Weight):
        raise ValueError(f"{op}: weight must be an NF4Weight, as quantize_nf4 makes it, got {type(weight).__name__}")


def slabs(weight: Parts, dtype: torch.dtype, backend: str) -> Iterator[tuple[slice, Tensor]]:
    """Runs of the rows of `weight`, dequantised one after the other into the same memory."""
    buffer = None
    for run in _runs(weight, backend):
        if buffer is None:
            buffer = weight.packed.new_empty(run.stop, weight.width, dtype=dtype)
        slab = buffer[: run.stop - run.start]
        dequantize_rows(weight, run, slab, backend)
        yield run, slab


def _runs(weight: Parts, backend: str) -> Iterator[slice]:
    rows = max(1, _SLAB[backend] // max(weight.width, 1))
    for start in range(0, weight.height, rows):
        yield slice(start, min(start + rows, weight.height))


def dequantize_rows(weight: Parts, rows: slice, out: Tensor, backend: str) -> None:
    """Write rows `rows` of the matrix to `out`, contiguous."""
    if backend != "cpu":
        _launches(backend).dequantize(weight, rows.start * weight.width, out)
        return
    wide = out if out.dtype in (torch.float32, torch.float64) else torch.empty_like(out, dtype=torch.float32)
    first, count = rows.start * weight.width, (rows.stop - rows.start) * weight.width
    _C.nf4_dequantize(wide.itemsize, addresses(weight), first, count, wide.data_ptr())
    if wide is not out:
        out.copy_(wide)


def matvec(x: Tensor, weight: Parts) -> Tensor:
    """`x W^T` for a few rows `[rows, K]`, float32 or float64."""
    x = x.contiguous()
    turned, y = torch.empty_like(x), x.new_empty(len(x), weight.height)
    address = x.data_ptr(), turned.data_ptr(), len(x), weight.width, weight.height, y.data_ptr()
    _C.nf4_matvec(x.itemsize, addresses(weight), *address)
    return y


def product(x: Tensor, weight: Parts, bias: Tensor | None, backend: str) -> Tensor:
    """`x W^T + bias` for `x` `[rows, K]`."""
    if len(x) <= MATVEC_ROWS and backend == "cpu":
        y = matvec(x.to(torch.promote_types(x.dtype, torch.float32)), weight)
        return (y if bias is None else y + bias).to(x.dtype)
    y = x.new_empty(len(x), weight.height)
    if len(x) <= MATVEC_ROWS:
        _launches(backend).matvec(x, weight, bias, y)
        return y
    with torch.autocast(x.device.type, enabled=False):
        for rows, slab in slabs(weight, x.dtype, backend):
            if bias is None:
                torch.mm(x, slab.T, out=y[:, rows])
            else:
                torch.addmm(bias[rows], x, slab.T, out=y[:, rows])
    return y


def add_product(y: Tensor, x: Tensor, weight: Parts, backend: str) -> None:
    """`y += x W^T`, in place, for `x` `[rows, K]`."""
    if len(x) <= MATVEC_ROWS:
        if backend != "cpu":
            _launches(backend).matvec(x, weight, y, y)
            return
        y += matvec(x.to(torch.promote_types(x.dtype, torch.float32)), weight)
        return
    for rows, slab in slabs(weight, x.dtype, backend):
        y[:, rows].addmm_(x, slab.T)


def transposed_product(grad_x: Tensor, grad_y: Tensor, weight: Parts, backend: str, add: bool) -> None:
    """`grad_x = grad_y W`, for `grad_y` `[rows, N]`; added to what it was if `add`."""
    for rows, slab in slabs(weight, grad_y.dtype, backend):
        grad_x.addmm_(grad_y[:, rows], slab, beta=float(add))
        add = True
    if not add:
        grad_x.zero_()


def _launches(backend: str) -> Any:
    """The module with the kernels of a GPU; that of "triton" needs Triton."""
    return import_module({"triton": "posttrain.kernels.nf4", "cuda": "posttrain.ops.nf4_cuda"}[backend])


def addresses(weight: Parts) -> tuple[int, ...]:
    """A matrix as C++ and CUDA kernels take it."""
    tensors = (0 if x is None else x.data_ptr() for x in weight[:5])
    return *tensors, weight.block, weight.nested_block


def _dequantize(*arguments) -> Tensor:
    *parts, dtype, backend = arguments
    weight = contiguous(Parts(*parts))
    out = weight.packed.new_empty(weight.height, weight.width, dtype=dtype)
    for rows in _runs(weight, backend):  # half precision passes through float32
        dequantize_rows(weight, rows, out[rows], backend)
    return out


def _fake_dequantize(*arguments):
    *parts, dtype, _ = arguments
    weight = Parts(*parts)
    return weight.packed.new_empty(weight.height, weight.width, dtype=dtype)


def _forward(x: Tensor, bias: Tensor | None, *arguments) -> Tensor:
    *parts, backend = arguments
    weight = contiguous(Parts(*parts))
    rows = x.reshape(x.shape[:-1].numel(), weight.width)
    return product(rows, weight, bias, backend).view(*x.shape[:-1], weight.height)


def _fake(x, bias, *arguments):
    *parts, _ = arguments
    return x.new_empty(*x.shape[:-1], Parts(*parts).height)


def _setup_context(ctx, inputs, output) -> None:
    _, _, *parts, ctx.backend = inputs
    ctx.numbers = parts[5:]
    ctx.save_for_backward(*parts[:5])


def _backward(ctx, grad_y):
    needs_x, needs_bias = ctx.needs_input_grad[:2]
    weight = (*ctx.saved_tensors, *ctx.numbers)
    grad_x = _nf4_linear_backward(grad_y, *weight, ctx.backend) if needs_x else None
    grad_bias = grad_y.sum_to_size(grad_y.shape[-1]) if needs_bias else None
    return grad_x, grad_bias, *[None] * (len(weight) + 1)


def _gradient(grad_y: Tensor, *arguments) -> Tensor:
    *parts, backend = arguments
    weight = contiguous(Parts(*parts))
    rows = grad_y.reshape(grad_y.shape[:-1].numel(), weight.height)
    grad_x = rows.new_empty(len(rows), weight.width)
    with torch.autocast(grad_y.device.type, enabled=False):
        transposed_product(grad_x, rows, weight, backend, add=False)
    return grad_x.view(*grad_y.shape[:-1], weight.width)


def _fake_gradient(grad_y, *arguments):
    *parts, _ = arguments
    return grad_y.new_empty(*grad_y.shape[:-1], Parts(*parts).width)


def contiguous(weight: Parts) -> Parts:
    """The same with each tensor in one piece, as the kernels read it."""
    tensors: dict[str, Any] = {name: x.contiguous() for name, x in weight._asdict().items() if isinstance(x, Tensor)}
    return weight._replace(**tensors)


def _described(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)}"


_nf4_dequantize = define(
    "nf4_dequantize",
    f"({PARTS}, ScalarType dtype, str backend) -> Tensor",
    _dequantize,
    _fake_dequantize,
)
_nf4_linear_backward = define(
    "nf4_linear_backward",
    f"(Tensor grad_y, {PARTS}, str backend) -> Tensor",
    _gradient,
    _fake_gradient,
)
_nf4_linear = define(
    "nf4_linear",
    f"(Tensor x, Tensor? bias, {PARTS}, str backend) -> Tensor",
    _forward,
    _fake,
    _setup_context,
    _backward,
)
