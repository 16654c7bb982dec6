"""The Triton kernels of paged attention; kernels/paged_attention.py explains and launches them."""

import triton
import triton.language as tl

from posttrain.kernels.math import tanh

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _cache(
    cache, table, key, end, page_stride, token_stride,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """[keys, BLOCK_WIDTH] of the keys before `end`, zeros elsewhere: what isn't a key of the sequence is not read."""
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    page = tl.load(table + key // PAGE, mask=key < end, other=0).to(tl.int64)
    address = cache + page[:, None] * page_stride + (key % PAGE)[:, None] * token_stride + column
    return tl.load(address, mask=(key < end)[:, None] & (column < WIDTH), other=0.0)


@triton.jit
def _share(
    block_table, context_lens, member, first, sequences, begin, table_row, PAGE: tl.constexpr, SPLIT: tl.constexpr
):
    """Whether the sequences `member` below `sequences` have all keys of a split, in the pages of sequence `first`."""
    there = (member < sequences) & (tl.load(context_lens + member, mask=member < sequences, other=0) >= begin + SPLIT)
    page = begin // PAGE + tl.arange(0, SPLIT // PAGE if PAGE < SPLIT else 1)[None, :]
    whole = tl.load(context_lens + first) >= begin + SPLIT
    wanted = tl.load(block_table + first.to(tl.int64) * table_row + page, mask=whole & (page >= 0), other=-1)
    own = tl.load(block_table + member.to(tl.int64)[:, None] * table_row + page, mask=there[:, None], other=-2)
    differs = ((own != wanted) & (member < sequences)[:, None]).to(tl.int32)
    return tl.sum(tl.sum(differs, 1), 0) == 0


@triton.jit
def attend_kernel(
    q, key_cache, value_cache, block_table, context_lens, query_lens, tile_sequence, tile_query, tile_token, sinks,
    out, part_out, part_top, part_total,
    q_token, q_head, k_page, k_token, k_head, v_page, v_token, v_head, table_row, scale, softcap, window, heads,
    splits,
    GROUP: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, DECODE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PAGE: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Rows are QUERIES queries under the GROUP heads of a key head.

    Decoding, over one split of the keys: rows are up to QUERIES sequences from a multiple of QUERIES on. If they share
    the pages of the split, the first one's program takes them all and the others' none; else each takes its own.
    """
    tile = tl.program_id(0)
    key_head = tl.program_id(1)
    split = tl.program_id(2)
    row = tl.arange(0, ROWS)
    begin = split * SPLIT
    if DECODE:
        sequence, first_query, queries = tile, tile * 0, tile * 0 + 1
        first, sequences = tile // QUERIES * QUERIES, tl.num_programs(0)
        member = first + tl.minimum(row // GROUP, QUERIES - 1)
        shared = _share(block_table, context_lens, member, first, sequences, begin, table_row, PAGE, SPLIT)
    else:
        sequence = tl.load(tile_sequence + tile)
        first_query = tl.load(tile_query + tile)
        token = tl.load(tile_token + tile)
        queries = tl.load(query_lens + sequence)
    context = tl.load(context_lens + sequence)
    query = row // GROUP
    head = key_head * GROUP + row % GROUP
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    if DECODE:
        inside = tl.where(shared, (query < QUERIES) & (first + query < sequences) & (tile == first), query == 0)
        place = tl.where(shared, first + query, tile).to(tl.int64)
        own = tl.load(context_lens + place, mask=inside, other=0) - 1  # positions
    else:
        inside = (query < QUERIES) & (first_query + query < queries)
        place = (token + query).to(tl.int64)
        own = context - queries + first_query + query
    filled = inside[:, None] & (column < WIDTH)
    b_q = tl.load(q + place[:, None] * q_token + head[:, None] * q_head + column, mask=filled, other=0.0)
    end = tl.minimum(context - queries + tl.minimum(first_query + QUERIES, queries), context)
    oldest = context - queries + first_query  # position
    if DECODE:
        end = tl.where(shared & (tile != first), begin, tl.minimum(end, begin + SPLIT))
        oldest = tl.min(tl.where(inside, own, oldest), 0)
    if WINDOW:
        begin = tl.maximum(begin, (oldest - window + 1) // KEYS * KEYS)
    end = tl.where(first_query < queries, end, 0)
    table = block_table + sequence.to(tl.int64) * table_row
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, BLOCK_WIDTH], tl.float32)
    key_cache += key_head.to(tl.int64) * k_head
    value_cache += key_head.to(tl.int64) * v_head
    for first_key in range(begin, end, KEYS):
        key = first_key + tl.arange(0, KEYS)
        b_k = _cache(key_cache, table, key, end, k_page, k_token, WIDTH, BLOCK_WIDTH, PAGE)
        s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        s = tanh(s * (scale / softcap)) * softcap if SOFTCAP else s * scale
        sees = (key[None, :] <= own[:, None]) & (key < end)[None, :]
        if WINDOW:
            sees &= own[:, None] - key[None, :] < window
        s = tl.where(sees, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        factor = tl.exp2((top - reference) * _LOG2E)
        p = tl.exp2((s - reference[:, None]) * _LOG2E)
        total = total * factor + tl.sum(p, 1)
        b_v = _cache(value_cache, table, key, end, v_page, v_token, WIDTH, BLOCK_WIDTH, PAGE)
        b_out = tl.dot(p.to(b_v.dtype), b_v, b_out * factor[:, None], input_precision="ieee")
        top = new_top
    result = place * heads + head
    if DECODE:
        part = result * splits + split
        tl.store(part_top + part, top, mask=inside)
        tl.store(part_total + part, total, mask=inside)
        tl.store(part_out + part[:, None] * WIDTH + column, b_out, mask=filled & (end > begin))
    else:
        if SINKS:
            sink = tl.load(sinks + head, mask=inside, other=0.0).to(tl.float32)
            new_top = tl.maximum(top, sink)
            factor = tl.exp2((top - new_top) * _LOG2E)
            total = total * factor + tl.exp2((sink - new_top) * _LOG2E)
            b_out *= factor[:, None]
        b_out = b_out / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + result[:, None] * WIDTH + column, b_out.to(out.dtype.element_ty), mask=filled)


@triton.jit
def merge_kernel(
    part_out, part_top, part_total, context_lens, sinks, out, heads, splits,
    SINKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The splits of one query under one head, in their order."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    context = tl.load(context_lens + token)
    column = tl.arange(0, BLOCK_WIDTH)
    inside = column < WIDTH
    top = tl.cast(float("-inf"), tl.float32)
    if SINKS:
        top = tl.load(sinks + head).to(tl.float32)
    sink = top
    first = (token * heads + head) * splits
    used = tl.cdiv(context, SPLIT)
    for split in range(0, used):
        top = tl.maximum(top, tl.load(part_top + first + split))
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.exp2((sink - top) * _LOG2E)
    b_out = tl.zeros([BLOCK_WIDTH], tl.float32)
    for split in range(0, used):
        factor = tl.exp2((tl.load(part_top + first + split) - top) * _LOG2E)
        total += tl.load(part_total + first + split) * factor
        written = column < tl.where(factor > 0, WIDTH, 0)
        part = tl.load(part_out + (first + split) * WIDTH + column, mask=written, other=0.0)
        b_out += part * factor
    b_out = b_out / tl.where(total > 0, total, 1.0)
    tl.store(out + (token * heads + head) * WIDTH + column, b_out.to(out.dtype.element_ty), mask=inside)
