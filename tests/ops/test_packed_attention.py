"""packed_attention against the dense reference in float64; isolation of sequences, bit for bit."""

import pytest
import torch
from forests import forests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_attention import plain_attention
from tolerance import assert_as_good_as, assert_true_to, assert_unbiased, check, gradients

from posttrain.ops import backend_for, explain, packed_attention, reference
from posttrain.ops.backend import Choice
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
    return PackedLayout.from_forest([4, 3, 2, 5], [-1, 0, 0, -1])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
def test_agrees_with_the_reference(options, heads):
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
    peer = gradients(lambda *x: plain_attention(*x, layout, **options), inputs)
    for mine, other, truth in zip(sum(ours, ()), sum(peer, ()), sum(exact, ()), strict=True):
        assert_as_good_as(mine, other, truth)


def test_the_reference_is_softmax_over_what_the_layout_shows():
    layout = forest()
    q, k, v = tensors(14, 1, 1, dtype=torch.float64)
    out = reference.packed_attention(q, k, v, layout, scale=1.0)
    for query, seen in [(0, [0]), (6, [0, 1, 2, 3, 4, 5, 6]), (7, [0, 1, 2, 3, 7]), (10, [9, 10])]:
        weights = (k[seen, 0] @ q[query, 0]).softmax(0)
        torch.testing.assert_close(out[query, 0], weights @ v[seen, 0])
    near = reference.packed_attention(q, k, v, layout, scale=1.0, window=2)  # positions, not indices: 7 follows 3
    torch.testing.assert_close(near[7, 0], (k[[3, 7], 0] @ q[7, 0]).softmax(0) @ v[[3, 7], 0])


@pytest.mark.usefixtures("poison")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    forest=forests(7, 40),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 1), (6, 2)]),
    width=st.sampled_from([3, 16, 20]),
    window=st.none() | st.integers(1, 50),
    softcap=st.none() | st.just(1.5),
    with_sinks=st.booleans(),
)
def test_any_forest_with_gradients(forest, heads, width, window, softcap, with_sinks):
    layout = PackedLayout.from_forest(*forest)
    inputs = tensors(layout.num_tokens, *heads, width=width)
    inputs += [torch.linspace(-3, 3, heads[0])] * with_sinks

    def op(function):
        def call(q, k, v, sinks=None):
            return function(q, k, v, layout, window=window, softcap=softcap, sinks=sinks)

        return call

    check(op(packed_attention), op(reference.packed_attention), inputs)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("options", [{}, {"window": 90, "softcap": 3.0}], ids=str)
@pytest.mark.parametrize(
    ("heads", "lengths"), [((70, 1), [130, 5, 60]), ((3, 3), [130, 75, 101]), ((2, 1), [500, 3, 140])], ids=str
)
def test_agrees_with_more_queries_heads_and_keys_than_a_tile(heads, lengths, options):
    layout = PackedLayout.from_forest(lengths, [-1, 0, 0])
    inputs = tensors(layout.num_tokens, *heads, width=33)

    def op(function):
        return lambda q, k, v: function(q, k, v, layout, **options)

    check(op(packed_attention), op(reference.packed_attention), inputs)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("width", [32, 48, 64, 80, 96, 128, 160, 192, 256])
def test_agrees_for_any_width(width):
    layout = PackedLayout.from_forest([70, 40, 9, 33], [-1, 0, 0, -1])
    inputs = tensors(layout.num_tokens, 4, 2, width=width)
    check(lambda *x: packed_attention(*x, layout), lambda *x: reference.packed_attention(*x, layout), inputs)


def test_gradients_of_some_inputs_only():
    layout = forest()
    q, k, v = tensors(14, 4, 2)
    for wanted in range(3):
        inputs = [x.detach().requires_grad_(i == wanted) for i, x in enumerate((q, k, v))]
        truth = [x.detach().double().requires_grad_(i == wanted) for i, x in enumerate((q, k, v))]
        packed_attention(*inputs, layout).square().sum().backward()
        reference.packed_attention(*truth, layout).square().sum().backward()
        assert_true_to(inputs[wanted].grad, truth[wanted].grad)


def test_strided_inputs_and_output_gradients():
    layout = forest()
    fused = torch.randn(2, 14, 3 * 4 * 8)
    views = [x.unflatten(-1, (4, 8)) for x in fused[0].chunk(3, -1)]
    every_other = [torch.randn(14, 4, 16)[..., ::2] for _ in range(3)]
    for inputs in (views, every_other, [x.transpose(0, 1).contiguous().transpose(0, 1) for x in views]):
        check(lambda *x: packed_attention(*x, layout), lambda *x: reference.packed_attention(*x, layout), inputs)
    leaves = [x.detach().requires_grad_() for x in views]
    grads = torch.autograd.grad(packed_attention(*leaves, layout).sum(), leaves)  # a gradient without strides
    truth = [x.detach().double().requires_grad_() for x in views]
    for mine, true in zip(
        grads, torch.autograd.grad(reference.packed_attention(*truth, layout).sum(), truth), strict=True
    ):
        assert_true_to(mine, true)


@pytest.mark.parametrize("level", [1e4, -1e4])
def test_scores_of_ten_thousand(level):
    """Whole numbers apart, so that many keys matter and only the softmax can err.

    The column that lifts them gets no gradient: its factor 100 would also lift the rounding of sums that cancel.
    """
    layout = forest()
    q, k, v = tensors(14, 4, 2)

    def op(function):
        def call(q, k, v):
            q = torch.cat([q, torch.full_like(q[..., :1], level / 100)], -1)
            k = torch.cat([k, torch.full_like(k[..., :1], 100)], -1)
            return function(q, k, v, layout, scale=1.0)

        return call

    check(op(packed_attention), op(reference.packed_attention), [q.round(), k.round(), v])


def test_scores_ten_thousand_apart():
    layout = forest()
    q, k, v = tensors(14, 4, 2)
    q, k = (q * 8).round() * 50, (k * 8).round() * 50
    check(
        lambda *x: packed_attention(*x, layout, scale=1.0),
        lambda *x: reference.packed_attention(*x, layout, scale=1.0),
        [q, k, v],
    )


def test_runs_repeat_bit_for_bit_with_any_number_of_threads():
    layout = PackedLayout.from_forest([400, 70, 136, 50], [-1, 0, 0, -1])
    inputs = tensors(layout.num_tokens, 4, 1)
    threads = torch.get_num_threads()
    results = []
    for count in (2, 2, 1, 5):
        torch.set_num_threads(count)
        results.append(sum(gradients(lambda *x: packed_attention(*x, layout), inputs), ()))
    torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_a_shared_prompt_gives_what_copies_of_it_give():
    shared = PackedLayout.from_forest([30, 9, 14], [-1, 0, 0])
    copies = PackedLayout.from_lengths([39, 44])
    places = torch.tensor([*range(39), *range(30), *range(39, 53)])
    inputs = [x.double() for x in tensors(53, 4, 2)]
    own = torch.tensor([*range(39), *range(69, 83)])  # of each shared token one copy
    ours = gradients(lambda *x: packed_attention(*x, shared), inputs)
    theirs = gradients(lambda *x: packed_attention(*(y[places] for y in x), copies)[own], inputs)
    for mine, other in zip(sum(ours, ()), sum(theirs, ()), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    layout = forest()
    inputs = [x.requires_grad_() for x in tensors(14, 4, 2, dtype=dtype)]
    mask, options = (layout.visible_until, layout.positions, None), (0.5, 3, 1.0, "cpu")
    for sinks in (None, torch.zeros(4, requires_grad=True)):
        torch.library.opcheck(torch.ops.posttrain.packed_attention, (*inputs, *mask, sinks, *options))
    results = [x.detach() for x in torch.ops.posttrain.packed_attention(*inputs, *mask, None, *options)]
    saved = [results[0], *(x.detach() for x in inputs)]
    torch.library.opcheck(torch.ops.posttrain.packed_attention_backward, (*saved, *mask, *results, *options))


def test_backends_and_their_reasons():
    q = torch.ones(1, 1, 1)
    assert backend_for("packed_attention", q) == "cpu"
    widened = Choice("cpu", "has cpu kernels for float32, which bfloat16 is widened to")
    assert explain("packed_attention", q.bfloat16()) == widened


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), max_size=6), window=st.none() | st.integers(1, 10))
def test_any_lengths(lengths, window):
    layout = PackedLayout.from_lengths(lengths)
    inputs = tensors(layout.num_tokens, 2, 1)
    truth = reference.packed_attention(*[x.double() for x in inputs], layout, window=window)
    assert_true_to(packed_attention(*inputs, layout, window=window), truth)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 3}], ids=str)
def test_gradcheck(options):
    layout = PackedLayout.from_forest([3, 2, 2], [-1, 0, 0])
    inputs = [x.requires_grad_() for x in tensors(7, 2, 1, width=4, dtype=torch.float64)]
    sinks = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)

    def attend(q, k, v, sinks):
        return packed_attention(q, k, v, layout, sinks=sinks, **options)

    assert torch.autograd.gradcheck(attend, [*inputs, sinks], eps=1e-6, atol=1e-8, rtol=1e-6)


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


def test_other_branches_change_no_bit():
    """Of outputs and gradients; more queries and keys than a tile has, and more than one chunk of the backward."""
    layout = PackedLayout.from_forest([150, 70, 90, 40], [-1, 0, 0, -1])
    inputs = tensors(350, 4, 2)
    before = packed_attention(*inputs, layout)
    inputs = [x.requires_grad_() for x in inputs]
    branches = [slice(150, 220), slice(220, 310), slice(310, 350)]
    first = [torch.autograd.grad(packed_attention(*inputs, layout)[b].sum(), inputs) for b in branches]
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        x[220:310] += torch.randn_like(x[220:310])
    changed = [x.requires_grad_() for x in changed]
    after = packed_attention(*changed, layout)
    assert torch.equal(before[:220], after[:220]) and torch.equal(before[310:], after[310:])
    assert not torch.equal(before[220:310], after[220:310])
    for branch, grads in zip(branches, first, strict=True):
        again = torch.autograd.grad(packed_attention(*changed, layout)[branch].sum(), changed)
        same = all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
        assert same == (branch.start != 220)


@pytest.mark.parametrize("which", range(4), ids=["out", "grad_q", "grad_k", "grad_v"])
def test_errors_lean_to_no_side(which):
    layout = PackedLayout.from_forest([60, 20, 30], [-1, 0, 0])

    def result(function, dtype):
        def call(seed):
            generator = torch.Generator().manual_seed(seed)
            inputs = [torch.randn(110, heads, 16, generator=generator) + 0.5 for heads in (2, 1, 1)]
            out, grads = gradients(lambda *x: function(*x, layout), [x.to(dtype) for x in inputs])
            return (*out, *grads)[which]

        return call

    ours = result(packed_attention, torch.float32)
    assert_unbiased(ours, result(plain_attention, torch.float32), result(reference.packed_attention, torch.float64))


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
        (lambda q, k, v: (q[:, :0], k, v), r"heads, D and Dv of at least 1; got q \[10, 0, 8\]"),
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), r"heads, D and Dv of at least 1; .*k \[10, 0, 8\]"),
        (lambda q, k, v: (q[..., :0], k[..., :0], v), r"heads, D and Dv of at least 1; got q \[10, 4, 0\]"),
        (lambda q, k, v: (q, k, v[..., :0]), r"heads, D and Dv of at least 1; .*v \[10, 2, 0\]"),
        (lambda q, k, v: (q, k.double(), v), "torch.float32, torch.float64, torch.float32"),
        (lambda q, k, v: (q, k, v.to("meta")), "v on meta"),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        packed_attention(*change(*tensors(10, 4, 2)), PackedLayout.from_lengths([10]))


@pytest.mark.parametrize(
    "option",
    [{"sinks": torch.zeros(3)}, {"window": 0}, {"softcap": 0.0}, {"softcap": -1.0}, {"softcap": float("inf")}],
    ids=str,
)
def test_bad_options_are_errors(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        packed_attention(*tensors(10, 4, 2), PackedLayout.from_lengths([10]), **option)


@pytest.mark.parametrize("window", [2.5, True, "3"], ids=str)
def test_a_window_is_an_integer(window):
    with pytest.raises(ValueError, match=f"window must be an integer of at least 1, got {window!r}"):
        packed_attention(*tensors(10, 4, 2), PackedLayout.from_lengths([10]), window=window)


@pytest.mark.parametrize("window", [2**31, 2**32 + 1, 2**70])
def test_a_window_beyond_int32_cuts_nothing(window):
    inputs, layout = tensors(14, 4, 2), forest()
    ours = gradients(lambda *x: packed_attention(*x, layout, window=window), inputs)
    whole = gradients(lambda *x: packed_attention(*x, layout), inputs)
    assert all(torch.equal(a, b) for a, b in zip(sum(ours, ()), sum(whole, ()), strict=True))
