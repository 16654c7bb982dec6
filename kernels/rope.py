"""Triton kernel of the rotary position embedding (posttrain/ops/rope.py derives the formula).

One program takes one token and up to `HEADS` heads of q or of k, so one launch turns both; in float32.
"""

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.entry import Entry
from posttrain.ops.backend import cuda_device

HEADS = 16
WARPS = 4


@triton.jit
def _turn_heads(
    x,
    y,
    x_batch,
    x_head,
    x_token,
    y_batch,
    y_head,
    y_token,
    cos_a,
    cos_b,
    sin_a,
    sin_b,
    batch,
    token,
    first_head,
    heads,
    half,
    width,
    TRANSPOSED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    head = (first_head + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    x += batch * x_batch + token * x_token + head * x_head  # [HEADS, 1]
    y += batch * y_batch + token * y_token + head * y_head
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    a = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + half + column, mask=inside, other=0.0).to(tl.float32)
    if TRANSPOSED:
        u = a * cos_a + b * sin_b
        v = b * cos_b - a * sin_a
    else:
        u = a * cos_a - b * sin_a
        v = b * cos_b + a * sin_b
    tl.store(y + column, u, mask=inside)
    tl.store(y + half + column, v, mask=inside)
    if REST > 0:
        column = 2 * half + tl.arange(0, REST)[None, :]
        inside = (head < heads) & (column < width)
        tl.store(y + column, tl.load(x + column, mask=inside), mask=inside)


@triton.jit
def _turn(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    q_out_batch,
    q_out_head,
    q_out_token,
    k_out_batch,
    k_out_head,
    k_out_token,
    angle_batch,
    tokens,
    q_heads,
    k_heads,
    half,
    width,
    TRANSPOSED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    column = tl.arange(0, HALF)[None, :]
    angle = batch * angle_batch + token * 2 * half + column
    inside = column < half
    cos_a = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    cos_b = tl.load(cos + half + angle, mask=inside, other=0.0).to(tl.float32)
    sin_a = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    sin_b = tl.load(sin + half + angle, mask=inside, other=0.0).to(tl.float32)
    first_head = tl.program_id(1) * HEADS
    first_k_block = tl.cdiv(q_heads, HEADS)
    if tl.program_id(1) < first_k_block:
        # fmt: off
        _turn_heads(
            q, q_out, q_batch, q_head, q_token, q_out_batch, q_out_head, q_out_token, cos_a, cos_b, sin_a, sin_b,
            batch, token, first_head, q_heads, half, width, TRANSPOSED, HEADS, HALF, REST,
        )
    else:
        _turn_heads(
            k,
            k_out,
            k_batch,
            k_head,
            k_token,
            k_out_batch,
            k_out_head,
            k_out_token,
            cos_a,
            cos_b,
            sin_a,
            sin_b,
            batch,
            token,
            first_head - first_k_block * HEADS,
            k_heads,
            half,
            width,
            TRANSPOSED,
            HEADS,
            HALF,
            REST,
        )
        # fmt: on


def turn(inputs: Sequence[Tensor], outputs: Sequence[Tensor], cos: Tensor, sin: Tensor, transposed: bool) -> None:
    """Turn q and k `[B, heads, T, D]`, strided with contiguous heads, by cos and sin `[B or 1, T, R]`, contiguous."""
    (q, k), (q_out, k_out) = inputs, outputs
    batch, _, tokens, width = q.shape
    rotated = cos.shape[-1]
    blocks = triton.cdiv(q.shape[1], HEADS) + triton.cdiv(k.shape[1], HEADS)
    if batch * tokens * blocks * width == 0:
        return
    with cuda_device(q):
        _turn[batch * tokens, blocks](
            q,
            k,
            q_out,
            k_out,
            cos,
            sin,
            *q.stride()[:3],
            *k.stride()[:3],
            *q_out.stride()[:3],
            *k_out.stride()[:3],
            tokens * rotated if cos.shape[0] > 1 else 0,
            tokens,
            q.shape[1],
            k.shape[1],
            rotated // 2,
            width,
            transposed,
            HEADS,
            max(triton.next_power_of_2(rotated // 2), 1),
            triton.next_power_of_2(width - rotated) if width > rotated else 0,
            num_warps=WARPS,
        )


def ahead_of_time() -> Iterator[Entry]:
    """The kernel with its production block sizes, for tests/kernels/aot.py."""
    views = [f"{x}_{dim}" for x in ("q", "k", "q_out", "k_out") for dim in ("batch", "head", "token")]
    sizes = ["angle_batch", "tokens", "q_heads", "k_heads", "half", "width"]
    integers = dict.fromkeys(views, "i32:16") | dict.fromkeys(sizes, "i32")
    for dtype in ("bf16", "fp32"):
        tensors = dict.fromkeys(("q", "k", "q_out", "k_out", "cos", "sin"), f"*{dtype}:16")
        for half, rest in ((64, 0), (48, 32), (128, 0)):
            constants = {
                "TRANSPOSED": False,
                "HEADS": HEADS,
                "HALF": triton.next_power_of_2(half),
                "REST": rest,
            }
            yield f"turn {dtype} {half} + {rest}", _turn, tensors | integers, constants, {"num_warps": WARPS}
