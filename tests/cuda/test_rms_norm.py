"""rms_norm with the CUDA kernel: rows in registers, with and without a residual."""

from functools import partial

import pytest
import torch
from tolerance import HALF, assert_as_good_as, assert_true_to, assert_unbiased, check
from torch import Tensor

from posttrain import ops
from posttrain.ops import reference

pytestmark = [pytest.mark.usefixtures("poison", "cuda"), pytest.mark.filterwarnings("ignore:overflow encountered")]
EPS = 1e-6
# From one warp's share, over widths that aren't a multiple of a vector, to more than a block holds.
SHAPES = [(0, 8), (3, 0), (1, 1), (63, 100), (2, 3, 64), (5, 97), (3, 4096), (2, 2503), (2, 20000)]


def operands(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """x, weight, residual."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(device, dtype) for s in (shape, shape[-1:], shape)]


def as_transformers(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    wide = total.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype), total


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(shape, device) -> None:
    x, weight, residual = operands(shape, device)
    wide = [t.cpu().double() for t in (x, weight, residual)]
    assert_true_to(ops.rms_norm(x, weight, EPS).cpu(), reference.rms_norm(*wide[:2], EPS))
    truths = reference.rms_norm(*wide[:2], EPS, wide[2])
    for ours, true in zip(ops.rms_norm(x, weight, EPS, residual), truths, strict=True):
        assert_true_to(ours.cpu(), true)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [(63, 100), (3, 4096), (2, 20000)], ids=str)
def test_half_precision_is_as_good_as_transformers(shape, dtype, device) -> None:
    x, weight, residual = operands(shape, device, dtype)
    ours = ops.rms_norm(x, weight, EPS, residual)
    peers = as_transformers(x.cpu(), weight.cpu(), residual.cpu())
    truths = reference.rms_norm(x.cpu().float(), weight.cpu().float(), EPS, residual.cpu().float())
    for own, peer, true in zip(ours, peers, truths, strict=True):
        assert_as_good_as(own.cpu(), peer, true)
    x, weight = x.cpu(), weight.cpu().float() * (1 + 2**-12)  # float32 weights that half precision can't hold
    wide = ops.rms_norm(x.to(device), weight.to(device), EPS)
    peer = as_transformers(x, weight, torch.zeros_like(x))[0].to(dtype)
    assert_as_good_as(wide.cpu(), peer, reference.rms_norm(x.float(), weight, EPS))


def test_strides_and_places(device) -> None:
    x, weight, residual = operands((10, 66), device)
    y, total = ops.rms_norm(x[:, ::2], weight[::2], EPS, residual[:, 33:])
    assert torch.equal(total, x[:, ::2] + residual[:, 33:])
    assert_true_to(y.cpu(), reference.rms_norm(*(t.cpu().double() for t in (total, weight[::2])), EPS))
    flat = torch.randn(1 + 10 * 64, device=device)
    shifted = flat[1:].view(10, 64)
    assert_true_to(
        ops.rms_norm(shifted, weight[:64]).cpu(), reference.rms_norm(shifted.cpu().double(), weight[:64].cpu().double())
    )


def test_a_row_alone_and_again(device) -> None:
    x, weight, residual = operands((63, 100), device)
    whole = ops.rms_norm(x, weight, EPS, residual)
    again = ops.rms_norm(x, weight, EPS, residual)
    alone = ops.rms_norm(x[17:18].clone(), weight, EPS, residual[17:18].clone())
    for y, second, row in zip(whole, again, alone, strict=True):
        assert torch.equal(y, second) and torch.equal(y[17:18], row)


def test_extreme_values(device) -> None:
    x, weight, _ = operands((4, 100), device)
    x = x * torch.tensor([1e4, 1e-4, 1e-12, 0.0], device=device)[:, None]
    assert_true_to(ops.rms_norm(x, weight).cpu(), reference.rms_norm(x.cpu().double(), weight.cpu().double()))


def test_errors_have_no_side(device) -> None:
    def problem(seed: int) -> list[Tensor]:
        return [t.abs() for t in operands((8, 200), device, seed=seed)]

    def peer(seed: int) -> Tensor:
        x, weight, residual = (t.cpu() for t in problem(seed))
        return as_transformers(x, weight, residual)[0]

    def truth(seed: int) -> Tensor:
        x, weight, residual = (t.cpu().double() for t in problem(seed))
        return reference.rms_norm(x, weight, EPS, residual)[0]

    def ours(seed: int) -> Tensor:
        x, weight, residual = problem(seed)
        return ops.rms_norm(x, weight, EPS, residual)[0].cpu()

    assert_unbiased(ours, peer, truth)


def test_the_gradient_is_that_of_triton(device) -> None:
    x, weight, residual = operands((3, 40), device)

    def norm(function, x, weight, residual):
        return function(x, weight, EPS, residual)

    check(partial(norm, ops.rms_norm), partial(norm, reference.rms_norm), [x, weight, residual])
    torch.library.opcheck(torch.ops.posttrain.rms_norm, (x, weight, EPS, residual, "cuda"))
