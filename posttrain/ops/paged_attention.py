"""Attention over a paged cache of keys and values, for generation.

Pages of `page_size` tokens hold the keys and values of all sequences; `block_table[s]` names the pages of sequence s in
the order of its positions, so position j of s lies in page block_table[s, j // page_size] at j % page_size. A step
brings n queries of a sequence whose cache holds c keys, theirs included: they have the positions c - n to c - 1, one
when decoding, many when a prompt is read. With the mask "position q sees positions k <= q" (with a window, also
q - k < window) and one softmax for each query,

    s_qk = cap(scale q.k)        o_q = sum over visible k of e^(s_qk - lse_q) v_k
    lse_q = log(e^sink + sum over visible k of e^s_qk)

as in packed_attention.py. Nothing here has a gradient.
"""

import torch
from torch import Tensor

from posttrain.ops import reference


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_lens: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of each sequence's last tokens over all its tokens, in pages.

    Args:
        q: `[T, Hq, D]`, floating: the queries of this step, the sequences' one after another.
        key_cache: `[num_pages, page_size, Hkv, D]`; Hq is a multiple of Hkv, page_size a power of two of at least 8.
        value_cache: like `key_cache`.
        block_table: int32 `[S, max_pages]`, a sequence's pages; entries beyond its context are not looked at.
        context_lens: int32 `[S]`, keys of each sequence, those of this step included: `write_cache` comes first.
        query_lens: int32 `[S]`, queries of each sequence in this step, possibly none; None for one each (S = T).
        scale: of the scores; 1 / sqrt(D) by default.
        window: how many positions back a token sees, itself included; None for all.
        softcap: bound of the scores; None for none.
        sinks: `[Hq]`, floating; None for none.

    Returns:
        `[T, Hq, D]`, in the dtype of `q`; statistics are in float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, with the numbers; tensors that need a gradient; and, for
            tensors on the CPU (a GPU would have to wait), lengths beyond the table and pages that don't exist.
    """
    _check(q, key_cache, value_cache, block_table, context_lens, query_lens, window, softcap, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return reference.paged_attention(
        q, key_cache, value_cache, block_table, context_lens, query_lens,
        scale=scale, window=window, softcap=softcap, sinks=sinks,
    )  # fmt: skip


def write_cache(k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Put the keys and values of this step's tokens into the cache, in place.

    Args:
        k: `[T, Hkv, D]`, floating; rounded to the cache's dtype.
        v: like `k`.
        key_cache: `[num_pages, page_size, Hkv, D]`, contiguous.
        value_cache: like `key_cache`.
        slots: int64 `[T]`, page * page_size + offset of each token, no two alike.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, with the numbers; on the CPU also slots out of range.
    """
    _check_write(k, v, key_cache, value_cache, slots)
    key_cache.flatten(0, 1).index_copy_(0, slots, k.to(key_cache.dtype))
    value_cache.flatten(0, 1).index_copy_(0, slots, v.to(value_cache.dtype))


def _check(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_lens: Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    shapes = f"q {list(q.shape)}, key_cache {list(key_cache.shape)}, value_cache {list(value_cache.shape)}"
    if q.ndim != 3 or key_cache.ndim != 4 or key_cache.shape != value_cache.shape or q.shape[2] != key_cache.shape[3]:
        raise ValueError(f"paged_attention: needs q [T, Hq, D] and both caches [P, page_size, Hkv, D]; got {shapes}")
    page_size = key_cache.shape[1]
    if page_size < 8 or page_size & (page_size - 1):
        raise ValueError(f"paged_attention: page_size must be a power of two of at least 8; got {shapes}")
    if 0 in q.shape[1:] or key_cache.shape[2] == 0 or q.shape[1] % key_cache.shape[2]:
        raise ValueError(f"paged_attention: needs D of at least 1 and Hq a multiple of Hkv; got {shapes}")
    if not q.is_floating_point() or not q.dtype == key_cache.dtype == value_cache.dtype:
        raise ValueError(
            "paged_attention: q and the caches must share a floating dtype, "
            f"got {q.dtype}, {key_cache.dtype}, {value_cache.dtype}"
        )
    lengths = [context_lens] if query_lens is None else [context_lens, query_lens]
    tables = [block_table, *lengths]
    if block_table.ndim != 2 or any(x.shape != block_table.shape[:1] for x in lengths):
        raise ValueError(
            "paged_attention: needs block_table [S, max_pages], context_lens [S] and query_lens [S]; "
            f"got {', '.join(str(list(x.shape)) for x in tables)}"
        )
    if query_lens is None and len(context_lens) != len(q):
        raise ValueError(
            f"paged_attention: without query_lens, {len(context_lens)} sequences need one query each; got {shapes}"
        )
    if any(x.dtype != torch.int32 for x in tables):
        raise ValueError(
            "paged_attention: block_table, context_lens and query_lens must be int32, "
            f"got {', '.join(str(x.dtype) for x in tables)}"
        )
    devices = {str(x.device) for x in (q, key_cache, value_cache, *tables)}
    if len(devices) > 1:
        raise ValueError(f"paged_attention: the tensors are on several devices, {', '.join(sorted(devices))}")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"paged_attention: window must be an integer of at least 1, got {window!r}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"paged_attention: softcap must be positive, got {softcap}")
    if sinks is not None and (sinks.shape != q.shape[1:2] or not sinks.is_floating_point() or sinks.device != q.device):
        raise ValueError(
            f"paged_attention: sinks must be [{q.shape[1]}], floating, on {q.device}; "
            f"got {list(sinks.shape)} {sinks.dtype} on {sinks.device}"
        )


def _check_write(k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    shapes = f"k {list(k.shape)}, v {list(v.shape)}, caches {list(key_cache.shape)} and {list(value_cache.shape)}"
    if key_cache.ndim != 4 or key_cache.shape != value_cache.shape or k.shape != v.shape:
        raise ValueError(f"write_cache: needs k and v [T, Hkv, D] and caches [P, page_size, Hkv, D]; got {shapes}")
    if k.ndim != 3 or k.shape[1:] != key_cache.shape[2:]:
        raise ValueError(f"write_cache: k and v must be [T, {', '.join(map(str, key_cache.shape[2:]))}]; got {shapes}")
    if slots.shape != k.shape[:1] or slots.dtype != torch.int64:
        raise ValueError(f"write_cache: slots must be int64 [{len(k)}], got {slots.dtype} {list(slots.shape)}")
    if not key_cache.is_contiguous() or not value_cache.is_contiguous():
        raise ValueError(f"write_cache: the caches must be contiguous; got strides {key_cache.stride()}")
    room = key_cache.shape[0] * key_cache.shape[1]
    if slots.is_cpu and len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < room:
        raise ValueError(f"write_cache: slots must be 0 to {room - 1}, got {int(slots.min())} to {int(slots.max())}")
