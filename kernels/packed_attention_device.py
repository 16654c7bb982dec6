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
def _tile(x, first, token_stride, COUNT: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Rows of a head from `first` on, counted from there, columns, and addresses [COUNT, BLOCK_WIDTH]."""
    row = tl.arange(0, COUNT)[:, None]
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    return row, column, x + tl.cast(first, tl.int64) * token_stride + (row * token_stride + column)


@triton.jit
def _load(x, first, token_stride, T, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Rows of a head, zeros outside."""
    row, column, address = _tile(x, first, token_stride, COUNT, BLOCK_WIDTH)
    inside = row < T - first
    return tl.load(address, mask=inside if WIDTH == BLOCK_WIDTH else inside & (column < WIDTH), other=0.0)


@triton.jit
def _store(x, value, first, token_stride, T, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    row, column, address = _tile(x, first, token_stride, COUNT, BLOCK_WIDTH)
    inside = first + row < T  # written otherwise than in _load, or it is kept in registers from there to here
    tl.store(address, value.to(x.dtype.element_ty), mask=inside if WIDTH == BLOCK_WIDTH else inside & (column < WIDTH))


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
def _first(found, token, end):
    """The first token that was found, or `end`."""
    return tl.min(tl.where(found, token, end), 0)


@triton.jit
def _run(begin, first_query, end_query, end_key, farthest, schedule, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """(begin, full, end) of the next run of keys that some query sees, from `begin` on; before `full`, all see all.

    All are multiples of KEYS, and of _GRAIN but for the end of the last run. A run may be empty; it ends after `begin`.
    """
    largest_until, smallest_until, largest_position = schedule
    token = begin + tl.arange(0, _SPAN) * _GRAIN
    stop = tl.minimum(begin + _SPAN * _GRAIN, end_key)
    needed = tl.load(largest_until + token // _GRAIN, mask=token < stop, other=0) > first_query
    if WINDOW:
        position = tl.load(largest_position + token // _GRAIN, mask=token < stop, other=0)
        needed &= (position > farthest) | (token + _GRAIN > first_query)
    begin = _first(needed, token, stop)
    end = tl.cdiv(_first((token > begin) & (needed == 0), token, stop), KEYS) * KEYS
    begin = begin // KEYS * KEYS
    full = begin
    if not WINDOW:
        partial = tl.load(smallest_until + token // _GRAIN, mask=token < stop, other=0) < end_query
        full = _first((token >= begin) & partial, token, stop)
        full = tl.maximum(begin, tl.minimum(tl.minimum(full, first_query), end) // KEYS * KEYS)
    return begin, full, end


@triton.jit
def _farthest(query, tree_start, largest_until, mask):
    """The largest position before the windows of all queries of the first one's tree."""
    _, positions, window, _ = mask
    tree_end = tl.load(largest_until + tree_start // _GRAIN)
    return tl.min(tl.load(positions + query, mask=query < tree_end, other=2147483647), 0) - window


@triton.jit
def forward_kernel(
    q, k, v, visible_until, positions, largest_until, smallest_until, largest_position, tree_start, sinks, out, lse,
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
    begin = tl.load(tree_start + first_query // _GRAIN)
    farthest = _farthest(query, begin, largest_until, mask) if WINDOW else 0
    schedule = largest_until, smallest_until, largest_position
    begin = begin // KEYS * KEYS
    while begin < end_key:
        begin, full, end = _run(begin, first_query, end_query, end_key, farthest, schedule, KEYS, WINDOW)
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
        begin = end
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        new_top = tl.maximum(top, sink)
        factor = tl.exp2((top - new_top) * _LOG2E)
        total = total * factor + tl.exp2((sink - new_top) * _LOG2E)
        b_out *= factor[:, None]
        top = new_top
    total = tl.where(total == 0, 1.0, total)
    b_out /= total[:, None]
    row = tl.arange(0, QUERIES)
    lse += 2 * head * T + first_query
    tl.store(lse + row, top, mask=row < T - first_query)
    tl.store(lse + T + row, tl.log(total), mask=row < T - first_query)
    out += head * VALUE_WIDTH
    _store(out, b_out, first_query, heads * VALUE_WIDTH, T, QUERIES, VALUE_WIDTH, BLOCK_VALUE_WIDTH)


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
    a, b, grad_a, grad_b, top, log_total, delta, query, key, mask, scale, softcap,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(p, ds), both [queries, keys] float32, or transposed with all operands changed over; log_total is in base 2."""
    s = _scores(a, b, scale, softcap, SOFTCAP)
    shown = tl.where(_sees(query, key, mask, WINDOW), s, float("-inf")) if MASKED else s
    p = tl.exp2((shown - top) * _LOG2E - log_total)
    ds = p * (tl.dot(grad_a, tl.trans(grad_b), input_precision="ieee") - delta)
    if SOFTCAP:
        ds *= _slope(s, softcap)
    return p, ds


@triton.jit
def _rows_of(lse, delta, head, first, T, QUERIES: tl.constexpr):
    """The two parts of lse, the second in base 2, and delta; queries that see nothing or aren't there get a p of 0."""
    row = tl.arange(0, QUERIES)
    inside = first + row < T
    lse += 2 * (head * T) + first
    top = tl.load(lse + row, mask=inside, other=float("-inf"))
    top = tl.where(top == float("-inf"), float("inf"), top)
    log_total = tl.load(lse + T + row, mask=inside, other=0.0) * _LOG2E
    return top, log_total, tl.load(delta + head * T + first + row, mask=inside, other=0.0)


@triton.jit
def dq_kernel(
    q, k, v, visible_until, positions, largest_until, smallest_until, largest_position, tree_start,
    grad_out, lse, delta, grad_q,
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
    b_top, b_log, b_delta = _rows_of(lse, delta, head, first_query, T, QUERIES)
    k += head // group * k_head
    v += head // group * v_head
    mask = visible_until, positions, window, T
    dq = tl.zeros([QUERIES, BLOCK_WIDTH], tl.float32)
    end_key = tl.cdiv(end_query, KEYS) * KEYS
    begin = tl.load(tree_start + first_query // _GRAIN)
    farthest = _farthest(query, begin, largest_until, mask) if WINDOW else 0
    schedule = largest_until, smallest_until, largest_position
    begin = begin // KEYS * KEYS
    while begin < end_key:
        begin, full, end = _run(begin, first_query, end_query, end_key, farthest, schedule, KEYS, WINDOW)
        for masked in tl.static_range(2):
            for first_key in range(full if masked else begin, end if masked else full, KEYS):
                key = first_key + tl.arange(0, KEYS)
                b_k = _load(k, first_key, k_token, T, KEYS, WIDTH, BLOCK_WIDTH)
                b_v = _load(v, first_key, v_token, T, KEYS, VALUE_WIDTH, BLOCK_VALUE_WIDTH)
                _, ds = _score_gradient(
                    b_q, b_k, b_grad, b_v, b_top[:, None], b_log[:, None], b_delta[:, None], query[:, None],
                    key[None, :], mask, scale, softcap, SOFTCAP, WINDOW, masked,
                )  # fmt: skip
                dq = tl.dot(ds.to(b_k.dtype), b_k, dq, input_precision="ieee")
        begin = end
    _store(grad_q + head * WIDTH, dq * scale, first_query, heads * WIDTH, T, QUERIES, WIDTH, BLOCK_WIDTH)


@triton.jit
def _window_end(begin, end, position, window, smallest_position):
    """Where the last block of the schedule ends that has a query whose window reaches back to `position`."""
    last = begin
    for first in range(begin // _GRAIN * _GRAIN, end, _SPAN * _GRAIN):
        token = first + tl.arange(0, _SPAN) * _GRAIN
        smallest = tl.load(smallest_position + token // _GRAIN, mask=token < end, other=0)
        last = tl.maximum(last, tl.max(tl.where((token < end) & (smallest - position < window), token + _GRAIN, 0), 0))
    return tl.minimum(last, end)


@triton.jit
def dkv_kernel(
    q, k, v, visible_until, positions, smallest_position, grad_out, lse, delta, grad_k, grad_v,
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
    if WINDOW:
        last = _window_end(
            first_key, last, tl.max(tl.load(positions + key, mask=key < T, other=0), 0), window, smallest_position
        )
    full = tl.minimum(first_key + tl.cdiv(KEYS, QUERIES) * QUERIES, last)
    skip = 0 if WINDOW else tl.maximum(all_until - full, 0) // QUERIES * QUERIES  # from `full` on, all see all
    mask = visible_until, positions, window, T
    dk = tl.zeros([KEYS, BLOCK_WIDTH], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_VALUE_WIDTH], tl.float32)
    for member in range(0, group):
        head = (tl.program_id(0) * group + member).to(tl.int64)
        for masked in tl.static_range(2):
            for place in range(first_key if masked else full, last - skip if masked else full + skip, QUERIES):
                first_query = tl.where(place < full, place, place + skip) if masked else place
                query = first_query + tl.arange(0, QUERIES)
                b_q = _load(q + head * q_head, first_query, q_token, T, QUERIES, WIDTH, BLOCK_WIDTH)
                b_grad = _load(
                    grad_out + head * grad_head, first_query, grad_token, T, QUERIES, VALUE_WIDTH, BLOCK_VALUE_WIDTH
                )
                b_top, b_log, b_delta = _rows_of(lse, delta, head, first_query, T, QUERIES)
                p, ds = _score_gradient(
                    b_k, b_q, b_v, b_grad, b_top[None, :], b_log[None, :], b_delta[None, :], query[None, :],
                    key[:, None], mask, scale, softcap, SOFTCAP, WINDOW, masked,
                )  # fmt: skip
                dv = tl.dot(p.to(b_q.dtype), b_grad, dv, input_precision="ieee")
                dk = tl.dot(ds.to(b_q.dtype), b_q, dk, input_precision="ieee")
    _store(grad_k + key_head * WIDTH, dk * scale, first_key, key_heads * WIDTH, T, KEYS, WIDTH, BLOCK_WIDTH)
    grad_v += key_head * VALUE_WIDTH
    _store(grad_v, dv, first_key, key_heads * VALUE_WIDTH, T, KEYS, VALUE_WIDTH, BLOCK_VALUE_WIDTH)
