"""packed_attention through flash-attn, for ordinary packing and for prompts that completions share.

flash-attn knows sequences that attend to themselves or to another sequence, no trees. So a layout becomes at most two
calls on the same q, k and v (`PackedLayout.varlen`): every segment over itself, causally, and the completions of each
prompt, as one sequence, over all of the prompt. With o_i and lse_i from call i (lse_i = -inf where a query has no key
in it), the softmax over all keys, and over a sink if there is one, is

    lse = log(e^sink + sum_i e^lse_i),    o = sum_i e^(lse_i - lse) o_i

The gradient needs no gradient of that merge. With p_qk = e^(s_qk - lse_q) and delta_q = do_q . o_q of the *merged* lse
and o, every key's share of dq, dk and dv is what it is in packed_attention, and flash-attn's backward computes p and
delta from the o and lse it is given. So each call's backward gets the merged ones, and the gradients add up.

`_flash_attn_varlen_forward` and `_flash_attn_varlen_backward`, in this form since flash-attn 2.7, are used instead of
the public function, whose gradient belongs to its own o and lse.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from posttrain.ops.layout import PackedLayout
from posttrain.ops.library import define

LARGEST_WIDTH = 256


def packed_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`posttrain.ops.packed_attention` on tensors it has checked.

    Raises:
        ValueError: heads wider than 256, a segment that continues one that continues another, or a window that is
            narrower than a prompt and its completions or meets positions that skip within a segment.
    """
    widest = max(q.shape[2], v.shape[2])
    if widest > LARGEST_WIDTH:
        raise ValueError(f"packed_attention: flash-attn takes heads up to {LARGEST_WIDTH} wide, got {widest}")
    segments, prompts, longest, tree = layout.varlen
    if window is not None and window < tree:
        raise ValueError(
            f"packed_attention: with flash-attn a window of {window} can't cut a shared prompt and its completions of "
            f"up to {tree} tokens"
        )
    if window is not None and not layout.consecutive:
        raise ValueError(
            f"packed_attention: with flash-attn a window of {window} counts tokens, "
            "and this layout's positions don't go up by one within its segments"
        )
    width = widest + -widest % 8  # zeros beyond it change neither scores nor the values kept
    padded = (x if x.shape[2] == width else pad(x, (0, width - x.shape[2])) for x in (q, k, v))
    options = (list(longest), scale, window or 0, softcap or 0.0)
    return _packed_flash(*padded, sinks, segments, prompts, *options)[0][..., : v.shape[2]]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    segments: Tensor,
    prompts: Tensor | None,
    longest: list[int],
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """(o, lse `[Hq, T]`); window and softcap are 0 for none."""
    if not len(q):
        return _fake(q, k, v, sinks)
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    outs, lses = [], []
    for bounds, causal, left in _calls(segments, prompts, longest, window):
        out, lse, *_ = _flash_attn_varlen_forward(
            q, k, v, *bounds, 0.0, scale, causal, window_size_left=left, window_size_right=-1, softcap=softcap
        )
        outs.append(out)
        lses.append(lse.masked_fill(lse == torch.inf, -torch.inf))  # flash-attn's sign for no key at all
    if prompts is None and sinks is None:
        return outs[0].contiguous(), lses[0]
    everything = lses if sinks is None else [*lses, sinks.to(lses[0].dtype)[:, None].expand_as(lses[0])]
    lse = torch.stack(everything).logsumexp(0)
    merged = lse.new_zeros(q.shape)
    for out, part in zip(outs, lses, strict=True):
        merged += (part - lse).exp().T.unsqueeze(-1) * out
    return merged.to(q.dtype), lse


def _calls(
    segments: Tensor, prompts: Tensor | None, longest: list[int], window: int
) -> Iterator[tuple[tuple[Tensor, Tensor, int, int], bool, int]]:
    """For each call: boundaries and longest sequences of queries and of keys; whether causal; tokens left of a query.

    A longest sequence of one query would ask for flash-attn's path for decoding, which takes no empty sequences.
    """
    yield (segments, segments, max(longest[0], 2), longest[0]), True, window - 1
    if prompts is not None:
        yield (prompts[0], prompts[1], max(longest[1], 2), longest[2]), False, -1


def _fake(q, k, v, sinks, *_):
    return q.new_empty(q.shape), q.new_empty(q.shape[1::-1], dtype=torch.promote_types(q.dtype, torch.float32))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, longest, scale, window, softcap = inputs
    ctx.options = longest, scale, window, softcap
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_out, grad_lse):
    nothing = [None] * 10
    if grad_out is None:
        return tuple(nothing)
    q, k, v, sinks, segments, prompts, out, lse = ctx.saved_tensors
    grads = _packed_flash_backward(grad_out, q, k, v, segments, prompts, out, lse, *ctx.options)
    grad_sinks = None
    if sinks is not None and ctx.needs_input_grad[3]:
        delta = (grad_out.to(lse.dtype) * out).sum(-1).T  # [Hq, T]
        grad_sinks = sinks_gradient(sinks, lse, delta)
    return *grads, grad_sinks, *nothing[4:]


def sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """dsink `[Hq]` of lse and delta `[Hq, T]`."""
    return -((sinks.to(lse.dtype)[:, None] - lse).exp() * delta).sum(1).to(sinks.dtype)


def _gradient(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    prompts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    longest: list[int],
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v: the sums over the calls."""
    grads = _fake_gradient(grad_out, q, k, v)
    if not len(q):
        return grads
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    for number, (bounds, causal, left) in enumerate(_calls(segments, prompts, longest, window)):
        parts = grads if number == 0 else _fake_gradient(grad_out, q, k, v)
        _flash_attn_varlen_backward(
            grad_out, q, k, v, out, lse, *parts, *bounds, 0.0, scale, causal, left, -1, softcap, None, True
        )
        if number:
            for total, part in zip(grads, parts, strict=True):
                total += part
    return grads


def _fake_gradient(grad_out, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_packed_flash_backward = define(
    "packed_flash_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor segments, Tensor? prompts, Tensor out, Tensor lse, "
    "int[] longest, float scale, int window, float softcap) -> (Tensor, Tensor, Tensor)",
    _gradient,
    _fake_gradient,
)
_packed_flash = define(
    "packed_flash",
    "(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor segments, Tensor? prompts, int[] longest, float scale, "
    "int window, float softcap) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _setup_context,
    _backward,
)
