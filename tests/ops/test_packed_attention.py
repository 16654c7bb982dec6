"""packed_attention against the dense reference in float64; isolation of sequences, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_good_as, assert_true_to, gradients

from posttrain.ops import packed_attention, reference
from posttrain.ops.layout import PackedLayout

LENGTHS = [7, 1, 0, 12, 30]
OPTIONS = [
    {},
    {"scale": 0.3},
    {"window": 5},
    {"window": 1},
    {"window": 64},
    {"softcap": 2.0},
    {"softcap": 0.5, "window": 4, "scale": 1.0},
]


def tensors(tokens: int, heads: int, kv_heads: int, width: int = 8, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens + heads)
    shapes = [(tokens, heads, width), (tokens, kv_heads, width), (tokens, kv_heads, width)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def forest() -> PackedLayout:
    """A prompt of 4 tokens with completions of 3 and 2, and a sequence of 5."""
    until = [9] * 4 + [7] * 3 + [9] * 2 + [14] * 5
    positions = [0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1, 2, 3, 4]
    return PackedLayout(
        torch.tensor(until, dtype=torch.int32), torch.tensor(positions, dtype=torch.int32), (0, 4, 7, 9, 14)
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
def test_equals_the_reference_with_gradients(options, heads):
    layout = PackedLayout.from_lengths(LENGTHS)
    inputs = tensors(layout.num_tokens, *heads)
    truth = gradients(lambda *x: reference.packed_attention(*x, layout, **options), [x.double() for x in inputs])
    ours = gradients(lambda *x: packed_attention(*x, layout, **options), inputs)
    for group, expected in zip(ours, truth, strict=True):
        for mine, true in zip(group, expected, strict=True):
            assert_true_to(mine, true)


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(options, dtype):
    layout = PackedLayout.from_lengths(LENGTHS)
    inputs = tensors(layout.num_tokens, 4, 2, dtype=dtype)
    ours = gradients(lambda *x: packed_attention(*x, layout, **options), inputs)
    exact = gradients(lambda *x: reference.packed_attention(*x, layout, **options), [x.float() for x in inputs])
    peer = gradients(lambda *x: plain(*x, layout, **options), inputs)
    for mine, other, truth in zip(sum(ours, ()), sum(peer, ()), sum(exact, ()), strict=True):
        assert_as_good_as(mine, other, truth)


def plain(q, k, v, layout, window=None, softcap=None):
    """Attention as PyTorch computes it in the dtype of its inputs, with a mask."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    index = torch.arange(len(q))
    visible = (index <= index[:, None]) & (index[:, None] < layout.visible_until)
    if window is not None:
        visible &= index[:, None] - index < window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def test_the_reference_is_softmax_over_what_the_layout_shows():
    layout = forest()
    q, k, v = tensors(14, 1, 1, dtype=torch.float64)
    out = reference.packed_attention(q, k, v, layout, scale=1.0)
    for query, seen in [(0, [0]), (6, [0, 1, 2, 3, 4, 5, 6]), (7, [0, 1, 2, 3, 7]), (10, [9, 10])]:
        weights = (k[seen, 0] @ q[query, 0]).softmax(0)
        torch.testing.assert_close(out[query, 0], weights @ v[seen, 0])
    near = reference.packed_attention(q, k, v, layout, scale=1.0, window=2)  # positions, not indices: 7 follows 3
    torch.testing.assert_close(near[7, 0], (k[[3, 7], 0] @ q[7, 0]).softmax(0) @ v[[3, 7], 0])


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"softcap": 1.0}], ids=str)
def test_forests(options):
    inputs = tensors(14, 4, 2)
    truth = reference.packed_attention(*[x.double() for x in inputs], forest(), **options)
    assert_true_to(packed_attention(*inputs, forest(), **options), truth)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), max_size=6), window=st.none() | st.integers(1, 10))
def test_any_lengths(lengths, window):
    layout = PackedLayout.from_lengths(lengths)
    inputs = tensors(layout.num_tokens, 2, 1)
    truth = reference.packed_attention(*[x.double() for x in inputs], layout, window=window)
    assert_true_to(packed_attention(*inputs, layout, window=window), truth)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=str)
def test_gradcheck(options):
    layout = PackedLayout.from_lengths([3, 4])
    inputs = [x.requires_grad_() for x in tensors(7, 2, 1, width=4, dtype=torch.float64)]
    torch.autograd.gradcheck(lambda *x: packed_attention(*x, layout, **options), inputs, eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0}], ids=str)
def test_other_sequences_change_no_bit(options):
    layout = PackedLayout.from_lengths([9, 5, 11])
    inputs = tensors(25, 4, 2)
    before = packed_attention(*inputs, layout, **options)
    for x in inputs:
        x[9:14] += torch.randn_like(x[9:14])
    after = packed_attention(*inputs, layout, **options)
    assert torch.equal(before[:9], after[:9]) and torch.equal(before[14:], after[14:])
    assert not torch.equal(before[9:14], after[9:14])


def test_values_may_be_wider_than_keys():
    layout = PackedLayout.from_lengths([4, 3])
    q, k, _ = tensors(7, 4, 2)
    v = torch.randn(7, 2, 20)
    truth = reference.packed_attention(q.double(), k.double(), v.double(), layout)
    assert_true_to(packed_attention(q, k, v, layout), truth)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"needs q \[T, Hq, D\].*got q \[4, 8\]"),
        (lambda q, k, v: (q, k[..., :4], v), r"k \[10, 2, 4\]"),
        (lambda q, k, v: (q, k[:, :1], v), r"k \[10, 1, 8\], v \[10, 2, 8\]"),
        (lambda q, k, v: (q[:9], k, v), r"layout has 10 tokens; got q \[9, 4, 8\]"),
        (lambda q, k, v: (q[:, :3], k, v), "3 query heads don't divide into 2 key heads"),
        (lambda q, k, v: (q, k.double(), v), "torch.float32, torch.float64, torch.float32"),
        (lambda q, k, v: (q, k, v.to("meta")), "v on meta"),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        packed_attention(*change(*tensors(10, 4, 2)), PackedLayout.from_lengths([10]))


@pytest.mark.parametrize("option", [{"window": 0}, {"softcap": 0.0}, {"softcap": -1.0}], ids=str)
def test_bad_options_are_errors(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        packed_attention(*tensors(10, 4, 2), PackedLayout.from_lengths([10]), **option)


def test_independence_of_layouts():
    assert PackedLayout.from_lengths(LENGTHS).independent
    assert PackedLayout.from_lengths([]).independent
    assert not forest().independent
