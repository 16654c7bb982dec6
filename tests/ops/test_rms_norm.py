"""rms_norm on the CPU: true to the reference, differentiable, reproducible, and clear about wrong arguments."""

import pytest
import torch
from tolerance import HALF, assert_true_to, assert_unbiased, check
from torch import Tensor

from posttrain import ops
from posttrain.ops import reference

SHAPES = [(0, 8), (3, 0), (1, 1), (63, 100), (100, 97), (1000, 129), (2, 3, 64), (7, 4097)]
EPS = 1e-6


def operands(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """x, weight, residual."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype) for s in (shape, shape[-1:], shape)]


def fused(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return ops.rms_norm(x, weight, EPS, residual)


def fused_reference(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return reference.rms_norm(x, weight, EPS, residual)


def as_transformers(x: Tensor, weight: Tensor) -> Tensor:
    """LlamaRMSNorm.forward."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(shape, dtype) -> None:
    x, weight, residual = operands(shape, dtype)
    check(ops.rms_norm, reference.rms_norm, [x, weight])
    check(fused, fused_reference, [x, weight, residual])


@pytest.mark.usefixtures("poison")
def test_agrees_for_strided_inputs() -> None:
    x, _, residual = operands((40, 66), torch.float32)
    weight = torch.randn(99)[::3]
    check(fused, fused_reference, [x[:, ::2], weight, residual[:, 33:]])
    check(fused, fused_reference, [x.T[:33].T, weight, residual[:, 1::2]])


def test_agrees_at_extreme_values() -> None:
    x, weight, _ = operands((4, 100), torch.float32)
    scales = torch.tensor([1e4, 1e-4, 1e-12, 0.0])
    check(ops.rms_norm, reference.rms_norm, [x * scales[:, None], weight])


def test_gradient_through_one_output_only() -> None:
    x, weight, residual = operands((5, 33), torch.float32)
    for index in (0, 1):
        check(
            lambda x, w, r, index=index: fused(x, w, r)[index] + 0 * w.sum(),
            lambda x, w, r, index=index: fused_reference(x, w, r)[index] + 0 * w.sum(),
            [x, weight, residual],
        )


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_as_good_as_transformers(dtype) -> None:
    x, weight, _ = operands((63, 100), dtype)
    check(ops.rms_norm, reference.rms_norm, [x, weight], as_transformers)


def test_weight_may_be_wider_than_x() -> None:
    x, weight, _ = operands((63, 100), torch.bfloat16)
    y = ops.rms_norm(x, weight.float())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, reference.rms_norm(x.float(), weight.float()).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 5), (2, 2, 17)])
def test_gradcheck(shape) -> None:
    inputs = [x.requires_grad_() for x in operands(shape, torch.float64)]
    options = {"eps": 1e-6, "atol": 1e-8, "rtol": 1e-6}
    assert torch.autograd.gradcheck(ops.rms_norm, inputs[:2], **options)
    assert torch.autograd.gradcheck(fused, inputs, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype) -> None:
    x, weight, residual = (t.requires_grad_() for t in operands((6, 20), dtype))
    rstd = torch.rand(6, dtype=dtype)
    for extra in (None, residual):
        torch.library.opcheck(torch.ops.posttrain.rms_norm, (x, weight, EPS, extra, "cpu"))
    for extra in (None, residual.detach()):
        arguments = (x.detach(), extra, x.detach(), weight.detach(), rstd, "cpu")
        torch.library.opcheck(torch.ops.posttrain.rms_norm_backward, arguments)


def test_compiles_without_graph_breaks_to_the_same_bits() -> None:
    x, weight, residual = operands((9, 40), torch.float32)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for inputs in ([x, weight, residual], [x[:5], weight, residual[:5]]):
        ours, theirs = ([t.detach().requires_grad_() for t in inputs] for _ in range(2))
        for a, b in zip(compiled(*ours), fused(*theirs), strict=True):
            assert torch.equal(a, b)
        sum(y.square().sum() for y in compiled(*ours)).backward()
        sum(y.square().sum() for y in fused(*theirs)).backward()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.grad, b.grad)


def test_same_bits_every_time_and_for_a_row_alone() -> None:
    x, weight, residual = operands((1000, 129), torch.float32)
    x.requires_grad_()
    weight.requires_grad_()

    def run(rows: slice) -> list[Tensor]:
        y, total = fused(x[rows], weight, residual[rows])
        return [y, total, *torch.autograd.grad([y], [x, weight], [residual[rows]])]

    whole = run(slice(None))
    for again, first in zip(run(slice(None)), whole, strict=True):
        assert torch.equal(again, first)
    for i in (0, 17, 999):
        y, total, grad_x, _ = run(slice(i, i + 1))
        assert torch.equal(y[0], whole[0][i])
        assert torch.equal(total[0], whole[1][i])
        assert torch.equal(grad_x[i], whole[2][i])


def test_errors_have_no_side() -> None:
    def problem(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(64, 200, generator=generator), torch.rand(200, generator=generator)

    def weight_gradient(function, seed: int, dtype: torch.dtype) -> Tensor:
        x, weight = (t.to(dtype).requires_grad_() for t in problem(seed))
        return torch.autograd.grad(function(x, weight).sum(), weight)[0]

    assert_unbiased(
        lambda seed: ops.rms_norm(*problem(seed)),
        lambda seed: as_transformers(*problem(seed)),
        lambda seed: reference.rms_norm(*(t.double() for t in problem(seed))),
    )
    assert_unbiased(
        lambda seed: weight_gradient(ops.rms_norm, seed, torch.float32),
        lambda seed: weight_gradient(as_transformers, seed, torch.float32),
        lambda seed: weight_gradient(reference.rms_norm, seed, torch.float64),
    )


def test_known_value() -> None:
    y = ops.rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
    assert_true_to(y, torch.tensor([[3.0, 8.0]], dtype=torch.float64) / 12.5**0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4, 8), torch.ones(7)), r"weight must be \[H\] for x \[..., H\]; got \[7\] for \[4, 8\]"),
        ((torch.tensor(1.0), torch.ones(1)), r"got \[1\] for \[\]"),
        ((torch.ones(4, 8, dtype=torch.int64), torch.ones(8)), "x must be floating, got torch.int64"),
        ((torch.ones(4, 8), torch.ones(8, device="meta")), "x is on cpu, weight on meta"),
        (
            (torch.ones(4, 8), torch.ones(8), 1e-6, torch.ones(3, 8)),
            r"residual must be like x \[4, 8\] .* got \[3, 8\]",
        ),
        ((torch.ones(4, 8), torch.ones(8), 1e-6, torch.ones(4, 8).double()), "got .* torch.float64 on cpu"),
    ],
)
def test_wrong_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ops.rms_norm(*arguments)
