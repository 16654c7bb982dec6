"""Causal attention over packed sequences, prompts with shared prefixes, and trees.

With the mask of `PackedLayout` (query q sees key k where k <= q < visible_until[k]; with a window, also
position[q] - position[k] < window):

    s_qk = c(scale q.k),   c(x) = x or softcap tanh(x / softcap)
    o_q  = sum over visible k of p_qk v_k,   p_qk = e^(s_qk - lse_q),   lse_q = log(e^sink + sum over visible k e^s_qk)

(Vaswani et al., "Attention Is All You Need", 2017; the cap is Gemma 2's; a sink, one learned logit for each head that
takes attention without giving a value, is from Xiao et al., "Efficient Streaming Language Models with Attention
Sinks", 2023.) The gradient, with delta_q = do_q . o_q:

    dv_k = sum_q p_qk do_q
    ds_qk = p_qk (do_q . v_k - delta_q) c'(scale q.k)
    dq_q = scale sum_k ds_qk k_k        dk_k = scale sum_q ds_qk q_q        dsink = - sum_q e^(sink - lse_q) delta_q

Saved for the backward: q, k, v, o and lse; the scores are computed again. A key's gradient gathers from the queries
k <= q < visible_until[k] in a fixed order: no copies of k and v for each branch, no atomics, the same bits every time.
"""

import torch
from torch import Tensor

from posttrain import _C
from posttrain.ops import packed_flash, reference
from posttrain.ops.attention_options import ScoreOptions, score_options
from posttrain.ops.backend import backend_for
from posttrain.ops.layout import PackedLayout
from posttrain.ops.library import define


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention in which a token sees itself, its segment before it, and the segments that one continues.

    Args:
        q: `[T, Hq, D]`, floating.
        k: `[T, Hkv, D]`; Hq is a multiple of Hkv, and query head h reads key head h // (Hq / Hkv).
        v: `[T, Hkv, Dv]`.
        layout: who sees whom among the T tokens.
        scale: of the scores; 1 / sqrt(D) by default.
        window: how many positions back a token sees, itself included; None for all.
        softcap: bound of the scores; None for none.
        sinks: `[Hq]`, floating; None for none.

    Returns:
        `[T, Hq, Dv]`, in the dtype of `q`. Statistics are in float32 (float64 for float64); the backend "cpu" computes
        half precision through float32 copies. With "cpu", a token's output depends, bit for bit, only on what its tree
        holds. With "triton", whose blocks of keys are aligned to the pack, this is so as long as the other trees keep
        their lengths.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, with the numbers; with the backend "flash-attn" also what
            `packed_flash` names.
    """
    _check(q, k, v, layout)
    options = score_options("packed_attention", q, scale, window, softcap, sinks)
    backend = backend_for("packed_attention", q)
    optional = options.scale, options.window or None, options.softcap or None
    if backend == "reference":
        scale, window, softcap = optional
        return reference.packed_attention(q, k, v, layout, scale=scale, window=window, softcap=softcap, sinks=sinks)
    if backend == "flash-attn":
        return packed_flash.packed_flash(q, k, v, layout, *optional, sinks)
    mask = layout.visible_until, layout.positions, layout.schedule if backend == "triton" else None
    return _packed_attention(q, k, v, *mask, sinks, *options, backend)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 3 or k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(f"packed_attention: needs q [T, Hq, D], k [T, Hkv, D] and v [T, Hkv, Dv]; got {shapes}")
    if 0 in q.shape[1:] or 0 in v.shape[1:]:
        raise ValueError(f"packed_attention: needs heads, D and Dv of at least 1; got {shapes}")
    if not len(q) == len(k) == layout.num_tokens:
        raise ValueError(f"packed_attention: the layout has {layout.num_tokens} tokens; got {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"packed_attention: {q.shape[1]} query heads don't divide into {k.shape[1]} key heads")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"packed_attention: q, k and v must share a floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device == layout.visible_until.device:
        raise ValueError(
            f"packed_attention: q is on {q.device}, k on {k.device}, v on {v.device}, "
            f"the layout on {layout.visible_until.device}"
        )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_until: Tensor,
    positions: Tensor,
    schedule: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(o, lse); window and softcap are 0 for none, the schedule only Triton's.

    So that probabilities keep their digits in the backward however large the scores are, the CPU's lse is float64,
    `[Hq, T]`, and Triton's is `[Hq, 2, T]`: two float32 that add up to it.
    """
    if backend == "triton":
        from posttrain.kernels.packed_attention import packed_attention_forward

        return packed_attention_forward(q, k, v, visible_until, positions, schedule, sinks, scale, window, softcap)
    return _cpu_forward(q, k, v, visible_until, positions, sinks, ScoreOptions(scale, window, softcap))


def _fake(q, k, v, visible_until, positions, schedule, sinks, scale, window, softcap, backend):
    if backend == "triton":
        lse = q.new_empty(q.shape[1], 2, len(q), dtype=torch.float32)
    else:
        lse = q.new_empty(q.shape[1], len(q), dtype=torch.float64)
    return q.new_empty(len(q), q.shape[1], v.shape[2]), lse


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, visible_until, positions, schedule, sinks, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, visible_until, positions, schedule, sinks, *output)


def _backward(ctx, grad_out, grad_lse):
    if grad_out is None:
        return (None,) * 11
    *tensors, sinks, out, lse = ctx.saved_tensors
    *grads, delta = _packed_attention_backward(grad_out, *tensors, out, lse, *ctx.options)
    grad_sinks = None
    if sinks is not None and ctx.needs_input_grad[6]:
        whole = lse.double().sum(1) if lse.ndim == 3 else lse
        grad_sinks = packed_flash.sinks_gradient(sinks, whole, delta)
    return *grads, None, None, None, grad_sinks, None, None, None, None


def _gradient(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_until: Tensor,
    positions: Tensor,
    schedule: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, and delta `[Hq, T]`."""
    if backend == "triton":
        from posttrain.kernels.packed_attention import packed_attention_backward

        return packed_attention_backward(
            grad_out, q, k, v, visible_until, positions, schedule, out, lse, scale, window, softcap
        )
    options = ScoreOptions(scale, window, softcap)
    return _cpu_backward(grad_out, q, k, v, visible_until, positions, out, lse, options)


def _fake_gradient(grad_out, q, k, v, visible_until, positions, schedule, out, lse, scale, window, softcap, backend):
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(q.shape[1], len(q), dtype=_wide(q.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.promote_types(dtype, torch.float32)


def _cpu_forward(q, k, v, visible_until, positions, sinks, options):
    dtype = _wide(q.dtype)
    lse = q.new_empty(q.shape[1], len(q), dtype=torch.float64)
    out = q.new_empty(len(q), q.shape[1], v.shape[2], dtype=dtype)
    views = [_readable(x, dtype) for x in (q, k, v)]
    mask = [x.contiguous() for x in (visible_until, positions)]
    sinks = None if sinks is None else sinks.to(dtype).contiguous()
    workspace = _workspace(out, q.shape[2], v.shape[2], backward=False)
    _C.attention_forward(
        out.itemsize,
        *map(_view, views),
        *(x.data_ptr() for x in mask),
        0 if sinks is None else sinks.data_ptr(),
        len(q),
        _shape(q, k, v),
        (options.scale, options.softcap, options.window),
        out.data_ptr(),
        lse.data_ptr(),
        workspace.data_ptr(),
        len(workspace),
    )
    return out.to(q.dtype), lse


def _cpu_backward(grad_out, q, k, v, visible_until, positions, out, lse, options):
    dtype = _wide(q.dtype)
    views = [_readable(x, dtype) for x in (q, k, v, grad_out)]
    mask = [x.contiguous() for x in (visible_until, positions)]
    out = out.to(dtype).contiguous()
    grad_q, grad_k, grad_v = (x.new_zeros(x.shape, dtype=dtype) for x in (q, k, v))
    delta = lse.new_empty(lse.shape, dtype=dtype)
    workspace = _workspace(out, q.shape[2], v.shape[2], backward=True)
    _C.attention_backward(
        out.itemsize,
        *map(_view, views[:3]),
        *(x.data_ptr() for x in mask),
        len(q),
        _shape(q, k, v),
        (options.scale, options.softcap, options.window),
        out.data_ptr(),
        lse.data_ptr(),
        _view(views[3]),
        *(x.data_ptr() for x in (grad_q, grad_k, grad_v, delta, workspace)),
        len(workspace),
    )
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), delta


def _readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, with its last dimension contiguous."""
    x = x.to(dtype)
    return x if x.stride(2) == 1 else x.contiguous()


def _view(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _shape(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    return q.shape[1], k.shape[1], q.shape[2], v.shape[2]


def _workspace(like: Tensor, width: int, value_width: int, backward: bool) -> Tensor:
    """A row for each thread."""
    return like.new_empty(torch.get_num_threads(), _C.attention_workspace(like.itemsize, width, value_width, backward))


_packed_attention_backward = define(
    "packed_attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor visible_until, Tensor positions, Tensor? schedule, "
    "Tensor out, Tensor lse, float scale, int window, float softcap, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _gradient,
    _fake_gradient,
)
_packed_attention = define(
    "packed_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor visible_until, Tensor positions, Tensor? schedule, Tensor? sinks, "
    "float scale, int window, float softcap, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _setup_context,
    _backward,
)
