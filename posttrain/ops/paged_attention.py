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

from posttrain import _C
from posttrain.ops import reference
from posttrain.ops.attention_options import ScoreOptions, score_options
from posttrain.ops.backend import CUDA_DTYPES, backend_for, cuda_device, cuda_kernels, cuda_stream
from posttrain.ops.library import define


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
        `[T, Hq, D]`, in the dtype of `q`. Statistics are in float32 (float64 for float64); the backend "cpu" computes
        half precision through float32 copies of the pages in use. A query's output depends only on its own sequence up
        to itself, bit for bit, not on the rest of the batch; with "triton" as long as decoding (`query_lens` None) and
        chunks are called apart. With "cpu" and "cuda" it doesn't depend on how many of the sequence's queries come in
        one call either, and with "cpu" has the bits of `packed_attention` for a sequence that shares no prompt there.

        Sequences whose tables begin with the same pages, as those of one prompt do, share the work on these pages
        where they follow each other in the batch: with "cpu", and in whole splits with "cuda" (of 256 keys) and, when
        decoding, with "triton" (of 512, in fixed tiles). "cuda" takes each query of a chunk as a sequence of its own,
        so it reads keys more often than a chunk needs.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, with the numbers; tensors that need a gradient; with
            "triton" and "cuda" heads over 256 wide, with "cuda" also keys that don't start at 16 bytes; and, for
            tensors on the CPU (a GPU would have to wait), lengths beyond the table and pages that don't exist.
    """
    tables = block_table, context_lens, query_lens
    _check(q, key_cache, value_cache, *tables, sinks)
    options = score_options("paged_attention", q, scale, window, softcap, sinks)
    backend = backend_for("paged_attention", q)
    if backend == "reference":
        _check_pages(q, key_cache, *tables)
        window, softcap = options.window or None, options.softcap or None
        return reference.paged_attention(
            q, key_cache, value_cache, *tables, scale=options.scale, window=window, softcap=softcap, sinks=sinks
        )
    return _paged_attention(q, key_cache, value_cache, *tables, sinks, *options, backend)


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
    check_write("write_cache", k, v, key_cache, value_cache, slots)
    _write_cache(k, v, key_cache, value_cache, slots)


def _check(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_lens: Tensor | None,
    sinks: Tensor | None,
) -> None:

    def shapes() -> str:
        return f"q {list(q.shape)}, key_cache {list(key_cache.shape)}, value_cache {list(value_cache.shape)}"

    if q.ndim != 3 or key_cache.ndim != 4 or key_cache.shape != value_cache.shape or q.shape[2] != key_cache.shape[3]:
        raise ValueError(f"paged_attention: needs q [T, Hq, D] and both caches [P, page_size, Hkv, D]; got {shapes()}")
    page_size = key_cache.shape[1]
    if page_size < 8 or page_size & (page_size - 1):
        raise ValueError(f"paged_attention: page_size must be a power of two of at least 8; got {shapes()}")
    if 0 in q.shape[1:] or key_cache.shape[2] == 0 or q.shape[1] % key_cache.shape[2]:
        raise ValueError(f"paged_attention: needs D of at least 1 and Hq a multiple of Hkv; got {shapes()}")
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
            f"paged_attention: without query_lens, {len(context_lens)} sequences need one query each; got {shapes()}"
        )
    if any(x.dtype != torch.int32 for x in tables):
        raise ValueError(
            "paged_attention: block_table, context_lens and query_lens must be int32, "
            f"got {', '.join(str(x.dtype) for x in tables)}"
        )
    _check_devices("paged_attention", q, key_cache, value_cache, *tables)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, key_cache, value_cache, sinks)):
        raise ValueError("paged_attention: has no gradient; call it under torch.no_grad()")


def _check_devices(op: str, *tensors: Tensor) -> None:
    devices = {x.device for x in tensors}
    if len(devices) > 1:
        raise ValueError(f"{op}: the tensors are on several devices, {', '.join(sorted(map(str, devices)))}")


def check_write(op: str, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Raise what `write_cache` raises, in the name of `op`."""

    def shapes() -> str:
        return f"k {list(k.shape)}, v {list(v.shape)}, caches {list(key_cache.shape)} and {list(value_cache.shape)}"

    if key_cache.ndim != 4 or key_cache.shape != value_cache.shape or k.shape != v.shape:
        raise ValueError(f"{op}: needs k and v [T, Hkv, D] and caches [P, page_size, Hkv, D]; got {shapes()}")
    if k.ndim != 3 or k.shape[1:] != key_cache.shape[2:]:
        own = ", ".join(map(str, key_cache.shape[2:]))
        raise ValueError(f"{op}: k and v must be [T, {own}]; got {shapes()}")
    _check_devices(op, k, v, key_cache, value_cache, slots)
    if not k.is_floating_point() or k.dtype != v.dtype or key_cache.dtype != value_cache.dtype:
        raise ValueError(
            f"{op}: k and v, and the caches, must share a floating dtype, "
            f"got {k.dtype}, {v.dtype}, {key_cache.dtype}, {value_cache.dtype}"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (k, v, key_cache, value_cache)):
        raise ValueError(f"{op}: has no gradient; call it under torch.no_grad()")
    if slots.shape != k.shape[:1] or slots.dtype != torch.int64:
        raise ValueError(f"{op}: slots must be int64 [{len(k)}], got {slots.dtype} {list(slots.shape)}")
    if not key_cache.is_contiguous() or not value_cache.is_contiguous():
        raise ValueError(f"{op}: the caches must be contiguous; got strides {key_cache.stride()}")


def _forward(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_lens: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    backend: str,
) -> Tensor:
    """window and softcap are 0 for none."""
    options = ScoreOptions(scale, window, softcap)
    _check_pages(q, key_cache, block_table, context_lens, query_lens)
    if backend == "triton":
        from posttrain.kernels.paged_attention import attend

        return attend(q, key_cache, value_cache, block_table, context_lens, query_lens, sinks, *options)
    if backend == "cuda":
        tables = _by_query(len(q), block_table, context_lens, query_lens)
        return _cuda_forward(q, key_cache, value_cache, *tables, sinks, options)
    if q.dtype in (torch.bfloat16, torch.float16):
        key_cache, value_cache, block_table = _widened(key_cache, value_cache, block_table, context_lens)
    return _cpu_forward(q, key_cache, value_cache, block_table, context_lens, query_lens, sinks, options)


def _fake(q, key_cache, value_cache, block_table, context_lens, query_lens, sinks, scale, window, softcap, backend):
    return q.new_empty(q.shape)


def _check_pages(
    q: Tensor, key_cache: Tensor, block_table: Tensor, context_lens: Tensor, query_lens: Tensor | None
) -> None:
    """Looks into the tables, if they are on the CPU."""
    if q.is_cpu:
        _, tables = _tables(block_table, context_lens, query_lens)
        _C.check_pages(tables, len(q), key_cache.shape[0], key_cache.shape[1])


def _tables(
    block_table: Tensor, context_lens: Tensor, query_lens: Tensor | None
) -> tuple[list[Tensor], tuple[int, int, int, int, int, int]]:
    """The tables as the kernels read them, and the tensors that must live so long."""
    block_table = block_table if block_table.stride(-1) == 1 else block_table.contiguous()
    tensors = [block_table, context_lens.contiguous()]
    if query_lens is not None:
        tensors.append(query_lens.contiguous())
    addresses = [x.data_ptr() for x in tensors] + [0] * (3 - len(tensors))
    return tensors, (addresses[0], addresses[1], addresses[2], block_table.stride(0), *block_table.shape)


def _widened(
    key_cache: Tensor, value_cache: Tensor, block_table: Tensor, context_lens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The pages in use, in float32, and a table of them."""
    first = torch.arange(block_table.shape[1]) * key_cache.shape[1]
    used = first < context_lens[:, None]
    pages, own = block_table[used].unique(return_inverse=True)
    table = torch.zeros_like(block_table)
    table[used] = own.int()
    return key_cache[pages].float(), value_cache[pages].float(), table


def _cpu_forward(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_lens: Tensor | None,
    sinks: Tensor | None,
    options: ScoreOptions,
) -> Tensor:
    wide = q.to(key_cache.dtype)
    out = torch.empty_like(wide, memory_format=torch.contiguous_format)
    wide, key_cache, value_cache = (x if x.stride(-1) == 1 else x.contiguous() for x in (wide, key_cache, value_cache))
    sinks = None if sinks is None else sinks.to(wide.dtype).contiguous()
    kept, tables = _tables(block_table, context_lens, query_lens)
    threads = torch.get_num_threads()
    workspace = wide.new_empty(threads, _C.paged_workspace(wide.itemsize, wide.shape[2]))
    _C.paged_attention(
        wide.itemsize,
        (wide.data_ptr(), *wide.stride()[:2]),
        (key_cache.data_ptr(), *key_cache.stride()[:3]),
        (value_cache.data_ptr(), *value_cache.stride()[:3]),
        tables,
        0 if sinks is None else sinks.data_ptr(),
        (wide.shape[1], key_cache.shape[2], wide.shape[2], key_cache.shape[1]),
        (options.scale, options.softcap, options.window),
        out.data_ptr(),
        workspace.data_ptr(),
        threads,
    )
    del kept
    return out.to(q.dtype)


def _by_query(
    tokens: int, block_table: Tensor, context_lens: Tensor, query_lens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The pages and the context of each query; nothing waits for the lengths."""
    if query_lens is None:
        return block_table, context_lens
    sequence = torch.arange(len(query_lens), device=query_lens.device)
    sequence = sequence.repeat_interleave(query_lens, output_size=tokens)
    later = query_lens.cumsum(0)[sequence] - torch.arange(tokens, device=query_lens.device)  # queries, itself included
    return block_table[sequence], context_lens[sequence] - later.int() + 1


def _cuda_forward(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    sinks: Tensor | None,
    options: ScoreOptions,
) -> Tensor:
    """One query for each sequence."""
    _check_vectors(q, key_cache, value_cache)
    kernels = cuda_kernels(q)
    tokens, heads, width = q.shape
    page_size, key_heads = key_cache.shape[1:3]
    splits = -(-block_table.shape[1] * page_size // kernels.cuda_paged_split())
    out = q.new_empty(q.shape)
    part_out = q.new_empty(tokens * heads * splits, width, dtype=torch.float32)
    part_top, part_total = q.new_empty(2, tokens * heads * splits, dtype=torch.float32)
    q = q if q.stride(2) == 1 else q.contiguous()
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    context_lens = context_lens.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    with cuda_device(q):
        kernels.cuda_paged_decode(
            cuda_stream(q),
            CUDA_DTYPES[q.dtype],
            (q.data_ptr(), *q.stride()[:2]),
            (key_cache.data_ptr(), *key_cache.stride()[:3]),
            (value_cache.data_ptr(), *value_cache.stride()[:3]),
            (block_table.data_ptr(), block_table.stride(0), context_lens.data_ptr()),
            0 if sinks is None else sinks.data_ptr(),
            (part_out.data_ptr(), part_top.data_ptr(), part_total.data_ptr()),
            (tokens, heads, key_heads, width, page_size.bit_length() - 1, splits),
            (options.scale, options.softcap, options.window),
            out.data_ptr(),
        )
    return out


def _check_vectors(q: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    """What the CUDA kernels need to read keys and values 16 bytes at a time."""
    size = 16 // q.itemsize
    if q.shape[2] > 256 or q.shape[2] % size:
        raise ValueError(
            f"paged_attention: the backend cuda takes heads of up to 256 wide, a multiple of {size} for {q.dtype}; "
            f'got q {list(q.shape)}; use_backend("reference", "paged_attention") computes any width'
        )
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.stride(3) != 1 or any(stride % size for stride in cache.stride()[:3]) or cache.data_ptr() % 16:
            raise ValueError(
                f"paged_attention: the backend cuda needs heads of {name} that are contiguous and start at multiples "
                f"of 16 bytes; got strides {list(cache.stride())} of {q.dtype} at address {cache.data_ptr()}"
            )


def _write(k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    k, v = k.to(key_cache.dtype), v.to(value_cache.dtype)
    if not k.is_cpu:
        key_cache.flatten(0, 1).index_copy_(0, slots, k)
        value_cache.flatten(0, 1).index_copy_(0, slots, v)
        return
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    slots = slots.contiguous()
    _C.write_cache(
        key_cache.itemsize,
        (k.data_ptr(), *k.stride()[:2]),
        (v.data_ptr(), *v.stride()[:2]),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        slots.data_ptr(),
        *k.shape,
        key_cache.shape[0] * key_cache.shape[1],
    )


def _fake_write(k, v, key_cache, value_cache, slots):
    return None


_paged_attention = define(
    "paged_attention",
    "(Tensor q, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor context_lens, Tensor? query_lens, "
    "Tensor? sinks, float scale, int window, float softcap, str backend) -> Tensor",
    _forward,
    _fake,
)
_write_cache = define(
    "write_cache",
    "(Tensor k, Tensor v, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots) -> ()",
    _write,
    _fake_write,
)
