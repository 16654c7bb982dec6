"""paged_attention against the dense definition in float64; the same bits in any batch and in any pieces."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paged_step import make, plain
from tolerance import assert_as_good_as, assert_true_to, assert_unbiased

from posttrain.ops import packed_attention, reference, use_backend, write_cache
from posttrain.ops.layout import PackedLayout

OPTIONS = [
    {},
    {"scale": 0.3},
    {"window": 1},
    {"window": 70},
    {"softcap": 2.0},
    {"softcap": 0.5, "window": 20, "scale": 1.0},
]

MIXED = [130, 1, 0, 64, 63, 200, 65], [7, 1, 0, 64, 1, 1, 33]
GROUP = [150, 131, 144, 128, 137, 90, 20, 150], [1, 1, 3, 1, 1, 5, 1, 1]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (12, 1)], ids=str)
@pytest.mark.parametrize("lens", [MIXED, GROUP], ids=["mixed", "group"])
def test_agrees_with_the_definition(lens, heads, options):
    step = make(*lens, heads=heads, shared=8)
    sinks = torch.linspace(-2, 3, heads[0])
    assert_true_to(step.run(sinks=sinks, **options), step.truth(sinks=sinks, **options))
    with use_backend("reference"):
        assert_true_to(step.run(**options), step.truth(**options))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("width", [1, 20, 32, 33, 64, 80, 128, 256])
@pytest.mark.parametrize("page_size", [8, 128])
def test_agrees_for_any_width_and_page(width, page_size):
    step = make(*GROUP, width=width, page_size=page_size, shared=128 // page_size)
    assert_true_to(step.run(), step.truth())


@pytest.mark.usefixtures("poison")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_step(data):
    contexts = data.draw(st.lists(st.integers(0, 200), max_size=6))
    queries = [data.draw(st.sampled_from([min(c, 1), c, c // 2])) for c in contexts]
    heads = data.draw(st.sampled_from([(1, 1), (4, 1), (6, 2), (70, 1)]))
    page_size = data.draw(st.sampled_from([8, 16, 64]))
    step = make(contexts, queries, heads=heads, page_size=page_size, shared=data.draw(st.integers(0, 12)))
    options = {"window": data.draw(st.none() | st.integers(1, 150)), "softcap": data.draw(st.none() | st.just(1.5))}
    assert_true_to(step.run(**options), step.truth(**options))


@pytest.mark.parametrize("options", [{}, {"window": 40}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (12, 2)], ids=str)
def test_the_same_bits_alone_and_in_any_batch(heads, options):
    """Under 1 and 6 heads of a group, so that rows are taken a few and many at a time."""
    step = make(*GROUP, heads=heads, shared=8)
    whole = step.run(**options).split(step.query_lens.tolist())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for s, (context, queries) in enumerate(zip(*GROUP, strict=True)):
        assert torch.equal(step.part(s, context, queries).run(**options), whole[s])
    torch.set_num_threads(threads)


@pytest.mark.parametrize("options", [{}, {"window": 40}], ids=str)
@pytest.mark.parametrize("width", [16, 20])
def test_the_same_bits_token_by_token_in_chunks_and_in_packed_attention(width, options):
    step = make([150], [150], heads=(3, 1), width=width)
    whole = step.run(**options)
    for size in (1, 7, 100):
        for end in range(size, 151, size):
            part = replace(step, context_lens=torch.tensor([end], dtype=torch.int32))
            part = replace(part, q=step.q[end - size : end], query_lens=torch.tensor([size], dtype=torch.int32))
            assert torch.equal(part.run(**options), whole[end - size : end])
    layout = PackedLayout.from_lengths([150])
    assert torch.equal(packed_attention(step.q, step.keys[0], step.values[0], layout, **options), whole)


def test_decoding_needs_no_query_lens():
    step = make([5, 40, 17], [1, 1, 1])
    assert torch.equal(replace(step, query_lens=None).run(), step.run())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    step = make(*GROUP, shared=8, dtype=dtype)
    exact = step.truth(softcap=2.0).float()
    assert_as_good_as(step.run(softcap=2.0), plain(step, softcap=2.0), exact)


def test_float64_and_strides():
    step = make(*GROUP, shared=8, dtype=torch.float64)
    torch.testing.assert_close(step.run(), step.truth())
    both = torch.stack([step.key_cache, step.value_cache], 1)  # one buffer, keys and values of a page side by side
    fused = torch.cat([step.q, step.q], 1)[:, :4]
    table = torch.cat([step.block_table] * 2, 1)[:, : step.block_table.shape[1]]
    strided = replace(step, q=fused, key_cache=both[:, 0], value_cache=both[:, 1], block_table=table)
    assert torch.equal(strided.run(), step.run())
    apart = {name: torch.stack([getattr(step, name)] * 2, -1)[..., 0] for name in ("q", "key_cache")}
    assert torch.equal(replace(step, **apart).run(), step.run())


@pytest.mark.parametrize("level", [1e4, -1e4])
def test_scores_of_ten_thousand(level):
    """Whole numbers apart, so that many keys matter and only the softmax can err."""
    step = make([70, 20], [3, 1], width=8)
    step.q, step.key_cache = step.q.round(), step.key_cache.round()
    step.q[..., -1], step.key_cache[..., -1] = level / 100, 100
    step.keys = [torch.cat([k.round()[..., :-1], torch.full_like(k[..., :1], 100)], -1) for k in step.keys]
    assert_true_to(step.run(scale=1.0), step.truth(scale=1.0))


def test_errors_lean_to_no_side():
    def result(function):
        def call(seed):
            step = make([150, 90], [20, 1], seed=seed)
            step.q += 0.5
            return function(step)

        return call

    assert_unbiased(
        result(lambda step: step.run()),
        result(lambda step: step.run(reference.paged_attention)),
        result(lambda step: step.truth()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    step = make([9, 0, 20], [1, 0, 3], dtype=dtype)
    tables = step.block_table, step.context_lens, step.query_lens
    for sinks in (None, torch.zeros(4)):
        arguments = step.q, step.key_cache, step.value_cache, *tables, sinks, 0.5, 3, 1.0, "cpu"
        torch.library.opcheck(torch.ops.posttrain.paged_attention, arguments)
    k = torch.randn(3, 2, 16, dtype=dtype)
    arguments = k, k, step.key_cache, step.value_cache, torch.tensor([1, 7, 3])
    torch.library.opcheck(torch.ops.posttrain.write_cache, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_write_cache(dtype):
    cache = torch.zeros(3, 8, 2, 4, dtype=dtype), torch.zeros(3, 8, 2, 4, dtype=dtype)
    k, v = torch.randn(2, 2, 5, 4)[..., :5, :].transpose(1, 2)
    slots = torch.tensor([23, 0, 8, 9, 15])
    write_cache(k, v, *cache, slots)
    for x, written in zip((k, v), cache, strict=True):
        expected = torch.zeros(24, 2, 4, dtype=dtype)
        expected[slots] = x.to(dtype)
        assert torch.equal(written.flatten(0, 1), expected)
    write_cache(k[:0], v[:0], *cache, slots[:0])


@pytest.mark.parametrize("slot", [-1, 24])
def test_a_slot_out_of_range_changes_nothing(slot):
    cache = torch.zeros(3, 8, 2, 4)
    with pytest.raises(ValueError, match=rf"write_cache: slots\[1\] is {slot}; the cache has the slots 0 to 23"):
        write_cache(torch.ones(2, 2, 4), torch.ones(2, 2, 4), cache, cache.clone(), torch.tensor([0, slot]))
    assert not cache.any()


K, CACHE, SLOTS = torch.ones(2, 2, 4), torch.zeros(3, 8, 2, 4), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((K, K[:1], CACHE, CACHE, SLOTS), r"k \[2, 2, 4\], v \[1, 2, 4\]"),
        ((K, K, CACHE, CACHE[:2], SLOTS), r"caches \[3, 8, 2, 4\] and \[2, 8, 2, 4\]"),
        ((K[..., :3], K[..., :3], CACHE, CACHE, SLOTS), r"k and v must be \[T, 2, 4\]; got k \[2, 2, 3\]"),
        ((K, K, CACHE, CACHE.to("meta"), SLOTS), "several devices, cpu, meta"),
        ((K, K.double(), CACHE, CACHE, SLOTS), "share a floating dtype, got torch.float32, torch.float64"),
        ((K, K, CACHE, CACHE.half(), SLOTS), "share a floating dtype, got .* torch.float32, torch.float16"),
        ((K, K, CACHE, CACHE, SLOTS[:1]), r"slots must be int64 \[2\], got torch.int64 \[1\]"),
        ((K, K, CACHE, CACHE, SLOTS.int()), r"slots must be int64 \[2\], got torch.int32"),
        ((K, K, CACHE.transpose(0, 1), CACHE.transpose(0, 1), SLOTS), "caches must be contiguous"),
        ((K.clone().requires_grad_(), K, CACHE, CACHE, SLOTS), "no gradient; call it under torch.no_grad"),
    ],
)
def test_wrong_arguments_of_write_cache(arguments, message):
    with pytest.raises(ValueError, match=f"write_cache: .*{message}"):
        write_cache(*arguments)


def changed(**values):
    return lambda step: replace(step, **{name: f(getattr(step, name)) for name, f in values.items()})


def ints(*values: int):
    return lambda x: torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (changed(q=lambda q: q[0]), {}, r"needs q \[T, Hq, D\].*got q \[4, 16\]"),
        (changed(q=lambda q: q[..., :8]), {}, r"got q \[4, 4, 8\], key_cache \[7, 16, 2, 16\]"),
        (changed(value_cache=lambda v: v[:3]), {}, r"value_cache \[3, 16, 2, 16\]"),
        (
            changed(key_cache=lambda k: k[:, :12], value_cache=lambda v: v[:, :12]),
            {},
            r"power of two of at least 8; .*\[7, 12, 2, 16\]",
        ),
        (changed(q=lambda q: q[:, :3]), {}, r"Hq a multiple of Hkv; got q \[4, 3, 16\]"),
        (changed(q=lambda q: q.double()), {}, "share a floating dtype, got torch.float64, torch.float32"),
        (changed(block_table=lambda t: t[:1]), {}, r"got \[1, 4\], \[2\], \[2\]"),
        (changed(block_table=lambda t: t.long()), {}, "must be int32, got torch.int64, torch.int32"),
        (changed(query_lens=lambda _: None), {}, r"2 sequences need one query each; got q \[4"),
        (changed(query_lens=lambda n: n.to("meta")), {}, "several devices, cpu, meta"),
        (changed(q=lambda q: q.clone().requires_grad_()), {}, "no gradient; call it under torch.no_grad"),
        (changed(), {"window": 0}, "window must be an integer of at least 1, got 0"),
        (changed(), {"softcap": 0.0}, "softcap must be positive and finite, got 0.0"),
        (changed(), {"softcap": float("inf")}, "softcap must be positive and finite, got inf"),
        (changed(), {"sinks": torch.ones(2)}, r"sinks must be \[4\], floating, on cpu; got \[2\]"),
        (changed(context_lens=ints(40, 65)), {}, "sequence 1 has a context of 65 keys; .* 4 pages of 16 holds 0 to 64"),
        (changed(context_lens=ints(40, -1)), {}, "sequence 1 has a context of -1 keys"),
        (changed(query_lens=ints(-1, 5)), {}, "sequence 0 has -1 queries in a context of 40 keys"),
        (changed(context_lens=ints(2, 20)), {}, "sequence 0 has 3 queries in a context of 2 keys"),
        (changed(query_lens=ints(3, 2)), {}, "query_lens sum to 5, q has 4 tokens"),
        (changed(context_lens=ints(49, 20)), {}, r"block_table\[0\]\[3\] is 1073741824; the cache has 7 pages"),
        (changed(block_table=lambda t: t - 2**30), {}, r"block_table\[0\]\[0\] is -\d+; the cache has 7 pages"),
    ],
)
def test_wrong_arguments(change, options, message, backend):
    step = change(make([40, 20], [3, 1], page_size=16))
    with use_backend(backend), pytest.raises(ValueError, match=message):
        step.run(**options)
