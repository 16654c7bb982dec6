"""Triton kernels of packed attention (posttrain/ops/packed_attention.py has the formulas).

Forward and dQ: a program owns a block of queries under one head and walks the key blocks from the start of its first
query's tree to its last query. It passes over those whose largest `visible_until` is at most its first query, and each
run of others is one inner loop, which the compiler can pipeline. dK/dV: a program owns a block of keys under one key
head and walks the queries from its first key to its largest `visible_until`, a contiguous range, for every query head
of the group. So sums have one order, and nothing is added by two programs.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.ops.layout import BLOCK


class Blocks(NamedTuple):
    """Queries and keys of a block."""

    queries: int
    keys: int
    warps: int
    stages: int


# By width of the heads, or 0 for float32; chosen so that nothing spills on any architecture (tests/kernels/aot.py).
FORWARD_BLOCKS = {
    0: Blocks(32, 32, 8, 2),
    64: Blocks(128, 64, 8, 2),
    128: Blocks(64, 64, 8, 2),
    256: Blocks(64, 32, 8, 2),
}
DKV_BLOCKS = {0: Blocks(32, 32, 8, 1), 64: Blocks(32, 32, 8, 1), 128: Blocks(32, 64, 8, 1), 256: Blocks(32, 32, 8, 1)}
DQ_BLOCKS = {0: Blocks(32, 32, 8, 2), 64: Blocks(64, 64, 8, 2), 128: Blocks(32, 32, 8, 1), 256: Blocks(32, 32, 8, 1)}

_GRAIN = tl.constexpr(BLOCK)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tanh(x):
    square = x * x
    near = -5.70498872745e-3
    near = near * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, x + x * square * near, tl.where(x < 0, -far, far))


@triton.jit
def _tile(x, first, token_stride, T, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Addresses [COUNT, BLOCK_WIDTH] of the rows of a head from `first` on, and which of them there are."""
    row = tl.arange(0, COUNT)[:, None]
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    address = x + tl.cast(first, tl.int64) * token_stride + (row * token_stride + column)
    inside = first + row < T
    if WIDTH < BLOCK_WIDTH:
        inside = inside & (column < WIDTH)
    return address, inside


@triton.jit
def _load(x, first, token_stride, T, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Rows of a head, zeros outside."""
    address, inside = _tile(x, first, token_stride, T, COUNT, WIDTH, BLOCK_WIDTH)
    return tl.load(address, mask=inside, other=0.0)


@triton.jit
def _store(x, value, first, token_stride, T, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    address, inside = _tile(x, first, token_stride, T, COUNT, WIDTH, BLOCK_WIDTH)
    tl.store(address, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _scores(q, k, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log 2: [queries, keys]."""
    raw = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFTCAP:
        return _tanh(raw * (scale / softcap)) * (softcap * _LOG2E)
    return raw * (scale * _LOG2E)


@triton.jit
def _slope(s, softcap):
    """Derivative of the cap, 1 - tanh^2, from scores in units of log 2."""
    th = s * (_LN2 / softcap)
    return 1.0 - th * th


@triton.jit
def _sees(query, key, visible_until, positions, window, T, WINDOW: tl.constexpr):
    """Which of the queries see which of the keys: bool [queries, keys]."""
    until = tl.load(visible_until + key, mask=key < T, other=0)
    sees = (key[None, :] <= query[:, None]) & (query[:, None] < until[None, :])
    if WINDOW:
        query_position = tl.load(positions + query, mask=query < T, other=0)
        key_position = tl.load(positions + key, mask=key < T, other=0)
        sees &= query_position[:, None] - key_position[None, :] < window
    return sees


@triton.jit
def _needed(largest_until, first_query, first_key, KEYS: tl.constexpr):
    """Whether a query from `first_query` on may see a key of the block."""
    grain = first_key // _GRAIN + tl.arange(0, KEYS // _GRAIN)
    return tl.max(tl.load(largest_until + grain), 0) > first_query


@triton.jit
def _run_end(largest_until, first_query, end_query, begin, KEYS: tl.constexpr):
    """Where the run of needed key blocks that starts at `begin` ends."""
    end = begin + KEYS
    while (end < end_query) & _needed(largest_until, first_query, tl.minimum(end, end_query - 1) // KEYS * KEYS, KEYS):
        end += KEYS
    return end


@triton.jit
def _run_start(largest_until, first_query, end_query, begin, KEYS: tl.constexpr):
    """The first needed key block from `begin` on, or the end."""
    while (begin < end_query) & (
        _needed(largest_until, first_query, tl.minimum(begin, end_query - 1) // KEYS * KEYS, KEYS) == 0
    ):
        begin += KEYS
    return begin


@triton.jit
def _forward(
    q, k, v, visible_until, positions, largest_until, tree_start, sinks, out, lse,
    q_token, q_head, k_token, k_head, v_token, v_head, scale, softcap, window, T, heads, group,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE_WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    first_query = (tl.num_programs(1) - 1 - tl.program_id(1)) * QUERIES  # the last blocks have the most keys
    end_query = tl.minimum(first_query + QUERIES, T)
    query = first_query + tl.arange(0, QUERIES)
    b_q = _load(q + head * q_head, first_query, q_token, T, QUERIES, WIDTH, BLOCK_WIDTH)
    k += head // group * k_head
    v += head // group * v_head
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    b_out = tl.zeros([QUERIES, BLOCK_VALUE_WIDTH], tl.float32)
    begin = tl.load(tree_start + first_query // _GRAIN) // KEYS * KEYS
    while begin < end_query:
        end = _run_end(largest_until, first_query, end_query, begin, KEYS)
        for first_key in range(begin, end, KEYS):
            b_k = _load(k, first_key, k_token, T, KEYS, WIDTH, BLOCK_WIDTH)
            key = first_key + tl.arange(0, KEYS)
            s = _scores(b_q, b_k, scale, softcap, SOFTCAP)
            s = tl.where(_sees(query, key, visible_until, positions, window, T, WINDOW), s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            reference = tl.where(new_top == float("-inf"), 0.0, new_top)
            factor = tl.exp2(top - reference)
            p = tl.exp2(s - reference[:, None])
            total = total * factor + tl.sum(p, 1)
            b_v = _load(v, first_key, v_token, T, KEYS, VALUE_WIDTH, BLOCK_VALUE_WIDTH)
            b_out = tl.dot(p.to(b_v.dtype), b_v, b_out * factor[:, None], input_precision="ieee")
            top = new_top
        begin = _run_start(largest_until, first_query, end_query, end, KEYS)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * _LOG2E
        new_top = tl.maximum(top, sink)
        factor = tl.exp2(top - new_top)
        total = total * factor + tl.exp2(sink - new_top)
        b_out *= factor[:, None]
        top = new_top
    seen = total > 0
    b_out = tl.where(seen[:, None], b_out / tl.where(seen, total, 1.0)[:, None], 0.0)
    b_lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * _LN2, float("-inf"))
    out += head * VALUE_WIDTH
    _store(out, b_out, first_query, heads * VALUE_WIDTH, T, QUERIES, VALUE_WIDTH, BLOCK_VALUE_WIDTH)
    tl.store(lse + head * T + query, b_lse, mask=query < T)


@triton.jit
def _delta(
    out, grad_out, delta, grad_token, grad_head, T, heads,
    VALUE_WIDTH: tl.constexpr, BLOCK_VALUE_WIDTH: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """delta = sum of out times its gradient, [heads, T]."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * QUERIES
    b_out = _load(out + head * VALUE_WIDTH, first, heads * VALUE_WIDTH, T, QUERIES, VALUE_WIDTH, BLOCK_VALUE_WIDTH)
    b_grad = _load(grad_out + head * grad_head, first, grad_token, T, QUERIES, VALUE_WIDTH, BLOCK_VALUE_WIDTH)
    query = first + tl.arange(0, QUERIES)
    tl.store(delta + head * T + query, tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1), mask=query < T)


@triton.jit
def _score_gradient(
    q, k, v, grad_out, lse, delta, query, key, visible_until, positions, scale, softcap, window, T,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """(p, ds), both [queries, keys] float32, for lse in units of log 2."""
    s = _scores(q, k, scale, softcap, SOFTCAP)
    sees = _sees(query, key, visible_until, positions, window, T, WINDOW)
    p = tl.exp2(tl.where(sees, s, float("-inf")) - lse[:, None])
    ds = p * (tl.dot(grad_out, tl.trans(v), input_precision="ieee") - delta[:, None])
    if SOFTCAP:
        ds *= _slope(s, softcap)
    return p, ds


@triton.jit
def _rows_of(lse, delta, query, T):
    """lse in units of log 2 and delta; queries that see nothing or aren't there get an lse that makes p 0."""
    b_lse = tl.load(lse + query, mask=query < T, other=float("-inf"))
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse * _LOG2E)
    return b_lse, tl.load(delta + query, mask=query < T, other=0.0)


@triton.jit
def _backward_dq(
    q, k, v, visible_until, positions, largest_until, tree_start, grad_out, lse, delta, grad_q,
    q_token, q_head, k_token, k_head, v_token, v_head, grad_token, grad_head, scale, softcap, window, T, heads, group,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE_WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    first_query = (tl.num_programs(1) - 1 - tl.program_id(1)) * QUERIES
    end_query = tl.minimum(first_query + QUERIES, T)
    query = first_query + tl.arange(0, QUERIES)
    b_q = _load(q + head * q_head, first_query, q_token, T, QUERIES, WIDTH, BLOCK_WIDTH)
    grad_out += head * grad_head
    b_grad = _load(grad_out, first_query, grad_token, T, QUERIES, VALUE_WIDTH, BLOCK_VALUE_WIDTH)
    b_lse, b_delta = _rows_of(lse + head * T, delta + head * T, query, T)
    k += head // group * k_head
    v += head // group * v_head
    dq = tl.zeros([QUERIES, BLOCK_WIDTH], tl.float32)
    begin = tl.load(tree_start + first_query // _GRAIN) // KEYS * KEYS
    while begin < end_query:
        end = _run_end(largest_until, first_query, end_query, begin, KEYS)
        for first_key in range(begin, end, KEYS):
            b_k = _load(k, first_key, k_token, T, KEYS, WIDTH, BLOCK_WIDTH)
            b_v = _load(v, first_key, v_token, T, KEYS, VALUE_WIDTH, BLOCK_VALUE_WIDTH)
            _, ds = _score_gradient(
                b_q, b_k, b_v, b_grad, b_lse, b_delta, query, first_key + tl.arange(0, KEYS), visible_until, positions,
                scale, softcap, window, T, SOFTCAP, WINDOW,
            )  # fmt: skip
            dq = tl.dot(ds.to(b_k.dtype), b_k, dq, input_precision="ieee")
        begin = _run_start(largest_until, first_query, end_query, end, KEYS)
    _store(grad_q + head * WIDTH, dq * scale, first_query, heads * WIDTH, T, QUERIES, WIDTH, BLOCK_WIDTH)


@triton.jit
def _backward_dkv(
    q, k, v, visible_until, positions, grad_out, lse, delta, grad_k, grad_v,
    q_token, q_head, k_token, k_head, v_token, v_head, grad_token, grad_head, scale, softcap, window, T, key_heads,
    group,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE_WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    key_head = tl.program_id(0).to(tl.int64)
    first_key = tl.program_id(1) * KEYS  # the first blocks have the most queries
    key = first_key + tl.arange(0, KEYS)
    b_k = _load(k + key_head * k_head, first_key, k_token, T, KEYS, WIDTH, BLOCK_WIDTH)
    b_v = _load(v + key_head * v_head, first_key, v_token, T, KEYS, VALUE_WIDTH, BLOCK_VALUE_WIDTH)
    last = tl.max(tl.load(visible_until + key, mask=key < T, other=0), 0)
    dk = tl.zeros([KEYS, BLOCK_WIDTH], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_VALUE_WIDTH], tl.float32)
    for member in range(0, group):
        head = key_head * group + member
        for first_query in range(first_key, last, QUERIES):
            b_q = _load(q + head * q_head, first_query, q_token, T, QUERIES, WIDTH, BLOCK_WIDTH)
            b_grad = _load(
                grad_out + head * grad_head, first_query, grad_token, T, QUERIES, VALUE_WIDTH, BLOCK_VALUE_WIDTH
            )
            query = first_query + tl.arange(0, QUERIES)
            b_lse, b_delta = _rows_of(lse + head * T, delta + head * T, query, T)
            p, ds = _score_gradient(
                b_q, b_k, b_v, b_grad, b_lse, b_delta, query, key, visible_until, positions,
                scale, softcap, window, T, SOFTCAP, WINDOW,
            )  # fmt: skip
            dv = tl.dot(tl.trans(p.to(b_q.dtype)), b_grad, dv, input_precision="ieee")
            dk = tl.dot(tl.trans(ds.to(b_q.dtype)), b_q, dk, input_precision="ieee")
    _store(grad_k + key_head * WIDTH, dk * scale, first_key, key_heads * WIDTH, T, KEYS, WIDTH, BLOCK_WIDTH)
    grad_v += key_head * VALUE_WIDTH
    _store(grad_v, dv, first_key, key_heads * VALUE_WIDTH, T, KEYS, VALUE_WIDTH, BLOCK_VALUE_WIDTH)


def packed_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_until: Tensor,
    positions: Tensor,
    schedule: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """(o, lse) as `posttrain.ops.packed_attention` needs them; window and softcap are 0 for none."""
    q, k, v = (_readable(x) for x in (q, k, v))
    tokens, heads, width = q.shape
    out = q.new_empty(tokens, heads, v.shape[2])
    lse = q.new_empty(heads, tokens, dtype=torch.float32)
    blocks = _blocks(FORWARD_BLOCKS, q, max(width, v.shape[2]))
    if q.numel():
        _forward[heads, triton.cdiv(tokens, blocks.queries)](
            q, k, v, visible_until, positions, *schedule.unbind(0), q if sinks is None else sinks, out, lse,
            *_strides(q, k, v), scale, softcap or 1.0, window, tokens, heads, heads // k.shape[1],
            softcap > 0, window > 0, sinks is not None, **_sizes(width, v.shape[2]), **_launch(blocks),
        )  # fmt: skip
    return out, lse


def packed_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_until: Tensor,
    positions: Tensor,
    schedule: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, and delta `[Hq, T]`."""
    grad_out, q, k, v = (_readable(x) for x in (grad_out, q, k, v))
    tokens, heads, width = q.shape
    value_width, key_heads = v.shape[2], k.shape[1]
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    if not q.numel():
        return grad_q, grad_k, grad_v, delta
    sizes, options = _sizes(width, value_width), (softcap > 0, window > 0)
    numbers = scale, softcap or 1.0, window, tokens
    dkv, dq = (_blocks(table, q, max(width, value_width)) for table in (DKV_BLOCKS, DQ_BLOCKS))
    strides = *_strides(q, k, v), *grad_out.stride()[:2]
    _delta[heads, triton.cdiv(tokens, 32)](
        out, grad_out, delta, *grad_out.stride()[:2], tokens, heads, value_width, sizes["BLOCK_VALUE_WIDTH"], 32
    )
    _backward_dkv[key_heads, triton.cdiv(tokens, dkv.keys)](
        q, k, v, visible_until, positions, grad_out, lse, delta, grad_k, grad_v,
        *strides, *numbers, key_heads, heads // key_heads, *options, **sizes, **_launch(dkv),
    )  # fmt: skip
    _backward_dq[heads, triton.cdiv(tokens, dq.queries)](
        q, k, v, visible_until, positions, *schedule.unbind(0), grad_out, lse, delta, grad_q,
        *strides, *numbers, heads, heads // key_heads, *options, **sizes, **_launch(dq),
    )  # fmt: skip
    return grad_q, grad_k, grad_v, delta


def _readable(x: Tensor) -> Tensor:
    """`x` with its last dimension contiguous."""
    return x if x.stride(2) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:2])


def _sizes(width: int, value_width: int) -> dict[str, int]:
    return {
        "WIDTH": width,
        "VALUE_WIDTH": value_width,
        "BLOCK_WIDTH": max(16, triton.next_power_of_2(width)),
        "BLOCK_VALUE_WIDTH": max(16, triton.next_power_of_2(value_width)),
    }


def _launch(blocks: Blocks) -> dict[str, int]:
    return {
        "QUERIES": blocks.queries,
        "KEYS": blocks.keys,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _blocks(table: dict[int, Blocks], like: Tensor, width: int) -> Blocks:
    return table[0 if like.dtype == torch.float32 else _width_class(width)]


def _width_class(width: int) -> int:
    return 64 if width <= 64 else 128 if width <= 128 else 256


def ahead_of_time() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """The kernels with their production block sizes, for tests/kernels/aot.py."""
    for dtype, width, rich in (("bf16", 64, False), ("bf16", 128, True), ("bf16", 256, False), ("fp32", 64, True)):
        tables = (_forward, FORWARD_BLOCKS), (_backward_dkv, DKV_BLOCKS), (_backward_dq, DQ_BLOCKS)
        for kernel, table in tables:
            blocks = table[width if dtype == "bf16" else 0]
            constants = {"SOFTCAP": rich, "WINDOW": rich, "SINKS": rich, **_sizes(width, width), **_launch(blocks)}
            options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
            constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
            types = {name: f"*{dtype}:16" for name in ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")}
            types |= {name: "*fp32:16" for name in ("lse", "delta", "sinks")} | {"scale": "fp32", "softcap": "fp32"}
            types |= dict.fromkeys(("visible_until", "positions"), "*i32:16")
            types |= dict.fromkeys(("largest_until", "tree_start"), "*i32")
            types |= dict.fromkeys(("window", "T", "heads", "key_heads", "group"), "i32")
            signature = {name: types.get(name, "i32:16") for name in kernel.arg_names if name not in constants}
            yield f"{kernel.__name__} {dtype} {width}{' rich' if rich else ''}", kernel, signature, constants, options
    constants = {"VALUE_WIDTH": 128, "BLOCK_VALUE_WIDTH": 128, "QUERIES": 32}
    types = {"out": "*bf16:16", "grad_out": "*bf16:16", "delta": "*fp32:16", "T": "i32", "heads": "i32"}
    signature = types | {"grad_token": "i32:16", "grad_head": "i32:16"}
    yield "_delta", _delta, {n: signature[n] for n in _delta.arg_names if n in signature}, constants, {"num_warps": 4}
