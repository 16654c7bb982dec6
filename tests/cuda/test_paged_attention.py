"""paged_attention with the CUDA kernel: splits of 256 keys, which sequences with the same pages go through together."""

from dataclasses import replace

import pytest
import torch
from paged_step import Step, make, plain
from tolerance import HALF, assert_as_good_as, assert_true_to, assert_unbiased
from torch import Tensor

from posttrain.ops import reference

pytestmark = pytest.mark.usefixtures("poison", "cuda")
OPTIONS = [{}, {"window": 70, "scale": 0.3}, {"softcap": 0.5, "window": 300}]
# With pages of 512 keys shared, four sequences go through their first split together, and two through both.
CONTEXTS = [530, 300, 290, 256, 3, 515, 597]
ONES = [1] * len(CONTEXTS)


def run(step: Step, device: str, **options) -> Tensor:
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    return step.on(device).run(**options).cpu()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("heads", "shared"), [((3, 3), 32), ((8, 2), 20)], ids=str)
def test_decoding_agrees_with_the_definition(heads, shared, options, device) -> None:
    step = make(CONTEXTS, ONES, heads=heads, shared=shared)
    options = options | {"sinks": torch.linspace(-2, 3, heads[0])}
    out = run(step.decoding(), device, **options)
    assert_true_to(out, step.truth(**options))
    assert torch.equal(run(step, device, **options), out)


def test_the_same_pages_up_to_other_lengths(device) -> None:
    contexts = torch.tensor([400, 530, 512, 300, 530], dtype=torch.int32)
    one = make([530], [1])
    step = replace(
        one,
        q=torch.cat([one.q * i for i in range(1, 6)]),
        block_table=one.block_table.expand(5, -1),
        context_lens=contexts,
        query_lens=torch.ones(5, dtype=torch.int32),
        keys=[one.keys[0][:context] for context in contexts],
        values=[one.values[0][:context] for context in contexts],
    )
    assert_true_to(run(step.decoding(), device), step.truth())


def test_chunks_agree_with_the_definition_and_with_decoding(device) -> None:
    step = make([70, 40, 0, 300], [5, 40, 0, 1], shared=2)
    out = run(step, device, window=50)
    assert_true_to(out, step.truth(window=50))
    alone = [run(step.part(1, end, 1).decoding(), device, window=50) for end in range(1, 41)]
    assert torch.equal(torch.cat(alone), out[5:45])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_alone_and_in_any_batch(dtype, device) -> None:
    step = make(CONTEXTS, ONES, shared=32, dtype=dtype).decoding()
    whole = run(step, device)
    assert torch.equal(run(step, device), whole)
    order = torch.tensor([6, 2, 0, 3, 1, 5, 4])
    other = replace(step, q=step.q[order], block_table=step.block_table[order], context_lens=step.context_lens[order])
    assert torch.equal(run(other, device), whole[order])
    for s in range(len(CONTEXTS)):
        row = slice(s, s + 1)
        alone = replace(step, q=step.q[row], block_table=step.block_table[row], context_lens=step.context_lens[row])
        assert torch.equal(run(alone, device), whole[row])


@pytest.mark.parametrize("width", [4, 20, 64, 80, 128, 256])
def test_any_width(width, device) -> None:
    step = make([33, 20], [1, 1], heads=(2, 1), width=width, page_size=8)
    assert_true_to(run(step.decoding(), device), step.truth())


@pytest.mark.parametrize(("heads", "page_size", "dtype"), [((40, 1), 512, torch.float32), ((70, 2), 8, torch.float16)])
def test_groups_larger_than_a_block_and_any_page(heads, page_size, dtype, device) -> None:
    step = make([40, 9], [1, 1], heads=heads, page_size=page_size, dtype=dtype)
    out, truth = run(step.decoding(), device, softcap=2.0), step.truth(softcap=2.0)
    if dtype in HALF:
        assert_as_good_as(out, plain(step, softcap=2.0), truth.float())
    else:
        assert_true_to(out, truth)


@pytest.mark.parametrize("width", [8, 128, 200])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision(dtype, width, device) -> None:
    contexts = CONTEXTS if width == 8 else [40, 9]
    step = make(contexts, [1] * len(contexts), width=width, shared=32, dtype=dtype)
    exact = step.truth(softcap=2.0).float()
    assert_as_good_as(run(step.decoding(), device, softcap=2.0), plain(step, softcap=2.0), exact)


def test_strides(device) -> None:
    step = make([30, 20], [1, 1]).decoding()
    expected = run(step, device)
    both = torch.stack([step.key_cache, step.value_cache], 1)  # one buffer, keys and values of a page side by side
    apart = {name: torch.stack([getattr(step, name)] * 2, -1)[..., 0] for name in ("q", "block_table", "context_lens")}
    moved = replace(step, key_cache=both[:, 0], value_cache=both[:, 1], **apart)
    assert torch.equal(run(moved, device), expected)


@pytest.mark.parametrize("level", [1e4, -1e4])
def test_scores_of_ten_thousand(level, device) -> None:
    """Whole numbers apart, so that many keys matter and only the softmax can err."""
    step = make([70, 20], [1, 1], width=8)
    step.q, step.key_cache = step.q.round(), step.key_cache.round()
    step.q[..., -1], step.key_cache[..., -1] = level / 100, 100
    step.keys = [torch.cat([k.round()[..., :-1], torch.full_like(k[..., :1], 100)], -1) for k in step.keys]
    assert_true_to(run(step, device, scale=1.0), step.truth(scale=1.0))


def test_errors_lean_to_no_side(device) -> None:
    def each(function):
        def call(seed: int) -> Tensor:
            step = make([40], [1], heads=(2, 1), width=8, seed=seed).decoding()
            step.q += 0.5
            return function(step)

        return call

    assert_unbiased(
        each(lambda step: run(step, device)),
        each(lambda step: step.run(reference.paged_attention)),
        each(lambda step: replace(step, query_lens=torch.ones(1, dtype=torch.int32)).truth()),
    )


def test_no_tokens(device) -> None:
    step = make([], [])
    assert run(step, device).shape == run(step.decoding(), device).shape == (0, 4, 16)


@pytest.mark.parametrize(
    ("width", "dtype", "message"),
    [
        (260, torch.float32, r"up to 256 wide, a multiple of 4 for torch.float32; got q \[1, 4, 260\]"),
        (12, torch.bfloat16, r"up to 256 wide, a multiple of 8 for torch.bfloat16; got q \[1, 4, 12\]"),
    ],
)
def test_widths_that_are_no_whole_16_bytes(width, dtype, message, device) -> None:
    step = make([3], [1], width=width, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        run(step, device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cache: torch.stack([cache] * 2, -1)[..., 0], r"strides \[1024, 64, 32, 2\]"),
        (lambda cache: torch.cat([cache[..., :1], cache], -1)[..., :16], r"strides \[544, 34, 17, 1\]"),
        (lambda cache: torch.cat([cache.flatten()[:1], cache.flatten()])[1:].view(cache.shape), "at address"),
    ],
)
@pytest.mark.parametrize("name", ["key_cache", "value_cache"])
def test_caches_that_16_bytes_do_not_fit(name, change, message, device) -> None:
    step = make([3], [1])
    moved = replace(step.on(device), **{name: change(getattr(step.on(device), name))})
    with pytest.raises(ValueError, match=f"heads of {name} that are contiguous .*{message}"):
        moved.run()


def test_opcheck(device) -> None:
    step = make([9, 20], [1, 2]).on(device)
    tables = step.block_table, step.context_lens, step.query_lens
    arguments = step.q, step.key_cache, step.value_cache, *tables, torch.zeros(4, device=device), 0.5, 3, 1.0, "cuda"
    torch.library.opcheck(torch.ops.posttrain.paged_attention, arguments)
