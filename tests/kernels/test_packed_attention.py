"""The Triton kernels of packed_attention, on the GPU or, small, interpreted on the CPU."""

from functools import partial

import pytest
import torch
from forests import forests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_attention import plain_attention
from tolerance import check, gradients
from torch import Tensor

from posttrain import ops
from posttrain.kernels import packed_attention as kernels
from posttrain.ops import reference
from posttrain.ops.layout import PackedLayout

pytestmark = pytest.mark.usefixtures("poison", "triton")
FORESTS = {
    "sequences": ([3, 40, 1, 0, 37], [-1] * 5),
    "prompt with completions": ([45, 20, 7, 33], [-1, 0, 0, 0]),
    "tree after a sequence": ([10, 30, 5, 12, 40, 3], [-1, -1, 1, 2, 1, -1]),
}
OPTIONS = [{}, {"window": 9}, {"softcap": 2.0, "scale": 0.3}]


def operands(tokens: int, heads: int, key_heads: int, width: int, device: str, dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, width), (tokens, key_heads, width), (tokens, key_heads, width)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def both(layout: PackedLayout, **options):
    """The op and its definition."""
    return tuple(
        partial(lambda f, *x, **o: f(*x[:3], layout, sinks=x[3] if len(x) > 3 else None, **o), function, **options)
        for function in (ops.packed_attention, reference.packed_attention)
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS)
def test_agrees_with_the_reference(forest, options, triton_device) -> None:
    layout = PackedLayout.from_forest(*forest, device=triton_device)
    check(*both(layout, **options), operands(layout.num_tokens, 4, 2, 16, triton_device))


def test_full_blocks_widths_and_strides(triton_device) -> None:
    layout = PackedLayout.from_forest([100, 70, 36], [-1, 0, 0], device=triton_device)
    q, k, v = operands(206, 3, 1, 40, triton_device)
    check(*both(layout), [q[..., :20], k[..., 20:], v])


def test_heads_of_one_tensor_and_their_strides(triton_device) -> None:
    layout = PackedLayout.from_forest([40, 20, 10], [-1, 0, 0], device=triton_device)
    q, k, v = operands(70, 3, 1, 40, triton_device)
    fused = torch.cat([q, k, v], 1).transpose(1, 2).contiguous().transpose(1, 2)
    check(*both(layout), [x.contiguous() for x in fused.split([3, 1, 1], 1)])
    check(*both(layout), list(fused.split([3, 1, 1], 1)))


def test_output_gradients_without_strides_and_with_gaps(triton_device) -> None:
    layout = PackedLayout.from_forest([10, 7, 6], [-1, 0, 0], device=triton_device)
    op, truth = both(layout)
    inputs = operands(23, 4, 2, 16, triton_device)
    check(lambda *x: op(*x).sum(), lambda *x: truth(*x).sum(), inputs)
    check(lambda *x: op(*x).transpose(1, 2)[::2], lambda *x: truth(*x).transpose(1, 2)[::2], inputs)


@pytest.mark.parametrize("level", [1e4, -1e4])
def test_scores_of_ten_thousand(level, triton_device) -> None:
    """Whole numbers apart, so that many keys matter and only the softmax can err.

    The column that lifts them gets no gradient: its factor 100 would also lift the rounding of sums that cancel.
    """
    layout = PackedLayout.from_forest([10, 7, 6, 9], [-1, 0, 0, -1], device=triton_device)
    q, k, v = operands(32, 4, 2, 8, triton_device)
    sinks = torch.tensor([level - 2, level, level + 2, 0.0], device=triton_device)

    def lifted(function):
        def call(q, k, v, sinks):
            q = torch.cat([q, torch.full_like(q[..., :1], level / 100)], -1)
            k = torch.cat([k, torch.full_like(k[..., :1], 100)], -1)
            return function(q, k, v, sinks)

        return call

    check(*(lifted(function) for function in both(layout, scale=1.0)), [q.round(), k.round(), v, sinks])


def test_sinks(triton_device) -> None:
    layout = PackedLayout.from_lengths([33, 8], device=triton_device)
    sinks = torch.tensor([0.5, 20.0, -20.0, -1.0], device=triton_device)
    check(*both(layout), [*operands(41, 4, 2, 16, triton_device), sinks])


@pytest.mark.parametrize("lengths", [[], [1], [0, 0]], ids=str)
def test_few_tokens(lengths, triton_device) -> None:
    layout = PackedLayout.from_lengths(lengths, device=triton_device)
    check(*both(layout), operands(layout.num_tokens, 2, 1, 16, triton_device))


@pytest.mark.parametrize("queries, keys, window", [(64, 32, None), (32, 64, None), (128, 32, 50), (16, 16, None)])
def test_any_blocks(queries, keys, window, monkeypatch, triton_device) -> None:
    """Runs of blocks that all, some or none of a tile's queries see begin and end anywhere in a tile."""
    for table in ("FLOAT_FORWARD", "FLOAT_DKV", "FLOAT_DQ"):
        monkeypatch.setattr(kernels, table, {64: kernels.Blocks(queries, keys, 4, 1)})
    layout = PackedLayout.from_forest([70, 36, 40, 33, 5, 64, 31], [-1, 0, 1, 0, -1, 4, 4], device=triton_device)
    check(*both(layout, window=window), operands(layout.num_tokens, 1, 1, 16, triton_device))


@pytest.mark.parametrize("width", [128, 256])
def test_runs_that_begin_within_a_block_of_the_schedule(width, triton_device) -> None:
    """The second sequence begins at 48, and after its first branch keys from 96 on are seen again."""
    layout = PackedLayout.from_forest([48, 12, 36, 48], [-1, -1, 1, 1], device=triton_device)
    check(*both(layout), operands(144, 1, 1, width, triton_device))


@pytest.mark.parametrize("window", [1, 40, 2**31 - 1])
def test_windows_in_trees(window, triton_device) -> None:
    layout = PackedLayout.from_forest([90, 70, 40, 5, 36], [-1, 0, 0, -1, 3], device=triton_device)
    check(*both(layout, window=window), operands(layout.num_tokens, 1, 1, 16, triton_device))


def test_what_no_window_reaches_is_not_read(triton_device) -> None:
    """NaN would spread to whatever multiplies it by 0."""
    layout = PackedLayout.from_forest([160, 96, 64], [-1, 0, 0], device=triton_device)
    q, k, v = operands(320, 1, 1, 16, triton_device)
    v[:96] = torch.nan
    out, (grad_q, _, _) = gradients(both(layout, window=16)[0], [q, k, v])
    assert out[0][128:].isfinite().all() and grad_q[128:].isfinite().all() and out[0][:96].isnan().all()
    v[:96] = 0
    v.requires_grad_(), k.requires_grad_()
    out = ops.packed_attention(q, k, v, layout, window=16)
    incoming = torch.where(torch.arange(320, device=triton_device)[:, None, None] < 288, 1.0, torch.nan).expand_as(out)
    for grad in torch.autograd.grad(out, (k, v), incoming):
        assert grad[:96].isfinite().all() and grad[288:].isnan().all()


def test_not_a_number_in_queries_and_keys(triton_device) -> None:
    """It reaches the outputs that it is a part of, and no others."""
    layout = PackedLayout.from_forest([10, 7, 6, 9], [-1, 0, 0, -1], device=triton_device)
    q, k, v = operands(32, 1, 1, 16, triton_device)
    q[3] = torch.nan
    k[12] = torch.nan
    reached = ops.packed_attention(q, k, v, layout).isnan().all(2).any(1)
    assert reached.nonzero().flatten().tolist() == [3, *range(12, 17)]
    assert ops.packed_attention(q, k, v, layout)[~reached].isfinite().all()


@pytest.mark.parametrize("heads, key_heads", [(70, 10), (7, 1), (5, 5)])
def test_numbers_of_heads(heads, key_heads, triton_device) -> None:
    layout = PackedLayout.from_forest([7, 5, 2], [-1, 0, 0], device=triton_device)
    check(*both(layout), operands(14, heads, key_heads, 16, triton_device))


@pytest.mark.parametrize("width, value_width", [(257, 8), (8, 320)])
def test_heads_wider_than_the_tiles(width, value_width, triton_device) -> None:
    layout = PackedLayout.from_lengths([2], device=triton_device)
    q, k, v = (torch.zeros(2, 1, size, device=triton_device) for size in (width, width, value_width))
    with pytest.raises(ValueError, match=rf"up to 256 wide, got q \[2, 1, {width}\] and v \[2, 1, {value_width}\]"):
        ops.packed_attention(q, k, v, layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, triton_device) -> None:
    if triton_device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16")
    layout = PackedLayout.from_lengths([40, 9], device=triton_device)
    op, truth = both(layout)
    check(op, truth, operands(49, 2, 2, 16, triton_device, dtype), partial(plain_attention, layout=layout))


def test_runs_repeat_bit_for_bit(triton_device) -> None:
    layout = PackedLayout.from_forest([45, 20, 7], [-1, 0, 0], device=triton_device)
    inputs = operands(72, 4, 2, 16, triton_device)
    first, second = (sum(gradients(both(layout)[0], inputs), ()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_other_sequences_change_no_bit_while_their_lengths_stay(triton_device) -> None:
    layout = PackedLayout.from_forest([33, 20, 9, 30, 50], [-1, 0, 0, -1, -1], device=triton_device)
    inputs = operands(142, 2, 1, 16, triton_device)
    others = torch.ones(142, 1, 1, device=triton_device)
    others[62:92] = 0
    changed = [x + others for x in inputs]
    before, after = (sum(gradients(both(layout)[0], x), ()) for x in (inputs, changed))
    assert all(torch.equal(a[62:92], b[62:92]) for a, b in zip(before, after, strict=True))
    assert not any(torch.equal(a[:62], b[:62]) for a, b in zip(before, after, strict=True))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(forest=forests(5, 30, least=1), window=st.none() | st.integers(1, 40), softcap=st.none() | st.just(1.5))
def test_any_forest_with_gradients(forest, window, softcap, triton_device) -> None:
    layout = PackedLayout.from_forest(*forest, device=triton_device)
    sinks = torch.tensor([1.0, -1.0], device=triton_device)
    inputs = [*operands(layout.num_tokens, 2, 1, 16, triton_device), sinks]
    check(*both(layout, window=window, softcap=softcap), inputs)


def test_opcheck(triton_device) -> None:
    layout = PackedLayout.from_forest([6, 3, 4], [-1, 0, 0], device=triton_device)
    inputs = [x.requires_grad_() for x in operands(13, 2, 1, 16, triton_device)]
    mask = layout.visible_until, layout.positions, layout.schedule
    sinks = torch.zeros(2, device=triton_device, requires_grad=True)
    options = 0.5, 3, 1.0, "triton"
    torch.library.opcheck(torch.ops.posttrain.packed_attention, (*inputs, *mask, sinks, *options))
    results = torch.ops.posttrain.packed_attention(*inputs, *mask, sinks, *options)
    results, inputs = [x.detach() for x in results], [x.detach() for x in inputs]
    torch.library.opcheck(
        torch.ops.posttrain.packed_attention_backward, (results[0], *inputs, *mask, *results, *options)
    )
