"""Root-mean-square normalisation, with an optional residual add in the same pass.

With s = x + residual (or x), r = 1 / sqrt(mean(s^2) + eps) over the last dimension:

    y_j = s_j r w_j

(Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019). The gradient, with h_j = dy_j w_j:

    ds_j = r h_j - s_j r^3 mean(h s)    + what comes in through s
    dw_j = sum over rows of dy_j s_j r

Saved for the backward: s and the r of every row.
"""

import torch
from torch import Tensor

from posttrain import _C
from posttrain.ops import reference
from posttrain.ops.backend import CUDA_DTYPES, backend_for, cuda_device, cuda_kernels, cuda_stream
from posttrain.ops.library import define


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the last dimension of `x` by its root mean square and scale it by `weight`.

    Args:
        x: `[..., H]`, floating.
        weight: `[H]`; its dtype may be wider than that of `x`.
        eps: added to the mean of squares.
        residual: shape, dtype and device of `x`; added to `x` first.

    Returns:
        `y`, like `x`; with `residual`, `(y, x + residual)`. Statistics are in float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, with the numbers.
    """
    _check(x, weight, residual)
    backend = backend_for("rms_norm", x)
    if backend == "reference":
        return reference.rms_norm(x, weight, eps, residual)
    y, total, _ = _rms_norm(x, weight, eps, residual, backend)
    return y if residual is None else (y, total)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must be [H] for x [..., H]; got {list(weight.shape)} for {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"rms_norm: x must be floating, got {x.dtype}")
    if weight.device != x.device:
        raise ValueError(f"rms_norm: x is on {x.device}, weight on {weight.device}")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (
        x.shape,
        x.dtype,
        x.device,
    ):
        raise ValueError(
            f"rms_norm: residual must be like x {list(x.shape)} {x.dtype} on {x.device}; "
            f"got {list(residual.shape)} {residual.dtype} on {residual.device}"
        )


def _forward(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, s, r); s is empty without a residual, since the backward then reads x."""
    if backend == "triton":
        from posttrain.kernels.rms_norm import rms_norm_forward

        return rms_norm_forward(x, weight, eps, residual)
    on_cpu = backend == "cpu"
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    weight = weight.to(x.dtype if on_cpu or weight.dtype == x.dtype else torch.float32).contiguous()
    y, total = torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=x.dtype if on_cpu else torch.float32)
    arguments = (
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        total.data_ptr(),
        rstd.data_ptr(),
        rstd.numel(),
        x.shape[-1],
        eps,
    )
    if on_cpu:
        _C.rms_norm_forward(x.itemsize, *arguments)
        return y, total, rstd
    with cuda_device(x):
        tags = (cuda_stream(x), CUDA_DTYPES[x.dtype], weight.dtype == torch.float32)
        cuda_kernels(x).cuda_rms_norm(*tags, *arguments)
    return y, total, rstd


def _fake(x, weight, eps, residual, backend):
    total = x.new_empty(0) if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        total,
        x.new_empty(x.shape[:-1], dtype=wide),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, residual, ctx.backend = inputs
    _, total, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x if residual is None else total, weight, rstd)


def _backward(ctx, grad_y, grad_total, grad_rstd):
    total, weight, rstd = ctx.saved_tensors
    if grad_y is None:
        return grad_total, None, None, grad_total if ctx.has_residual else None, None
    grad_total = grad_total if ctx.has_residual else None
    grad_x, grad_weight = _rms_norm_backward(grad_y, grad_total, total, weight, rstd, ctx.backend)
    return grad_x, grad_weight, None, grad_x if ctx.has_residual else None, None


def _gradient(
    grad_y: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    if backend in ("triton", "cuda"):
        from posttrain.kernels.rms_norm import rms_norm_backward

        return rms_norm_backward(grad_y, grad_total, total, weight, rstd)
    return _cpu_backward(grad_y, grad_total, total, weight, rstd)


def _fake_gradient(grad_y, grad_total, total, weight, rstd, backend):
    return torch.empty_like(total, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _cpu_backward(grad_y, grad_total, total, weight, rstd):
    grad_y, total = grad_y.contiguous(), total.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    wide_weight = weight.to(total.dtype).contiguous()
    rows, width = rstd.numel(), total.shape[-1]
    grad_x, grad_weight = torch.empty_like(total), total.new_empty(width)
    partial = total.new_empty(_C.rms_norm_blocks(rows), width)
    exact = torch.empty_like(partial, dtype=torch.float64)
    _C.rms_norm_backward(
        total.itemsize,
        grad_y.data_ptr(),
        0 if grad_total is None else grad_total.data_ptr(),
        total.data_ptr(),
        wide_weight.data_ptr(),
        rstd.data_ptr(),
        grad_x.data_ptr(),
        grad_weight.data_ptr(),
        partial.data_ptr(),
        exact.data_ptr(),
        rows,
        width,
    )
    return grad_x, grad_weight.to(weight.dtype)


_rms_norm_backward = define(
    "rms_norm_backward",
    "(Tensor grad_y, Tensor? grad_total, Tensor total, Tensor weight, Tensor rstd, str backend) -> (Tensor, Tensor)",
    _gradient,
    _fake_gradient,
)
_rms_norm = define(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps, Tensor? residual, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _setup_context,
    _backward,
)
