"""Attention as plain PyTorch computes it in the dtype of its inputs: the peer of half precision."""

import torch
from torch import Tensor

from posttrain.ops.layout import PackedLayout


def plain_attention(
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
    """`posttrain.ops.packed_attention`, with a mask of T x T."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    index = torch.arange(len(q), device=q.device)
    visible = (index <= index[:, None]) & (index[:, None] < layout.visible_until)
    if window is not None:
        visible &= layout.positions[:, None] - layout.positions < window
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1)], -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(k)], v)
