"""Our attention behind transformers' attention interface, under the name "posttrain".

Whole sequences are packed attention: with a `PackedLayout` in the keyword `layout`, and else with the layout that the
mask stands for (mask.py), for packed `position_ids`, padded batches and prompts alike. Queries that follow a cache get
what "sdpa" gives; capped scores and sinks, which "sdpa" doesn't know, are then computed densely.

Importing this module registers the name.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from posttrain.models.mask import PackedMask, packed_mask
from posttrain.ops import packed_attention
from posttrain.ops.layout import PackedLayout

NAME = "posttrain"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedMask | Tensor | None,
    *,
    layout: PackedLayout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query `[B, Hq, T, D]`, key and value `[B, Hkv, S, D]`; the result is `[B, T, Hq, D]`.

    With a layout, B is 1, `attention_mask` is ignored, and the forward needs the positions, too:
    `position_ids=layout.positions.long()[None]`. `s_aux` `[Hq]` are sinks, as in GPT-OSS.

    Raises:
        ValueError: `output_attentions`, a caller's own mask of four dimensions, attention that isn't causal, for whole
            sequences dropout or a bias by position, and on the CPU (a GPU would have to wait) a layout without its
            positions.
    """
    if kwargs.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        raise ValueError("attention 'posttrain' has no output_attentions; use attn_implementation='eager'")
    if layout is not None:
        if len(query) != 1:
            raise ValueError(f"a packed batch is one row of tokens; got queries {list(query.shape)}")
        _check_positions(kwargs.get("position_ids"), layout)
        window, index = sliding_window, None
    elif isinstance(attention_mask, PackedMask):
        window, (layout, index) = attention_mask.window, attention_mask.packing
    else:
        mask = _checked(module, query, key, attention_mask, kwargs.get("is_causal"))
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
        return _dense(query, key, value, mask, scaling, dropout, softcap, s_aux), None
    _check_packed(dropout, kwargs.get("position_bias"))
    options = {"scale": scaling, "window": window, "softcap": softcap, "sinks": s_aux}
    return _packed(query, key, value, layout, index, **options), None


def _check_positions(position_ids: Tensor | None, layout: PackedLayout) -> None:
    """Refuses the positions that a model makes up where it is given none, unless they are the layout's."""
    if position_ids is None or not position_ids.is_cpu or torch.compiler.is_compiling():
        return
    restart = layout.restart
    if restart is not None and position_ids.flatten()[restart : restart + 1].tolist() == [restart]:
        raise ValueError(
            f"the positions of these {layout.num_tokens} tokens run on from 0, and those of {layout} restart; "
            "give position_ids=layout.positions.long()[None] with layout"
        )


def _check_packed(dropout: float, position_bias: Tensor | None) -> None:
    if dropout:
        raise ValueError(
            f"packed attention has no dropout; set attention_dropout to 0, not {dropout}, "
            "or use attn_implementation='sdpa'"
        )
    if position_bias is not None:
        raise ValueError("packed attention has no bias by position; use attn_implementation='sdpa'")


def _packed(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, index: Tensor | None, **options: Any
) -> Tensor:
    """`packed_attention` of the tokens `index` among all B T; the others, padding, get zeros.

    In the dtype of `value`: under autocast, rotary embeddings leave queries and keys wider.
    """
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(value.dtype) for x in (query, key, value))  # [B T, H, D]
    if index is not None:
        q, k, v = (x.index_select(0, index) for x in (q, k, v))
    out = packed_attention(q, k, v, layout, **options)
    if index is not None:
        out = out.new_zeros(query.shape[0] * query.shape[2], *out.shape[1:]).index_copy_(0, index, out)
    return out.unflatten(0, (query.shape[0], query.shape[2]))


def _checked(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None
) -> Tensor | None:
    """The mask for "sdpa", if it doesn't come from the caller and attention doesn't look ahead."""
    whole = query.shape[2] == key.shape[2] > 1
    if mask is not None and whole and mask.shape[-1] != key.shape[2]:
        raise ValueError(f"the attention_mask is for {mask.shape[-1]} tokens in a row, and there are {key.shape[2]}")
    if mask is not None and (mask.dtype != torch.bool or whole) and not torch.compiler.is_compiling():
        raise ValueError(
            f"attention 'posttrain' takes no masks of four dimensions, got {list(mask.shape)} {mask.dtype}; "
            "give a PackedLayout as layout, position_ids or a mask of two dimensions, or use attn_implementation='sdpa'"
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if mask is None and query.shape[2] > 1 and not causal:
        raise ValueError(f"attention 'posttrain' is causal, {type(module).__name__} isn't; use 'sdpa' for it")
    return mask


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Dense attention with capped scores or sinks; without a mask several queries are causal, as in "sdpa"."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)], -1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide)[..., : key.shape[2]].to(query.dtype)
    return (nn.functional.dropout(weights, dropout) @ value).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, packed_mask)
