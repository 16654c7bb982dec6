"""Rotary embedding of a step's queries and keys together with the write of its keys and values into the cache.

What `rope` and then `write_cache` do, for decoding: with "cpu" and "cuda" in one pass, without rotated keys in between,
which would be written and read once more; with "cuda" in one launch instead of three (the rotation, the copy of the
keys, the copy of the values).
"""

import torch
from torch import Tensor

from posttrain import _C
from posttrain.ops.backend import CUDA_DTYPES, backend_for, cuda_device, cuda_kernels, cuda_stream
from posttrain.ops.library import define
from posttrain.ops.paged_attention import check_write, write_cache
from posttrain.ops.rope import check_rope, rope


def rope_cache(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
) -> Tensor:
    """Rotate queries and keys; put keys and values into the cache, in place; give the queries.

    Args:
        q: `[T, Hq, D]`, floating.
        k: `[T, Hkv, D]`, in the dtype of `q`.
        v: like `k`, not rotated.
        cos: `[T, R]`, floating, R even and at most D; the elements of each head from R on are passed through.
        sin: like `cos`.
        key_cache: `[num_pages, page_size, Hkv, D]`, contiguous; k is rounded to its dtype.
        value_cache: like `key_cache`.
        slots: int64 `[T]`, page * page_size + offset of each token, no two alike.

    Returns:
        q rotated, `[T, Hq, D]`: of `rope`, as what is in the cache is of `rope` and `write_cache`. With "triton" and
        "reference", and with "cpu" where the caches have another dtype than q, it is by them that it is computed.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, with the numbers; tensors that need a gradient; slots out
            of range on the CPU; with "cuda" also caches of another dtype than q.
    """
    check_rope("rope_cache", q, k, cos, sin, 1)
    check_write("rope_cache", k, v, key_cache, value_cache, slots)
    if torch.is_grad_enabled() and (q.requires_grad or cos.requires_grad or sin.requires_grad):
        raise ValueError("rope_cache: has no gradient; call it under torch.no_grad()")
    case = "" if key_cache.dtype == q.dtype else "caches of another dtype"
    backend = backend_for("rope_cache", q, case)
    if case and backend == "cuda":
        raise ValueError(f"rope_cache: with cuda the caches must have the dtype of q, {q.dtype}; got {key_cache.dtype}")
    if case or backend not in ("cpu", "cuda"):
        q, k = rope(q, k, cos, sin)
        write_cache(k, v, key_cache, value_cache, slots)
        return q
    return _rope_cache(q, k, v, cos, sin, key_cache, value_cache, slots, backend)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    backend: str,
) -> Tensor:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    angle_dtype = q.dtype if backend == "cpu" else _angle_dtype(q, cos, sin)
    cos, sin = (x.to(angle_dtype).contiguous() for x in (cos, sin))
    slots = slots.contiguous()
    out = _fake(q, k, v, cos, sin, key_cache, value_cache, slots, backend)
    if backend == "cpu":
        _C.rope_cache(
            q.itemsize,
            (q.data_ptr(), *q.stride()[:2]),
            (k.data_ptr(), *k.stride()[:2]),
            (v.data_ptr(), *v.stride()[:2]),
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            out.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            len(q),
            (q.shape[1], k.shape[1], q.shape[2], cos.shape[1]),
            key_cache.shape[0] * key_cache.shape[1],
        )
        return out
    with cuda_device(q):
        cuda_kernels(q).cuda_rope_cache(
            cuda_stream(q),
            CUDA_DTYPES[q.dtype],
            cos.dtype == torch.float32,
            *((x.data_ptr(), *x.stride()[:2], x.shape[1]) for x in (q, k, v)),
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            len(q),
            q.shape[2],
            cos.shape[1] // 2,
            out.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
        )
    return out


def _angle_dtype(q: Tensor, cos: Tensor, sin: Tensor) -> torch.dtype:
    """One of the two that the kernel reads: that of q, or float32."""
    return q.dtype if q.dtype == cos.dtype == sin.dtype else torch.float32


def _fake(q, k, v, cos, sin, key_cache, value_cache, slots, backend):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_rope_cache = define(
    "rope_cache",
    "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor slots, str backend) -> Tensor",
    _forward,
    _fake,
)
