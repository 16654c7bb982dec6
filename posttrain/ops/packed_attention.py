"""Causal attention over packed sequences.

With the mask of `PackedLayout` (query q sees key k where k <= q < visible_until[k]; with a window, also
position[q] - position[k] < window):

    o_q = sum over visible k of softmax_k(c(scale q.k)) v_k,     c(s) = s or softcap tanh(s / softcap)

(Vaswani et al., "Attention Is All You Need", 2017; the cap is Gemma 2's.) Independent segments are one call each of
PyTorch's scaled_dot_product_attention, on views: `split` has a single backward node, so the gradients of all segments
are joined once instead of each being added into a zero-filled tensor of T rows. A cap, or a forest, goes through the
dense reference.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from posttrain.ops import reference
from posttrain.ops.layout import PackedLayout


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention in which no token sees another sequence.

    Args:
        q: `[T, Hq, D]`, floating.
        k: `[T, Hkv, D]`; Hq is a multiple of Hkv, and query head h reads key head h // (Hq / Hkv).
        v: `[T, Hkv, Dv]`.
        layout: who sees whom among the T tokens.
        scale: of the scores; 1 / sqrt(D) by default.
        window: how many tokens back a token sees, itself included; None for all.
        softcap: bound of the scores; None for none.

    Returns:
        `[T, Hq, Dv]`, in the dtype of `q`.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, with the numbers.
    """
    _check(q, k, v, layout, window, softcap)
    if not layout.independent or layout.num_tokens == 0:
        return reference.packed_attention(q, k, v, layout, scale=scale, window=window, softcap=softcap)
    starts = layout.segment_starts
    lengths = [end - start for start, end in pairwise(starts) if end > start]
    segments = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True)
    outputs = [_segment(*qkv, scale=scale, window=window, softcap=softcap) for qkv in segments]
    return torch.cat(outputs)


def _segment(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """One sequence of L tokens: q, k, v `[heads, L, D]`; result `[L, Hq, Dv]`."""
    length = q.shape[1]
    if softcap is not None:
        alone = PackedLayout.from_lengths([length], q.device)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return reference.packed_attention(q, k, v, alone, scale=scale, window=window, softcap=softcap)
    mask = None if window is None or window >= length else _band(length, window, q.device)
    out = scaled_dot_product_attention(
        q.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[0] != k.shape[0],
    )
    return out.squeeze(0).transpose(0, 1)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Bool `[length, length]`: the `window` keys up to each query."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def _check(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, window: int | None, softcap: float | None) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 3 or k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(f"packed_attention: needs q [T, Hq, D], k [T, Hkv, D] and v [T, Hkv, Dv]; got {shapes}")
    if not len(q) == len(k) == layout.num_tokens:
        raise ValueError(f"packed_attention: the layout has {layout.num_tokens} tokens; got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
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
    if window is not None and window < 1:
        raise ValueError(f"packed_attention: window must be at least 1, got {window}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"packed_attention: softcap must be positive, got {softcap}")
