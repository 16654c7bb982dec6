"""The Triton kernel of sampling; kernels/sample.py explains and launches it."""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _log(x):
    """log x to 2 ulp for normal x > 0, also near 1, where the hardware's logarithm loses what is drawn from.

    x = m 2^e with m in [sqrt(1/2), sqrt(2)), and log m from a polynomial.
    """
    bits = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (bits >> 23).to(tl.float32)
    z = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = -7.63447439e-2
    p = p * z + 1.27615682e-1
    p = p * z - 1.31601866e-1
    p = p * z + 1.42017595e-1
    p = p * z - 1.66233571e-1
    p = p * z + 2.00012268e-1
    p = p * z - 2.50008210e-1
    p = p * z + 3.33333317e-1
    square = z * z
    return e * 0.693359375 + ((e * -2.12194440e-4 + (p * z * square - square * 0.5)) + z)


@triton.jit
def _z(row, i):
    """(logit - top) / temperature, minus infinity beyond the vocabulary."""
    logits, size, top, inverse = row
    x = tl.load(logits + i, mask=i < size, other=float("-inf")).to(tl.float32)
    return (x - top) * inverse


@triton.jit
def _above(row, limit, BLOCK: tl.constexpr):
    """How many tokens have z > limit, and their weight."""
    counts = tl.zeros([BLOCK], tl.int32)
    weights = tl.zeros([BLOCK], tl.float32)
    for first in range(0, row[1], BLOCK):
        z = _z(row, first + tl.arange(0, BLOCK))
        above = z > limit
        counts += above.to(tl.int32)
        weights += tl.where(above, tl.exp2(z * _LOG2E), 0.0)
    return tl.sum(counts, 0), tl.sum(weights, 0)


@triton.jit
def _ordered(z):
    """int32 in the order of the floats."""
    bits = z.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _weight_of_largest(row, k, BLOCK: tl.constexpr):
    """Weight of the k largest z and of all equal to the last of them, whose number is found bit by bit."""
    kth = tl.cast(-2147483648, tl.int64)
    step = tl.cast(2147483648, tl.int64)
    for _ in range(32):
        counts = tl.zeros([BLOCK], tl.int32)
        for first in range(0, row[1], BLOCK):
            i = first + tl.arange(0, BLOCK)
            counts += ((_ordered(_z(row, i)) >= kth + step) & (i < row[1])).to(tl.int32)
        kth = tl.where(tl.sum(counts, 0) >= k, kth + step, kth)
        step = step // 2
    weights = tl.zeros([BLOCK], tl.float32)
    for first in range(0, row[1], BLOCK):
        z = _z(row, first + tl.arange(0, BLOCK))
        weights += tl.where(_ordered(z) >= kth, tl.exp2(z * _LOG2E), 0.0)
    return tl.sum(weights, 0)


@triton.jit
def _draw(row, limit, floor, seed, offset, noise, BLOCK: tl.constexpr):
    """The first token with the largest z + noise g among those with z > limit and z >= floor."""
    best = tl.full([BLOCK // 4], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK // 4], tl.int32)
    low = (offset & 0xFFFFFFFF).to(tl.uint32)
    high = ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for first in range(0, row[1], BLOCK):
        counter = first // 4 + tl.arange(0, BLOCK // 4)
        words = tl.philox(seed, counter.to(tl.uint32), (counter * 0).to(tl.uint32), low, high)
        for w in tl.static_range(4):
            token = counter // 16 * 64 + w * 16 + counter % 16
            z = _z(row, token)
            u = ((words[w] >> 9).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
            value = z - noise * _log(-_log(u))
            better = (z > limit) & (z >= floor) & (value > best)
            best = tl.where(better, value, best)
            where = tl.where(better, token, where)
    return tl.min(tl.where(best == tl.max(best, 0), where, 2147483647), 0)


@triton.jit
def sample_kernel(
    logits, temperature, top_k, top_p, min_p, seeds, offsets, tokens, logprobs, stride, size, BLOCK: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    logits += r * stride
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    sick = tl.zeros([BLOCK], tl.int32)
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        x = tl.load(logits + i, mask=i < size, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, x)
        sick |= (x != x).to(tl.int32)
    top = tl.max(largest, 0)
    healthy = (tl.max(sick, 0) == 0) & (top > float("-inf")) & (top < float("inf"))
    t = tl.load(temperature + r)
    drawn = t > 0
    row = logits, size, top, 1.0 / tl.where(drawn, t, 1.0)
    _, total = _above(row, float("-inf"), BLOCK)
    k = tl.where(drawn, tl.load(top_k + r), 0)
    by_count = (k > 0) & (k < size)
    p = tl.where(drawn, tl.load(top_p + r), 1.0)
    by_weight = p < 1.0
    m = tl.load(min_p + r)
    floor = tl.where(drawn & (m > 0), _log(tl.where(m > 0, m, 1.0)), float("-inf"))
    share = p * total
    if healthy & by_count & by_weight:
        share = p * _weight_of_largest(row, k, BLOCK)
    noise = tl.where(drawn, 1.0, 0.0)
    seed, offset = tl.load(seeds + r), tl.load(offsets + r)
    limit = top * 0 + float("-inf")
    token = tl.cast(0, tl.int32)
    searching = healthy
    while searching:
        token = _draw(row, limit, floor, seed, offset, noise, BLOCK)
        limit = _z(row, token)
        searching = by_count | by_weight
        if searching:
            count, weight = _above(row, limit, BLOCK)
            searching = (count > 0) & ((by_count & (count >= k)) | (by_weight & (weight >= share)))
    logprob = _z(row, token) - _log(total)
    tl.store(tokens + r, token.to(tl.int64))
    tl.store(logprobs + r, tl.where(healthy, logprob, float("nan")))
