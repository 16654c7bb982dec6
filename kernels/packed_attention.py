"""Packed attention on a GPU (posttrain/ops/packed_attention.py has the formulas).

The kernels are in packed_attention_device.py; here are the method, the choice of tiles, and the launches.

Forward and dQ: a program owns a block of queries under one head and walks the key blocks from the start of its first
query's tree to its last query, in runs. It passes over the blocks that no query sees: those whose largest
`visible_until` is at most its first query, and those whose largest position lies before every window. A run begins with
blocks that every query sees (before the first query, and with a smallest `visible_until` at or after the last one's
end), which need no mask: the whole of a long sequence but its diagonal, or a shared prompt. dK/dV: a program owns a
block of keys under one key head and walks the queries from its first key to its largest `visible_until`, a contiguous
range, for every query head of the group; those between its last key and its smallest `visible_until` need no mask and
come first. So sums have one order, and nothing is added by two programs. With a window, every block is masked, and
dK/dV ends after the last block with a query whose window reaches its keys.

lse is kept as the largest score and the log of the sum, which are added nowhere: one float32 for both would lose, of
scores around 10,000, what the probabilities of the backward need. float64 is slow on GPUs for gaming.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from posttrain.kernels import packed_attention_device as kernels
from posttrain.kernels.entry import Entry
from posttrain.ops.backend import cuda_device
from posttrain.ops.block_sizes import capability_of, chosen, newest


class Blocks(NamedTuple):
    """Queries and keys of a block."""

    queries: int
    keys: int
    warps: int
    stages: int


# Compute capability -> width of the heads -> block, for half precision: the largest tried that don't spill with
# Triton 3.6 and 3.8 (tests/kernels/aot.py). A device takes the row of the newest capability that is not above its own.
FORWARD = {
    80: {64: Blocks(128, 64, 8, 2), 128: Blocks(128, 64, 8, 2), 256: Blocks(64, 32, 8, 2)},
    86: {64: Blocks(128, 32, 8, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(64, 32, 8, 2)},
    90: {64: Blocks(128, 128, 8, 2), 128: Blocks(128, 64, 8, 3), 256: Blocks(64, 32, 8, 2)},
    100: {64: Blocks(128, 64, 8, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(64, 32, 8, 2)},
    120: {64: Blocks(128, 32, 8, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(64, 32, 8, 2)},
}
DKV = {
    80: {64: Blocks(32, 64, 8, 1), 128: Blocks(64, 64, 8, 1), 256: Blocks(32, 32, 8, 1)},
    90: {64: Blocks(32, 128, 8, 2), 128: Blocks(32, 128, 8, 1), 256: Blocks(32, 32, 8, 1)},
    100: {64: Blocks(64, 128, 8, 1), 128: Blocks(32, 128, 8, 1), 256: Blocks(32, 32, 8, 1)},
    120: {64: Blocks(32, 64, 8, 1), 128: Blocks(64, 64, 8, 1), 256: Blocks(32, 32, 8, 1)},
}
DQ = {
    80: {64: Blocks(64, 64, 8, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(64, 32, 8, 1)},
    86: {64: Blocks(64, 32, 8, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(64, 32, 8, 1)},
    90: {64: Blocks(128, 64, 8, 2), 128: Blocks(128, 64, 8, 2), 256: Blocks(32, 32, 8, 1)},
    100: {64: Blocks(128, 64, 8, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(64, 32, 8, 1)},
    120: {64: Blocks(64, 32, 8, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(64, 32, 8, 1)},
}
# The same for float32, on every device.
FLOAT_FORWARD = {64: Blocks(32, 32, 8, 2), 128: Blocks(32, 16, 4, 1), 256: Blocks(32, 16, 8, 1)}
FLOAT_DKV = {64: Blocks(32, 32, 8, 1), 128: Blocks(32, 32, 8, 1), 256: Blocks(16, 16, 8, 1)}
FLOAT_DQ = {64: Blocks(32, 32, 8, 2), 128: Blocks(32, 32, 8, 2), 256: Blocks(16, 16, 4, 1)}
DELTA_QUERIES = 32


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
    """(o, lse `[Hq, 2, T]`, whose two parts add up to it); window and softcap are 0 for none."""
    q, k, v = (_readable(x) for x in (q, k, v))
    tokens, heads, width = q.shape
    out = q.new_empty(tokens, heads, v.shape[2])
    lse = q.new_empty(heads, 2, tokens, dtype=torch.float32)
    blocks = _blocks("forward", FLOAT_FORWARD, FORWARD, q, v)
    if q.numel():
        with cuda_device(q):
            kernels.forward_kernel[heads, triton.cdiv(tokens, blocks.queries)](
                q, k, v, visible_until, positions, *schedule[:4], q if sinks is None else sinks, out, lse,
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
    delta = q.new_empty(heads, tokens, dtype=torch.float32)
    if not q.numel():
        return grad_q, grad_k, grad_v, delta
    sizes, options = _sizes(width, value_width), (softcap > 0, window > 0)
    numbers = scale, softcap or 1.0, window, tokens
    dkv, dq = _blocks("dkv", FLOAT_DKV, DKV, q, v), _blocks("dq", FLOAT_DQ, DQ, q, v)
    strides = *_strides(q, k, v), *grad_out.stride()[:2]
    with cuda_device(q):
        kernels.delta_kernel[heads, triton.cdiv(tokens, DELTA_QUERIES)](
            out, grad_out, delta, *grad_out.stride()[:2], tokens, heads,
            value_width, sizes["BLOCK_VALUE_WIDTH"], DELTA_QUERIES,
        )  # fmt: skip
        kernels.dkv_kernel[key_heads, triton.cdiv(tokens, dkv.keys)](
            q, k, v, visible_until, positions, schedule[4], grad_out, lse, delta, grad_k, grad_v,
            *strides, *numbers, key_heads, heads // key_heads, *options, **sizes, **_launch(dkv),
        )  # fmt: skip
        kernels.dq_kernel[heads, triton.cdiv(tokens, dq.queries)](
            q, k, v, visible_until, positions, *schedule[:4], grad_out, lse, delta, grad_q,
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


def _blocks(
    kernel: str, float_blocks: dict[int, Blocks], blocks: dict[int, dict[int, Blocks]], q: Tensor, v: Tensor
) -> Blocks:
    """Block for a problem: it depends on the device, the dtype and the width of the heads, never on T."""
    width = max(q.shape[2], v.shape[2])
    if width > 256:
        raise ValueError(
            f"packed_attention: the backend triton takes heads of up to 256 wide, got q {list(q.shape)} and "
            f'v {list(v.shape)}; use_backend("reference", "packed_attention") computes any width'
        )
    width = 64 if width <= 64 else 128 if width <= 128 else 256
    if q.dtype == torch.float32:
        return float_blocks[width]
    capability = capability_of(q.device) if q.is_cuda else 80
    return chosen(f"packed_attention {kernel} {width}", newest(blocks, capability)[width], q.device)


def ahead_of_time() -> Iterator[Entry]:
    """The kernels with their production block sizes, for tests/kernels/aot.py."""
    for kernel, half, single in (
        (kernels.forward_kernel, FORWARD, FLOAT_FORWARD),
        (kernels.dkv_kernel, DKV, FLOAT_DKV),
        (kernels.dq_kernel, DQ, FLOAT_DQ),
    ):
        for capability in half:
            blocks = newest(half, capability)
            yield _compiled(kernel, "bf16", 64, blocks[64], capability)
            yield _compiled(kernel, "bf16", 128, blocks[128], capability)
            yield _compiled(kernel, "bf16", 256, blocks[256], capability, "window softcap")  # Gemma 2
            yield _compiled(kernel, "fp16", 128, blocks[128], capability, "window softcap sinks")
            if kernel is kernels.forward_kernel:
                yield _compiled(kernel, "bf16", 64, blocks[64], capability, "window sinks")  # GPT-OSS
        for width in (64, 128, 256):
            yield _compiled(kernel, "bf16", width, newest(half, 89)[width], 89)  # block sizes of an older one
        for width, blocks in single.items():  # on sm_90, where float32 spills first
            yield _compiled(kernel, "fp32", width, blocks, 90, "softcap sinks")
    sizes = {"VALUE_WIDTH": 128, "BLOCK_VALUE_WIDTH": 128, "QUERIES": DELTA_QUERIES}
    yield "delta_kernel", kernels.delta_kernel, _signature(kernels.delta_kernel, "bf16", sizes), sizes, {"num_warps": 4}


def _compiled(kernel, dtype: str, width: int, blocks: Blocks, capability: int, features: str = "") -> Entry:
    """One entry."""
    constants = {name: name.lower() in features for name in ("SOFTCAP", "WINDOW", "SINKS")}
    constants |= _sizes(width, width) | _launch(blocks)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")} | {"capability": capability}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    name = f"{kernel.__name__} {dtype} {width} {features}".strip()
    return name, kernel, _signature(kernel, dtype, constants), constants, options


_SCHEDULE = "largest_until", "smallest_until", "largest_position", "tree_start", "smallest_position"


def _signature(kernel, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    types = {name: f"*{dtype}:16" for name in ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")}
    types |= {name: "*fp32:16" for name in ("lse", "delta", "sinks")} | {"scale": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(("visible_until", "positions"), "*i32:16")
    types |= dict.fromkeys(_SCHEDULE, "*i32")
    types |= dict.fromkeys(("window", "T", "heads", "key_heads", "group"), "i32")
    return {name: types.get(name, "i32:16") for name in kernel.arg_names if name not in constants}
