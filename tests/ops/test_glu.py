"""swiglu and geglu on the CPU: true to the reference, differentiable, reproducible, clear about wrong arguments."""

from functools import partial

import pytest
import torch
from tolerance import HALF, assert_true_to, assert_unbiased, check
from torch import Tensor
from torch.nn import functional

from posttrain import ops
from posttrain.ops import reference

SHAPES = [(0, 8), (3, 0), (1,), (63, 100), (100, 97), (1000, 129), (2, 3, 64), (5, 4099)]
OPS = {
    "swiglu": (ops.swiglu, reference.swiglu, lambda gate, up: functional.silu(gate) * up),
    "geglu tanh": (ops.geglu, reference.geglu, lambda gate, up: functional.gelu(gate, approximate="tanh") * up),
    "geglu none": (
        partial(ops.geglu, approximate="none"),
        partial(reference.geglu, approximate="none"),
        lambda gate, up: functional.gelu(gate) * up,
    ),
}
each_op = pytest.mark.parametrize(("op", "truth", "peer"), OPS.values(), ids=OPS)


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """gate, up."""
    generator = torch.Generator().manual_seed(seed)
    gate, up = torch.randn(2, *shape, generator=generator).to(dtype)
    return [3 * gate, up]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_op
def test_agrees_with_the_reference(op, truth, peer, shape, dtype) -> None:
    check(op, truth, operands(shape, dtype))


@pytest.mark.usefixtures("poison")
@each_op
def test_agrees_for_strided_inputs(op, truth, peer) -> None:
    fused = torch.randn(2, 9, 134)
    check(op, truth, fused.chunk(2, dim=-1))
    check(op, truth, [fused[:, ::2, 67:], fused[:, 1:6, :67]])
    check(op, truth, [fused[..., ::2], fused[..., 1::2]])
    check(op, truth, [fused.transpose(0, 2), fused.transpose(0, 2)])
    check(op, truth, [torch.randn(9, 1).expand(9, 40), torch.randn(40).expand(9, 40)])


@pytest.mark.usefixtures("poison")
@each_op
def test_agrees_for_results_larger_than_the_cache(op, truth, peer) -> None:
    fused = torch.randn(2050, 2 * 1031)
    check(op, truth, fused.chunk(2, dim=-1))
    check(op, truth, [x.contiguous() for x in fused.chunk(2, dim=-1)])


@each_op
def test_halves_of_a_fused_projection_are_not_copied(op, truth, peer, monkeypatch) -> None:
    gate, up = torch.randn(1, 9, 134).chunk(2, dim=-1)
    copies = []
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: copies.append(self))
    monkeypatch.setattr(torch.Tensor, "clone", lambda self: copies.append(self))
    y = op(gate, up)
    assert not copies
    assert y.stride() == (9 * 67, 67, 1)


@each_op
def test_agrees_at_extreme_values(op, truth, peer) -> None:
    gate = torch.tensor([0.0, -0.0, 1e4, -1e4, 88.7, -88.7, 104.0, -104.0, 1e-30, -1e-30, 20.0, -20.0, 5.4, -5.4])
    check(op, truth, [gate, torch.full_like(gate, 2.0)])
    check(op, truth, [torch.linspace(-15, 15, 3001), torch.ones(3001)])


@pytest.mark.parametrize("dtype", HALF)
@each_op
def test_half_precision_is_as_good_as_pytorch(op, truth, peer, dtype) -> None:
    check(op, truth, operands((63, 100), dtype), peer)


@each_op
def test_gradcheck(op, truth, peer) -> None:
    inputs = [x.requires_grad_() for x in operands((3, 11), torch.float64)]
    assert torch.autograd.gradcheck(op, inputs, eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_opcheck(activation, dtype) -> None:
    gate, up = operands((6, 20), dtype)
    half = torch.randn(6, 40, dtype=dtype)[:, 20:]
    for first in (gate, half):
        arguments = (first.detach().requires_grad_(), up.detach().requires_grad_(), activation, "cpu")
        torch.library.opcheck(torch.ops.posttrain.glu, arguments)
        torch.library.opcheck(torch.ops.posttrain.glu_backward, (up, first, up, activation, "cpu"))


@each_op
def test_compiles_without_graph_breaks_to_the_same_bits(op, truth, peer) -> None:
    ours, theirs = ([x.requires_grad_() for x in operands((9, 40))] for _ in range(2))
    y, expected = torch.compile(op, backend="aot_eager", fullgraph=True)(*ours), op(*theirs)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(y, expected)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.grad, b.grad)


@each_op
def test_same_bits_every_time_alone_or_in_a_batch(op, truth, peer) -> None:
    gate, up = operands((1000, 129))
    whole = op(gate, up)
    assert torch.equal(op(gate, up), whole)
    for i in (0, 17, 999):
        assert torch.equal(op(gate[i], up[i]), whole[i])
    assert torch.equal(op(gate[:, 3:], up[:, 3:]), whole[:, 3:])


@each_op
def test_errors_have_no_side(op, truth, peer) -> None:
    def problem(seed: int) -> Tensor:
        return 4 * torch.rand(2, 64, 200, generator=torch.Generator().manual_seed(seed))

    def gate_gradient(function, seed: int, dtype: torch.dtype) -> Tensor:
        gate, up = problem(seed).to(dtype)
        gate.requires_grad_()
        return torch.autograd.grad(function(gate, up).sum(), gate)[0]

    assert_unbiased(
        lambda seed: op(*problem(seed)),
        lambda seed: peer(*problem(seed)),
        lambda seed: truth(*problem(seed).double()),
    )
    assert_unbiased(
        lambda seed: gate_gradient(op, seed, torch.float32),
        lambda seed: gate_gradient(peer, seed, torch.float32),
        lambda seed: gate_gradient(truth, seed, torch.float64),
    )


def test_known_values() -> None:
    one, two = torch.ones(1, 1), torch.full((1, 1), 2.0)
    truth = torch.float64
    assert_true_to(ops.swiglu(one, two), torch.tensor([[1.4621171572600098]], dtype=truth))  # 2 / (1 + 1/e)
    assert_true_to(ops.geglu(one, two, "none"), torch.tensor([[1.6826894921370859]], dtype=truth))  # 2 Phi(1)
    assert_true_to(ops.geglu(one, two), torch.tensor([[1.6823840105093963]], dtype=truth))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4, 8), torch.ones(4, 7)), r"up must be like gate \[4, 8\] torch.float32 on cpu; got \[4, 7\]"),
        ((torch.ones(4), torch.ones(4).half()), r".*got \[4\] torch.float16 on cpu"),
        ((torch.ones(4), torch.ones(4, device="meta")), r".*got \[4\] torch.float32 on meta"),
        ((torch.ones(4).int(), torch.ones(4).int()), r"gate must be floating \[..., F\], got torch.int32 \[4\]"),
        ((torch.tensor(1.0), torch.tensor(1.0)), r"gate must be floating \[..., F\], got torch.float32 \[\]"),
    ],
)
def test_wrong_arguments(arguments, message) -> None:
    for name, op in (("swiglu", ops.swiglu), ("geglu", ops.geglu)):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            op(*arguments)


def test_unknown_approximation() -> None:
    with pytest.raises(ValueError, match="approximate must be 'tanh' or 'none', got 'erf'"):
        ops.geglu(torch.ones(4), torch.ones(4), "erf")
