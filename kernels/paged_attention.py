"""Paged attention on a GPU (posttrain/ops/paged_attention.py has the formulas).

A program owns a tile of rows, a few queries of a sequence under the heads of one key head, and walks the sequence's
pages. Decoding, one query for each sequence, splits the keys into ranges of SPLIT positions, which have programs of
their own and are merged in order: the ranges depend on positions only, so that a result does not depend on the batch.
Chunks of prompts have enough rows without that. Where tiles lie is found on the device, for at most T / QUERIES + S of
them, so that nothing waits for the lengths.

Decoding, most rows of a tile would be empty. Neighbours in the batch that have the same pages in a whole split, as
completions of a prompt do, are one tile there and read them once: as many as fill its rows, from fixed numbers on, so
nothing is planned. Where they have other pages each has a tile, and what happens to a row is the same.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from posttrain.kernels import paged_attention_device as kernels
from posttrain.kernels.entry import Entry
from posttrain.ops.backend import cuda_device
from posttrain.ops.block_sizes import chosen

SPLIT = 512


class Blocks(NamedTuple):
    """Rows and keys of a tile."""

    rows: int
    keys: int
    warps: int
    stages: int


# By the width of the heads, for half precision and for float32: what spills on no architecture with Triton 3.6 and 3.8.
DECODE = {64: Blocks(16, 32, 4, 2), 128: Blocks(16, 64, 4, 2), 256: Blocks(16, 32, 4, 2)}
CHUNK = {64: Blocks(64, 64, 8, 2), 128: Blocks(64, 32, 4, 2), 256: Blocks(32, 32, 4, 1)}
FLOAT_DECODE = {64: Blocks(16, 16, 4, 1), 128: Blocks(16, 16, 8, 1), 256: Blocks(16, 16, 8, 1)}
FLOAT_CHUNK = {64: Blocks(32, 32, 8, 1), 128: Blocks(32, 16, 4, 1), 256: Blocks(16, 16, 4, 1)}


def attend(
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
) -> Tensor:
    """`posttrain.ops.paged_attention`; window and softcap are 0 for none."""
    q, key_cache, value_cache, block_table = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, key_cache, value_cache, block_table)
    )
    context_lens = context_lens.contiguous()
    tokens, heads, width = q.shape
    page_size, key_heads = key_cache.shape[1:3]
    out = q.new_empty(q.shape)
    if not q.numel():
        return out
    decode = query_lens is None
    rows, keys, warps, stages = _blocks(q, heads // key_heads, decode)
    queries = rows // (heads // key_heads)
    splits = triton.cdiv(block_table.shape[1] * page_size, SPLIT) if decode else 1
    tiles = [context_lens] * 4 if query_lens is None else _tiles(query_lens, tokens, queries)
    parts = [q.new_empty(tokens * heads * splits * size * decode, dtype=torch.float32) for size in (width, 1, 1)]
    sinks_or_any = q if sinks is None else sinks.contiguous()
    constants = {"SINKS": sinks is not None, "WIDTH": width, "BLOCK_WIDTH": _power(width), "SPLIT": SPLIT}
    with cuda_device(q):
        kernels.attend_kernel[tokens if decode else len(tiles[1]), key_heads, splits](
            q, key_cache, value_cache, block_table, context_lens, *tiles, sinks_or_any, out, *parts,
            *q.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3], block_table.stride(0),
            scale, softcap or 1.0, window, heads, splits,
            GROUP=heads // key_heads, SOFTCAP=softcap > 0, WINDOW=window > 0, DECODE=decode, PAGE=page_size,
            QUERIES=queries, ROWS=rows, KEYS=keys, num_warps=warps, num_stages=stages, **constants,
        )  # fmt: skip
        if decode:
            kernels.merge_kernel[tokens, heads](
                *parts, context_lens, sinks_or_any, out, heads, splits, num_warps=1, **constants
            )
    return out


def _tiles(query_lens: Tensor, tokens: int, queries: int) -> list[Tensor]:
    """query_lens, and of each tile its sequence, its first query there, and the token of that.

    There are at most tokens // queries + S tiles; those too many begin after the last sequence's end.
    """
    tiles = (query_lens + queries - 1) // queries
    ends = tiles.cumsum(0)
    index = torch.arange(tokens // queries + len(query_lens), device=query_lens.device)
    sequence = torch.searchsorted(ends, index, right=True).clamp(max=len(query_lens) - 1)
    first = (index - (ends - tiles)[sequence]) * queries
    token = (query_lens.cumsum(0) - query_lens)[sequence] + first
    return [query_lens.contiguous(), *(x.int() for x in (sequence, first, token))]


def _power(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _blocks(q: Tensor, group: int, decode: bool) -> Blocks:
    """Of the dtype, the width and the group alone, never of T."""
    width = q.shape[2]
    if width > 256:
        raise ValueError(
            f"paged_attention: the backend triton takes heads of up to 256 wide, got q {list(q.shape)}; "
            'use_backend("reference", "paged_attention") computes any width'
        )
    single = q.dtype == torch.float32
    table = (FLOAT_DECODE if single else DECODE) if decode else (FLOAT_CHUNK if single else CHUNK)
    width = 64 if width <= 64 else 128 if width <= 128 else 256
    blocks = table[width]
    if not single:
        blocks = chosen(f"paged_attention {'decode' if decode else 'chunk'} {width}", blocks, q.device)
    return blocks._replace(rows=max(blocks.rows, _power(group)))


def ahead_of_time() -> Iterator[Entry]:
    """The kernels with their production block sizes, for tests/kernels/aot.py."""
    for decode, half, single in ((True, DECODE, FLOAT_DECODE), (False, CHUNK, FLOAT_CHUNK)):
        for width, blocks in half.items():
            yield _compiled("bf16", width, blocks, decode, "SOFTCAP WINDOW SINKS" if width != 128 else "")
        for width, blocks in single.items():  # on sm_90, where float32 spills first
            name, kernel, signature, constants, options = _compiled(
                "fp32", width, blocks, decode, "SOFTCAP WINDOW SINKS"
            )
            yield name, kernel, signature, constants, options | {"capability": 90}
    sizes = {"SINKS": True, "WIDTH": 128, "BLOCK_WIDTH": 128, "SPLIT": SPLIT}
    yield "merge_kernel", kernels.merge_kernel, _signature(kernels.merge_kernel, "bf16", sizes), sizes, {"num_warps": 1}


def _compiled(dtype: str, width: int, blocks: Blocks, decode: bool, features: str) -> Entry:
    """One entry, for groups of 4 heads and pages of 16."""
    constants: dict[str, Any] = {name: name in features for name in ("SOFTCAP", "WINDOW", "SINKS")}
    constants |= {"GROUP": 4, "DECODE": decode, "WIDTH": width, "BLOCK_WIDTH": width, "PAGE": 16, "SPLIT": SPLIT}
    constants |= {"ROWS": blocks.rows, "QUERIES": blocks.rows // 4, "KEYS": blocks.keys}
    name = f"attend_kernel {dtype} {width} {'decode' if decode else 'chunk'} {features}".strip()
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return name, kernels.attend_kernel, _signature(kernels.attend_kernel, dtype, constants), constants, options


def _signature(kernel, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    types = {name: f"*{dtype}:16" for name in ("q", "key_cache", "value_cache", "out")}
    types |= dict.fromkeys(("part_out", "part_top", "part_total", "sinks"), "*fp32:16")
    tables = ("block_table", "context_lens", "query_lens", "tile_sequence", "tile_query", "tile_token")
    types |= dict.fromkeys(tables, "*i32:16") | {"scale": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(("window", "heads", "splits", "table_row"), "i32")
    return {name: types.get(name, "i32:16") for name in kernel.arg_names if name not in constants}
