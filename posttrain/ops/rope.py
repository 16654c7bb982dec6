"""Rotary position embedding of queries and keys, in the half-rotation convention.

With h = R / 2 and R the width of cos and sin, the pair (x_j, x_{j+h}) of every head turns by the angle of its token:

    y_j     = x_j     cos_j     - x_{j+h} sin_j
    y_{j+h} = x_{j+h} cos_{j+h} + x_j     sin_{j+h}         for j < h; the elements from R on stay

(Su et al., "RoFormer", 2021, with the pairs ordered as in GPT-NeoX and transformers.) The gradient is the transpose,
the rotation by the opposite angle when both halves of cos and sin are equal:

    dx_j     = dy_j     cos_j     + dy_{j+h} sin_{j+h}
    dx_{j+h} = dy_{j+h} cos_{j+h} - dy_j     sin_j

Saved for the backward: cos and sin. They get no gradient.
"""

import torch
from torch import Tensor

from posttrain import _C
from posttrain.ops import reference
from posttrain.ops.backend import backend_for
from posttrain.ops.library import define


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by the angles of their tokens: `apply_rotary_pos_emb` of transformers, in one pass.

    `cos` and `sin`, unsqueezed at `unsqueeze_dim`, broadcast against q and k, so that this is their heads' dimension:

        q [B, Hq, T, D]   cos [B or 1, T, R]   unsqueeze_dim 1
        q [B, T, Hq, D]   cos [B or 1, T, R]   unsqueeze_dim 2
        q [T, Hq, D]      cos [T, R]           unsqueeze_dim 1

    Args:
        q: floating, three or four dimensions. Any strides: nothing is copied while the last dimension is contiguous.
        k: like q, with its own number of heads.
        cos: floating, R even and at most D; the elements of each head from R on are passed through.
        sin: like cos.
        unsqueeze_dim: the heads' dimension in q and k.

    Returns:
        q and k rotated, with their shapes and memory order; computed in at least float32 and rounded once.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, with the numbers.
    """
    check_rope("rope", q, k, cos, sin, unsqueeze_dim)
    backend = backend_for("rope", q)
    if backend == "reference":
        return reference.rope(q, k, cos.detach(), sin.detach(), unsqueeze_dim)
    return _rope(q, k, cos, sin, unsqueeze_dim - q.ndim, backend)


def check_rope(op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> None:
    """Raise what `rope` raises, in the name of `op`."""
    if q.ndim not in (3, 4) or not q.is_floating_point():
        raise ValueError(f"{op}: q must be floating with 3 or 4 dimensions, got {q.dtype} {list(q.shape)}")
    if not q.ndim - 3 <= unsqueeze_dim <= q.ndim - 2:
        raise ValueError(
            f"{op}: unsqueeze_dim is the heads' dimension, {q.ndim - 3} or {q.ndim - 2} for q {list(q.shape)}; "
            f"got {unsqueeze_dim}"
        )
    heads_apart = [size for i, size in enumerate(q.shape) if i != unsqueeze_dim]
    if k.ndim != q.ndim or [size for i, size in enumerate(k.shape) if i != unsqueeze_dim] != heads_apart:
        raise ValueError(
            f"{op}: k must have the shape of q but for dimension {unsqueeze_dim}; "
            f"got {list(k.shape)} for {list(q.shape)}"
        )
    if (k.dtype, k.device) != (q.dtype, q.device):
        raise ValueError(f"{op}: q is {q.dtype} on {q.device}, k {k.dtype} on {k.device}")
    *batch, tokens, width = heads_apart
    if cos.shape != sin.shape or list(cos.shape[:-1]) not in ([*batch, tokens], [*([1] * len(batch)), tokens]):
        shape = ", ".join(map(str, [*batch, tokens, "R"]))
        raise ValueError(
            f"{op}: cos and sin must be [{shape}] for q {list(q.shape)} (the batch may be 1); "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    if cos.shape[-1] % 2 or cos.shape[-1] > width:
        raise ValueError(f"{op}: the width of cos must be even and at most {width}, got {cos.shape[-1]}")
    if not (cos.is_floating_point() and cos.device == sin.device == q.device):
        raise ValueError(
            f"{op}: cos and sin must be floating on {q.device}; "
            f"got {cos.dtype} on {cos.device} and {sin.dtype} on {sin.device}"
        )


def _forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads_dim: int, backend: str) -> tuple[Tensor, Tensor]:
    """`heads_dim` is -3 for `[..., heads, T, D]`, -2 for `[..., T, heads, D]`."""
    turned = _fake(q, k, cos, sin, heads_dim, backend)
    _turn((q, k), turned, cos, sin, heads_dim, backend, transposed=False)
    return turned


def _gradient(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, heads_dim: int, heads_inside: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """`heads_inside`: the gradients have heads inside tokens in memory, as q had, whatever came in."""
    turned = _empty(grad_q, heads_dim, heads_inside), _empty(grad_k, heads_dim, heads_inside)
    _turn((grad_q, grad_k), turned, cos, sin, heads_dim, backend, transposed=True)
    return turned


def _heads_inside(x: Tensor, heads_dim: int) -> bool:
    return bool(x.stride(heads_dim) < x.stride(-5 - heads_dim))


def _empty(x: Tensor, heads_dim: int, heads_inside: bool) -> Tensor:
    if heads_inside == (heads_dim == -2):
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(x.transpose(-3, -2), memory_format=torch.contiguous_format).transpose(-3, -2)


def _turn(
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    heads_dim: int,
    backend: str,
    transposed: bool,
) -> None:
    inputs = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in inputs)
    if backend == "triton":
        from posttrain.kernels.rope import turn

        cos, sin = (angle if angle.ndim == 3 else angle.unsqueeze(0) for angle in (cos, sin))  # [B or 1, T, R]
        sources, targets = ([_heads_outside(x, heads_dim) for x in xs] for xs in (inputs, outputs))
        turn(sources, targets, cos.contiguous(), sin.contiguous(), transposed)
        return
    _cpu_turn(inputs, outputs, cos, sin, heads_dim, transposed)


def _heads_outside(x: Tensor, heads_dim: int) -> Tensor:
    """`x` as a view `[B, heads, T, D]`."""
    x = x if heads_dim == -3 else x.transpose(-3, -2)
    return x if x.ndim == 4 else x.unsqueeze(0)


def _cpu_turn(
    inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], cos: Tensor, sin: Tensor, heads_dim: int, transposed: bool
) -> None:
    q = inputs[0]
    cos, sin = (angle.to(q.dtype).contiguous() for angle in (cos, sin))
    batch, tokens, rotated = q.shape[0] if q.ndim == 4 else 1, q.shape[-5 - heads_dim], cos.shape[-1]
    _C.rope(
        q.itemsize,
        *(
            (*_place(x, heads_dim), *_place(y, heads_dim), x.shape[heads_dim])
            for x, y in zip(inputs, outputs, strict=True)
        ),
        cos.data_ptr(),
        sin.data_ptr(),
        tokens * rotated if cos.ndim == 3 and cos.shape[0] > 1 else 0,
        batch,
        tokens,
        q.shape[-1],
        rotated,
        transposed,
    )


def _place(x: Tensor, heads_dim: int) -> tuple[int, int, int, int]:
    """Address, and elements between neighbours in the batch (if there is one), heads and tokens."""
    strides = x.stride()
    return x.data_ptr(), strides[0], strides[heads_dim], strides[-5 - heads_dim]


def _fake(q, k, cos, sin, heads_dim, backend):
    return tuple(_empty(x, heads_dim, _heads_inside(x, heads_dim)) for x in (q, k))


def _fake_gradient(grad_q, grad_k, cos, sin, heads_dim, heads_inside, backend):
    return _empty(grad_q, heads_dim, heads_inside), _empty(grad_k, heads_dim, heads_inside)


def _setup_context(ctx, inputs, output) -> None:
    q, _, cos, sin, ctx.heads_dim, ctx.backend = inputs
    ctx.heads_inside = _heads_inside(q, ctx.heads_dim)
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad_q, grad_k):
    cos, sin = ctx.saved_tensors
    grads = _rope_backward(grad_q, grad_k, cos, sin, ctx.heads_dim, ctx.heads_inside, ctx.backend)
    return *grads, None, None, None, None


_rope_backward = define(
    "rope_backward",
    "(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin, int heads_dim, bool heads_inside, str backend)"
    " -> (Tensor, Tensor)",
    _gradient,
    _fake_gradient,
)
_rope = define(
    "rope",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, int heads_dim, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _setup_context,
    _backward,
)
