"""The Triton kernels of paged attention, on the GPU or, small, interpreted on the CPU."""

from functools import partial

import paged_step
import pytest
import torch
import triton
import triton.language as tl
from tolerance import assert_as_good_as, assert_true_to
from torch import Tensor

from posttrain import ops
from posttrain.kernels import paged_attention as kernels
from posttrain.kernels import paged_attention_device
from posttrain.ops import reference

pytestmark = pytest.mark.usefixtures("poison")
OPTIONS = [{}, {"window": 20}, {"softcap": 2.0, "scale": 0.3}]


@pytest.fixture(autouse=True)
def on_triton(triton_device, monkeypatch):
    """Everything here runs on Triton, in splits that a sequence has more than one of."""
    monkeypatch.setattr(kernels, "SPLIT", 64)
    with ops.use_backend("triton"):
        yield


def step(contexts, queries, device, heads=(4, 2), width=16, page_size=8, dtype=torch.float32) -> tuple[Tensor, ...]:
    """q, caches with NaN wherever no key is, a table with pages that aren't there, and lengths."""
    generator = torch.Generator().manual_seed(len(contexts))
    pages = [-(-context // page_size) for context in contexts]
    order = torch.randperm(sum(pages) + 1, generator=generator)
    table = torch.full((len(contexts), max(pages) + 1), 2**30, dtype=torch.int32)
    caches = [torch.full((len(order), page_size, heads[1], width), torch.nan) for _ in range(2)]
    for s, own in enumerate(order.split([*pages, 1])[:-1]):
        table[s, : len(own)] = own.int()
        for cache in caches:
            keys = torch.randn(contexts[s], heads[1], width, generator=generator)
            cache.view(-1, heads[1], width)[
                (own[:, None] * page_size + torch.arange(page_size)).flatten()[: len(keys)]
            ] = keys
    q = torch.randn(sum(queries), heads[0], width, generator=generator)
    lens = (torch.tensor(x, dtype=torch.int32, device=device) for x in (contexts, queries))
    return *(x.to(device, dtype) for x in (q, *caches)), table.to(device), *lens


def check(arguments: tuple[Tensor, ...], **options) -> None:
    truth = reference.paged_attention(*(x.double() for x in arguments[:3]), *arguments[3:], **options)
    assert_true_to(ops.paged_attention(*arguments, **options), truth)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_decoding(options, with_sinks, triton_device) -> None:
    contexts = [150, 1, 64, 65]
    sinks = torch.linspace(-1, 3, 4, device=triton_device) if with_sinks else None
    *arguments, queries = step(contexts, [1] * 4, triton_device)
    truth = reference.paged_attention(*(x.double() for x in arguments[:3]), *arguments[3:], sinks=sinks, **options)
    assert_true_to(ops.paged_attention(*arguments, sinks=sinks, **options), truth)
    check((*arguments, queries), sinks=sinks, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_chunks(options, triton_device) -> None:
    sinks = torch.linspace(-1, 3, 4, device=triton_device)
    check(step([40, 0, 70, 33, 17], [40, 0, 3, 1, 17], triton_device), sinks=sinks, **options)


@pytest.mark.parametrize("heads, width, page_size", [((3, 1), 20, 16), ((40, 2), 32, 128), ((2, 2), 1, 8)])
def test_any_group_width_and_page(heads, width, page_size, triton_device) -> None:
    *arguments, queries = step([70, 9], [1, 1], triton_device, heads, width, page_size)
    check((*arguments, None))
    check((*arguments, queries))
    check(step([37, 9], [20, 9], triton_device, heads, width, page_size))


def test_a_sequence_alone_has_the_same_bits(triton_device) -> None:
    contexts, queries = [100, 70, 9, 40], [30, 1, 9, 2]
    for lens in (None, queries):
        q, k, v, table, context, given = step(contexts, lens or [1] * 4, triton_device)
        whole = ops.paged_attention(q, k, v, table, context, given if lens else None)
        assert torch.equal(ops.paged_attention(q, k, v, table, context, given if lens else None), whole)
        parts = [x.split(given.tolist()) for x in (q, whole)]
        for s, (own, expected) in enumerate(zip(*parts, strict=True)):
            row = slice(s, s + 1)
            alone = ops.paged_attention(own, k, v, table[row], context[row], given[row] if lens else None)
            assert torch.equal(alone, expected)


SHARING = [140, 130, 150, 128, 64, 70]  # contexts with up to 16 pages of 8 in common


@pytest.mark.parametrize("options", [{}, {"window": 100, "softcap": 2.0}], ids=str)
def test_sequences_that_share_pages(options, triton_device) -> None:
    """In tiles of 4 sequences."""
    step = paged_step.make(SHARING, [1] * 6, (4, 1), 16, page_size=8, shared=16)
    sinks = torch.linspace(-1, 3, 4)
    truth = step.truth(sinks=sinks, **options).to(triton_device)
    step = step.on(triton_device).decoding()
    whole = step.run(sinks=sinks.to(triton_device), **options)
    assert_true_to(whole, truth)
    for s in (1, 4):
        row = slice(s, s + 1)
        alone = step.q[row], step.key_cache, step.value_cache, step.block_table[row], step.context_lens[row]
        assert torch.equal(ops.paged_attention(*alone, sinks=sinks.to(triton_device), **options), whole[row])


@triton.jit
def _shared_kernel(
    block_table, context_lens, result, table_row, QUERIES: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr
):
    first, begin = tl.program_id(0) * QUERIES, tl.program_id(1) * SPLIT
    member = first + tl.arange(0, QUERIES)
    shared = paged_attention_device._share(
        block_table, context_lens, member, first, 6, begin, table_row, PAGE=PAGE, SPLIT=SPLIT
    )
    tl.store(result + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), shared.to(tl.int32))


@pytest.mark.parametrize("pages", [16, 8])
def test_who_shares(pages, triton_device) -> None:
    step = paged_step.make(SHARING, [1] * 6, page_size=8, shared=pages).on(triton_device)
    result = torch.full((2, 3), -1, dtype=torch.int32, device=triton_device)
    _shared_kernel[2, 3](
        step.block_table, step.context_lens, result, step.block_table.stride(0), QUERIES=4, PAGE=8, SPLIT=64
    )
    assert result.tolist() == [[1, int(pages == 16), 0], [1, 0, 0]]


def test_strides_and_pages_side_by_side(triton_device) -> None:
    q, k, v, table, context, _ = step([30, 20], [1, 1], triton_device)
    both = torch.stack([k, v], 1)
    expected = ops.paged_attention(q, k, v, table, context)
    wide = torch.cat([q, q], 1)[:, :4]
    assert torch.equal(ops.paged_attention(wide, both[:, 0], both[:, 1], table, context), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, triton_device) -> None:
    if triton_device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16")
    *arguments, queries = step([40, 70], [1, 1], triton_device, dtype=dtype)
    exact = reference.paged_attention(*(x.float() for x in arguments[:3]), *arguments[3:])
    for lens in (None, queries):
        assert_as_good_as(ops.paged_attention(*arguments, lens), plain(*arguments), exact)


def plain(q: Tensor, key_cache: Tensor, value_cache: Tensor, table: Tensor, context_lens: Tensor) -> Tensor:
    """PyTorch's way in the dtype of its inputs."""
    outputs = []
    for own, pages, context in zip(q, table, context_lens.tolist(), strict=True):
        used = pages[: -(-context // key_cache.shape[1])].long()
        k, v = (x[used].flatten(0, 1)[:context].repeat_interleave(2, 1) for x in (key_cache, value_cache))
        scores = torch.einsum("hd,khd->hk", own, k) * q.shape[-1] ** -0.5
        outputs.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v))
    return torch.stack(outputs)


def test_heads_wider_than_the_tiles_and_no_tokens(triton_device) -> None:
    make = partial(step, [3], device=triton_device)
    with pytest.raises(ValueError, match=r"up to 256 wide, got q \[1, 4, 257\]"):
        ops.paged_attention(*make([1], width=257))
    assert ops.paged_attention(*make([0])).shape == (0, 4, 16)


def test_opcheck(triton_device) -> None:
    *arguments, queries = step([9, 20], [1, 1], triton_device)
    for lens in (None, queries):
        values = *arguments, lens, torch.zeros(4, device=triton_device), 0.5, 3, 1.0, "triton"
        torch.library.opcheck(torch.ops.posttrain.paged_attention, values)
