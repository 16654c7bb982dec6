"""Our attention behind transformers' attention interface, under the name "posttrain".

A call that carries a `PackedLayout` in the keyword `layout` is packed attention. One without (`generate` with a cache,
a padded batch) gets what transformers' "sdpa" gives, masks included; score caps, which "sdpa" refuses, are computed
densely.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from posttrain.ops import packed_attention
from posttrain.ops.layout import PackedLayout

NAME = "posttrain"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: PackedLayout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query `[B, Hq, T, D]`, key and value `[B, Hkv, S, D]`; the result is `[B, T, Hq, D]`.

    With a layout, B is 1 and `attention_mask` is ignored. Raises `ValueError` for attention dropout with a layout.
    """
    if layout is None and softcap is not None:
        return _capped(query, key, value, attention_mask, scaling, dropout, softcap), None
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout:
        raise ValueError(f"packed attention has no dropout; set attention_dropout to 0, not {dropout}")
    if query.shape[0] != 1:
        raise ValueError(f"a packed batch is one row of tokens; got queries {list(query.shape)}")
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return packed_attention(q, k, v, layout, scale=scaling, window=sliding_window, softcap=softcap)[None], None


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float,
) -> Tensor:
    """Dense attention with capped scores; without a mask several queries are causal, as in "sdpa"."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = nn.functional.dropout(scores.float().softmax(-1).to(query.dtype), dropout)
    return (weights @ value).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
