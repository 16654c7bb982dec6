"""packed_attention through flash-attn: on a GPU that has it, and everywhere on a stand-in in plain PyTorch."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType

import flash_stand_in
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_attention import plain_attention
from tolerance import HALF, check, gradients
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from posttrain import ops
from posttrain.ops import BackendError, backend, packed_attention, reference
from posttrain.ops.layout import PackedLayout

HAS_FLASH_ATTN = torch.cuda.is_available() and find_spec("flash_attn") is not None
# Two prompts with completions, one of them empty, and sequences before, between and after them.
FOREST = ([5, 40, 7, 0, 30, 12, 3, 9, 1, 33], [-1, -1, 1, 1, 1, -1, -1, 6, 6, -1])
Kind = tuple[str, torch.dtype]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Kind:
    """flash-attn in plain PyTorch, chosen for every tensor."""
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", flash_stand_in)
    module = importlib.import_module("posttrain.ops.packed_attention")
    monkeypatch.setattr(module, "backend_for", lambda op, tensor: "flash-attn")
    return "cpu", torch.float32


@pytest.fixture(params=["stand-in", "flash-attn"])
def kind(request: pytest.FixtureRequest):
    """Device and dtype of a test that holds for the stand-in and for flash-attn itself."""
    if request.param == "stand-in":
        yield request.getfixturevalue("stand_in")
    elif HAS_FLASH_ATTN:
        with ops.use_backend("flash-attn", "packed_attention"):
            yield "cuda", torch.bfloat16
    else:
        pytest.skip("needs a GPU and flash-attn")


def operands(tokens: int, kind: Kind, heads: int = 4, key_heads: int = 2, width: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, width), (tokens, key_heads, width), (tokens, key_heads, width)]
    return [torch.randn(shape, generator=generator).to(*kind) for shape in shapes]


def sinks_of(heads: int, kind: Kind) -> Tensor:
    return torch.linspace(-3, 3, heads).to(*kind)


def compare(layout: PackedLayout, inputs: list[Tensor], **options) -> None:
    """q, k, v and perhaps sinks: results and all gradients against the reference."""

    def op(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v, sinks=None: function(q, k, v, layout, sinks=sinks, **options)

    check(op(packed_attention), op(reference.packed_attention), inputs, op(plain_attention))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("options", [{}, {"scale": 0.3, "softcap": 1.5}], ids=str)
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
def test_completions_that_share_prompts(options, with_sinks, kind) -> None:
    layout = PackedLayout.from_forest(*FOREST, device=kind[0])
    inputs = operands(layout.num_tokens, kind) + [sinks_of(4, kind)] * with_sinks
    compare(layout, inputs, **options)


@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
def test_ordinary_packing_with_windows(window, with_sinks, kind) -> None:
    layout = PackedLayout.from_lengths([7, 1, 0, 40, 12], kind[0])
    compare(layout, operands(60, kind) + [sinks_of(4, kind)] * with_sinks, window=window, softcap=2.0)


def test_a_window_that_cuts_only_what_is_alone(kind) -> None:
    layout = PackedLayout.from_forest([90, 20, 8, 4], [-1, -1, 1, 1], device=kind[0])
    compare(layout, operands(122, kind), window=32)


@st.composite
def families(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Lengths and parents of prompts, each with some completions or none."""
    lengths, parents = [], []
    for group in draw(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=4), max_size=4)):
        parents += [-1] + [len(lengths)] * (len(group) - 1)
        lengths += group
    return lengths, parents


@pytest.mark.usefixtures("poison")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    forest=families(),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 1), (6, 2)]),
    width=st.sampled_from([3, 8, 20]),
    softcap=st.none() | st.just(1.5),
    with_sinks=st.booleans(),
)
def test_any_prompts_and_completions(forest, heads, width, softcap, with_sinks, kind) -> None:
    layout = PackedLayout.from_forest(*forest, device=kind[0])
    inputs = operands(layout.num_tokens, kind, *heads, width) + [sinks_of(heads[0], kind)] * with_sinks
    compare(layout, inputs, softcap=softcap)


@pytest.mark.parametrize("forest", [([], []), ([1, 1, 1], [-1] * 3), ([1, 1], [-1, 0])], ids=str)
def test_no_token_and_single_ones(forest, kind) -> None:
    layout = PackedLayout.from_forest(*forest, device=kind[0])
    compare(layout, operands(layout.num_tokens, kind))


def test_widths_and_strides(kind) -> None:
    layout = PackedLayout.from_forest([20, 9, 4], [-1, 0, 0], device=kind[0])
    q, k, v = operands(33, kind, width=40)
    compare(layout, [q[..., :20], k[..., :20], v])
    compare(layout, [q[..., ::2], k[..., ::2], v[..., :7]])
    compare(layout, [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)])
    leaf = q.detach().requires_grad_()
    expected = torch.autograd.grad(packed_attention(leaf, k, v, layout), leaf, torch.ones_like(q))
    summed = torch.autograd.grad(packed_attention(leaf, k, v, layout).sum(), leaf)  # a gradient without strides
    assert torch.equal(summed[0], expected[0])


def test_runs_repeat_bit_for_bit(kind) -> None:
    layout = PackedLayout.from_forest(*FOREST, device=kind[0])
    inputs = [*operands(layout.num_tokens, kind), sinks_of(4, kind)]
    first, second = (
        sum(gradients(lambda *x: packed_attention(*x[:3], layout, sinks=x[3]), inputs), ()) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_half_precision_of_the_stand_in(stand_in) -> None:
    layout = PackedLayout.from_forest(*FOREST)
    for dtype in HALF:
        compare(layout, operands(layout.num_tokens, ("cpu", dtype)))


def test_gradcheck_and_opcheck(stand_in) -> None:
    layout = PackedLayout.from_forest([3, 2, 2, 4], [-1, 0, 0, -1])
    inputs = [x.requires_grad_() for x in operands(11, ("cpu", torch.float64), 2, 1, 8)]
    sinks = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)

    def attend(q, k, v, sinks):
        return packed_attention(q, k, v, layout, sinks=sinks, softcap=2.0)

    assert torch.autograd.gradcheck(attend, [*inputs, sinks], eps=1e-6, atol=1e-8, rtol=1e-6)
    segments, prompts, longest, _ = layout.varlen
    for shared, sink in ((prompts, sinks), (None, None)):
        arguments = (*inputs, sink, segments, shared, list(longest), 0.5, 0, 1.0)
        torch.library.opcheck(torch.ops.posttrain.packed_flash, arguments)


def test_boundaries_of_the_two_calls() -> None:
    segments, prompts, longest, tree = PackedLayout.from_forest([2, 4, 3, 0, 2, 1], [-1, -1, 1, 1, 1, -1]).varlen
    assert segments.tolist() == [0, 2, 6, 9, 11, 12]
    assert prompts.tolist() == [[0, 6, 6, 11, 12, 12], [0, 0, 2, 6, 6, 12]]  # 5 completion tokens over 4 of the prompt
    assert longest == (4, 6, 6) and tree == 9
    assert PackedLayout.from_forest([0, 3, 2], [-1, 0, 0]).varlen.prompts is None


def test_boundaries_wait_for_no_device() -> None:
    shared = PackedLayout.from_forest([4, 2, 3], [-1, 0, 0], device="meta")  # a device that can't be read
    assert shared.varlen.tree == 9 and shared.varlen.segments.is_meta and not shared.independent
    assert shared.varlen is shared.varlen is shared.to("meta").varlen
    assert PackedLayout.from_position_ids(torch.tensor([0, 1, 0])).to("meta").varlen.longest[0] == 2


@pytest.mark.parametrize(
    ("forest", "width", "options", "message"),
    [
        (([3, 2, 1], [-1, 0, 1]), 16, {}, "tokens 3 to 5 continue a segment and are continued up to 6"),
        (([3, 2, 2], [-1, 0, 0]), 16, {"window": 6}, "window of 6 can't cut .* completions of up to 7"),
        (([3], [-1]), 264, {}, "heads up to 256 wide, got 264"),
    ],
    ids=["tree", "window", "width"],
)
def test_what_flash_attn_cannot_do_is_an_error(forest, width, options, message, stand_in) -> None:
    layout = PackedLayout.from_forest(*forest)
    with pytest.raises(ValueError, match=message):
        packed_attention(*operands(layout.num_tokens, stand_in, width=width), layout, **options)


def test_a_window_over_positions_that_skip_is_an_error(stand_in) -> None:
    layout = PackedLayout.from_lengths([4, 3])
    layout = replace(layout, positions=torch.tensor([0, 1, 5, 6, 0, 1, 2], dtype=torch.int32))
    inputs = operands(7, stand_in)
    with pytest.raises(ValueError, match="window of 3 counts tokens, and this layout's positions don't go up by one"):
        packed_attention(*inputs, layout, window=3)
    compare(layout, inputs)


def test_only_half_precision_on_a_gpu_that_has_it(monkeypatch) -> None:
    layout = PackedLayout.from_lengths([3])
    q, k, v = operands(3, ("cpu", torch.bfloat16))
    with ops.use_backend("flash-attn", "packed_attention"):
        with pytest.raises(BackendError, match="its flash-attn kernel takes bfloat16, float16, not float32"):
            packed_attention(q.float(), k.float(), v.float(), layout)
        monkeypatch.setattr(backend, "_HAS_FLASH_ATTN", False)
        with pytest.raises(BackendError, match=r"not installed \(pip install posttrain\[flash-attn\]\)"):
            packed_attention(q, k, v, layout)
        monkeypatch.setattr(backend, "_HAS_FLASH_ATTN", True)
        with pytest.raises(BackendError, match="the tensor is on cpu"):
            packed_attention(q, k, v, layout)


def test_it_is_chosen_only_where_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(backend, "_HAS_FLASH_ATTN", True)
    with FakeTensorMode():
        tensor = torch.empty(0, device="cuda", dtype=torch.bfloat16)
    assert ops.backend_for("packed_attention", tensor) == "triton"
    with ops.use_backend("flash-attn", "packed_attention"):
        assert ops.explain("packed_attention", tensor) == ("flash-attn", "forced by use_backend")
        assert ops.backend_for("rms_norm", tensor) == "triton"
    assert ops.backend_for("packed_attention", tensor) == "triton"
    with pytest.raises(ValueError, match="unknown op 'attention'"), ops.use_backend("flash-attn", "attention"):
        pass
