"""The Triton kernels of packed attention; kernels/packed_attention.py explains and launches them.

In the names of what is in registers, `b_q` is a block of q, and so on. `mask` is (visible_until, positions, window, T).
"""

import triton
import triton.language as tl

from posttrain.kernels.math import tanh
from posttrain.ops.layout import BLOCK

_GRAIN = tl.constexpr(BLOCK)
_SPAN = tl.constexpr(32)  # blocks of the schedule to look at together; more spill registers, a warp then shares them
_LOG2E = tl.constexpr(1.4426950408889634)


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
    """Scores, [queries, keys]; differences of them are taken before they go to base 2, as scores may be large."""
    raw = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFTCAP:
        return tanh(raw * (scale / softcap)) * softcap
    return raw * scale


@triton.jit
def _slope(s, softcap):
    """Derivative of the cap, 1 - tanh^2, from scores."""
    th = s * (1.0 / softcap)
    return 1.0 - th * th


@triton.jit
def _sees(query, key, mask, WINDOW: tl.constexpr):
    """Which of the queries see which of the keys, for a column and a row of them, in either order."""
    visible_until, positions, window, T = mask
    sees = (key <= query) & (query < tl.load(visible_until + key, mask=key < T, other=0))
    if WINDOW:
        query_position = tl.load(positions + query, mask=query < T, other=0)
        sees &= query_position - tl.load(positions + key, mask=key < T, other=0) < window
    return sees


@triton.jit
def _first(until, begin, end, bound, ABOVE: tl.constexpr):
    """The first block of the schedule from token `begin` on whose entry is at least `bound`, or (not ABOVE) is less.

    It looks at _SPAN blocks and gives the token after them, at most `end`, if there is none.
    """
    token = begin + tl.arange(0, _SPAN) * _GRAIN
    entry = tl.load(until + token // _GRAIN, mask=token < end, other=0)
    found = ((entry >= bound) == ABOVE) & (token < end)
    return tl.min(tl.where(found, token, tl.minimum(end, begin + _SPAN * _GRAIN)), 0)


@triton.jit
def forward_kernel(
    q, k, v, visible_until, positions, largest_until, smallest_until, tree_start, sinks, out, lse,
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
    mask = visible_until, positions, window, T
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    b_out = tl.zeros([QUERIES, BLOCK_VALUE_WIDTH], tl.float32)
    end_key = tl.cdiv(end_query, KEYS) * KEYS
    needed = _first(largest_until, tl.load(tree_start + first_query // _GRAIN), end_key, first_query + 1, True)
    while needed < end_key:
        begin = needed // KEYS * KEYS
        end = tl.cdiv(_first(largest_until, needed, end_key, first_query + 1, False), KEYS) * KEYS
        if WINDOW:
            full = begin
        else:
            full = _first(smallest_until, begin, tl.minimum(end, first_query), end_query, False)
            full = tl.maximum(begin, full) // KEYS * KEYS
        for masked in tl.static_range(2):
            for first_key in range(full if masked else begin, end if masked else full, KEYS):
                key = first_key + tl.arange(0, KEYS)
                b_k = _load(k, first_key, k_token, T, KEYS, WIDTH, BLOCK_WIDTH)
                s = _scores(b_q, b_k, scale, softcap, SOFTCAP)
                if masked:
                    s = tl.where(_sees(query[:, None], key[None, :], mask, WINDOW), s, float("-inf"))
                new_top = tl.maximum(top, tl.max(s, 1))
                reference = tl.where(new_top == float("-inf"), 0.0, new_top) if masked else new_top
                factor = tl.exp2((top - reference) * _LOG2E)
                p = tl.exp2((s - reference[:, None]) * _LOG2E)
                total = total * factor + tl.sum(p, 1)
                b_v = _load(v, first_key, v_token, T, KEYS, VALUE_WIDTH, BLOCK_VALUE_WIDTH)
                b_out = tl.dot(p.to(b_v.dtype), b_v, b_out * factor[:, None], input_precision="ieee")
                top = new_top
        needed = _first(largest_until, end, end_key, first_query + 1, True)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        new_top = tl.maximum(top, sink)
        factor = tl.exp2((top - new_top) * _LOG2E)
        total = total * factor + tl.exp2((sink - new_top) * _LOG2E)
        b_out *= factor[:, None]
        top = new_top
    seen = total > 0
    b_out = tl.where(seen[:, None], b_out / tl.where(seen, total, 1.0)[:, None], 0.0)
    b_lse = tl.where(seen, top + tl.log(tl.where(seen, total, 1.0)), float("-inf"))
    out += head * VALUE_WIDTH
    _store(out, b_out, first_query, heads * VALUE_WIDTH, T, QUERIES, VALUE_WIDTH, BLOCK_VALUE_WIDTH)
    tl.store(lse + head * T + query, b_lse, mask=query < T)


@triton.jit
def delta_kernel(
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
    a, b, grad_a, grad_b, lse, delta, query, key, mask, scale, softcap,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(p, ds), both [queries, keys] float32, or transposed with all operands changed over."""
    s = _scores(a, b, scale, softcap, SOFTCAP)
    shown = tl.where(_sees(query, key, mask, WINDOW), s, float("-inf")) if MASKED else s
    p = tl.exp2((shown - lse) * _LOG2E)
    ds = p * (tl.dot(grad_a, tl.trans(grad_b), input_precision="ieee") - delta)
    if SOFTCAP:
        ds *= _slope(s, softcap)
    return p, ds


@triton.jit
def _rows_of(lse, delta, query, T):
    """lse and delta; queries that see nothing or aren't there get an lse that makes p 0."""
    b_lse = tl.load(lse + query, mask=query < T, other=float("-inf"))
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    return b_lse, tl.load(delta + query, mask=query < T, other=0.0)


@triton.jit
def dq_kernel(
    q, k, v, visible_until, positions, largest_until, smallest_until, tree_start, grad_out, lse, delta, grad_q,
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
    mask = visible_until, positions, window, T
    dq = tl.zeros([QUERIES, BLOCK_WIDTH], tl.float32)
    end_key = tl.cdiv(end_query, KEYS) * KEYS
    needed = _first(largest_until, tl.load(tree_start + first_query // _GRAIN), end_key, first_query + 1, True)
    while needed < end_key:
        begin = needed // KEYS * KEYS
        end = tl.cdiv(_first(largest_until, needed, end_key, first_query + 1, False), KEYS) * KEYS
        if WINDOW:
            full = begin
        else:
            full = _first(smallest_until, begin, tl.minimum(end, first_query), end_query, False)
            full = tl.maximum(begin, full) // KEYS * KEYS
        for masked in tl.static_range(2):
            for first_key in range(full if masked else begin, end if masked else full, KEYS):
                key = first_key + tl.arange(0, KEYS)
                b_k = _load(k, first_key, k_token, T, KEYS, WIDTH, BLOCK_WIDTH)
                b_v = _load(v, first_key, v_token, T, KEYS, VALUE_WIDTH, BLOCK_VALUE_WIDTH)
                _, ds = _score_gradient(
                    b_q, b_k, b_grad, b_v, b_lse[:, None], b_delta[:, None], query[:, None], key[None, :], mask,
                    scale, softcap, SOFTCAP, WINDOW, masked,
                )  # fmt: skip
                dq = tl.dot(ds.to(b_k.dtype), b_k, dq, input_precision="ieee")
        needed = _first(largest_until, end, end_key, first_query + 1, True)
    _store(grad_q + head * WIDTH, dq * scale, first_query, heads * WIDTH, T, QUERIES, WIDTH, BLOCK_WIDTH)


@triton.jit
def dkv_kernel(
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
    until = tl.load(visible_until + key, mask=key < T, other=0)
    last, all_until = tl.max(until, 0), tl.min(until, 0)
    full = tl.minimum(first_key + tl.cdiv(KEYS, QUERIES) * QUERIES, last)
    skip = 0 if WINDOW else tl.maximum(all_until - full, 0) // QUERIES * QUERIES  # from `full` on, all see all
    mask = visible_until, positions, window, T
    dk = tl.zeros([KEYS, BLOCK_WIDTH], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_VALUE_WIDTH], tl.float32)
    for member in range(0, group):
        head = key_head * group + member
        for masked in tl.static_range(2):
            for place in range(first_key if masked else full, last - skip if masked else full + skip, QUERIES):
                first_query = tl.where(place < full, place, place + skip) if masked else place
                query = first_query + tl.arange(0, QUERIES)
                b_q = _load(q + head * q_head, first_query, q_token, T, QUERIES, WIDTH, BLOCK_WIDTH)
                b_grad = _load(
                    grad_out + head * grad_head, first_query, grad_token, T, QUERIES, VALUE_WIDTH, BLOCK_VALUE_WIDTH
                )
                b_lse, b_delta = _rows_of(lse + head * T, delta + head * T, query, T)
                p, ds = _score_gradient(
                    b_k, b_q, b_v, b_grad, b_lse[None, :], b_delta[None, :], query[None, :], key[:, None], mask,
                    scale, softcap, SOFTCAP, WINDOW, masked,
                )  # fmt: skip
                dv = tl.dot(p.to(b_q.dtype), b_grad, dv, input_precision="ieee")
                dk = tl.dot(ds.to(b_q.dtype), b_q, dk, input_precision="ieee")
    _store(grad_k + key_head * WIDTH, dk * scale, first_key, key_heads * WIDTH, T, KEYS, WIDTH, BLOCK_WIDTH)
    grad_v += key_head * VALUE_WIDTH
    _store(grad_v, dv, first_key, key_heads * VALUE_WIDTH, T, KEYS, VALUE_WIDTH, BLOCK_VALUE_WIDTH)
