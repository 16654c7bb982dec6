"""LoRA layers whose rows name their adapter, by Triton's kernels and CUDA's, on the GPU or, small, on the CPU."""

from functools import partial

import pytest
import torch
from draw import drawer
from lora_operands import SCALING, of, rows_of_adapters
from places import with_dtypes
from tolerance import HALF, check

from posttrain.ops import LoraLayer, lora_linear, lora_mlp, lora_qkv, quantize_nf4, reference

pytestmark = pytest.mark.usefixtures("poison", "place")


@pytest.fixture
def random(place):
    """`random(*shape, dtype=...)`, the same numbers every time, so small that sums over many are still near 1."""
    return drawer(place.device, 1 / 8)


@pytest.fixture
def several(random):
    """`several(rows, K, N, R)`: x, weight, A and B of three adapters, bias; and the adapter of each row."""
    return partial(rows_of_adapters, random)


@pytest.mark.parametrize("shape", [(0, 8, 8, 2), (1, 13, 7, 1), (70, 40, 130, 13), (80, 33, 20, 40)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_each_row_uses_the_adapter_it_names(dropout, shape, several) -> None:
    inputs, adapter = several(*shape)
    options = {"adapter": adapter, "dropout": dropout, "seed": 7}
    check(of(lora_linear, SCALING, **options), of(reference.lora_linear, SCALING, **options), inputs)


@with_dtypes(*HALF)
@pytest.mark.parametrize("shape", [(63, 100, 97, 8), (40, 128, 64, 8)], ids=str)
@pytest.mark.parametrize("by_row", [False, True])
def test_float32_adapters_on_a_half_precision_base_get_float32_gradients(by_row, shape, dtype, several) -> None:
    (x, weight, a, b, bias), adapter = several(*shape)
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    a, b, scaling, options = (a, b, SCALING, {"adapter": adapter}) if by_row else (a[0], b[0], 0.75, {})
    truth = [t.detach().float().requires_grad_() for t in (x, a, b)]
    ours = [t.detach().requires_grad_() for t in (x, a, b)]
    incoming = torch.full((shape[0], shape[2]), 0.5, device=x.device)
    lora_linear(ours[0], weight, *ours[1:], scaling, bias, **options).backward(incoming.to(dtype))
    wide = weight.float(), bias.float()
    reference.lora_linear(truth[0], wide[0], *truth[1:], scaling, wide[1], **options).backward(incoming)
    for mine, true in zip(ours[1:], truth[1:], strict=True):
        assert mine.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, true.grad)


def test_gradients_have_the_same_bits_every_time(several) -> None:
    inputs, adapter = several(70, 40, 130, 13)
    results = []
    for _ in range(2):
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = of(lora_linear, SCALING, adapter=adapter, dropout=0.1, seed=3)(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for first, again in zip(*results, strict=True):
        assert torch.equal(first, again)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_an_adapter_that_no_row_names_does_no_harm_and_has_no_gradient(random, place) -> None:
    x, weight, a, b = random(20, 30), random(10, 30), random(2, 4, 30), random(2, 10, 4)
    a[1] = float("inf")
    a.requires_grad_()
    y = lora_linear(x, weight, a, b, adapter=torch.zeros(20, dtype=torch.int64, device=place.device))
    assert y.isfinite().all()
    grad = torch.autograd.grad(y.sum(), a)[0]
    assert grad[0].abs().sum() > 0 and grad[1].eq(0).all()


def test_strided_operands_and_three_dimensions(several) -> None:
    (x, weight, a, b, bias), adapter = several(80, 60, 48, 6)
    inputs = [x[::2, ::3].view(2, 20, 20), weight[:, ::3], a[:, ::2, ::3], b.mT.contiguous().mT[..., ::2], bias]
    options = {"adapter": adapter[::2].view(2, 20)}
    check(of(lora_linear, SCALING, **options), of(reference.lora_linear, SCALING, **options), inputs)


@pytest.mark.parametrize("rows", [3, 20])
def test_an_nf4_base(rows, several) -> None:
    (x, weight, a, b, bias), adapter = several(rows, 64, 40, 8)
    packed = quantize_nf4(weight, nested=True)

    def call(op, scaling, **options):
        return lambda x, a, b, bias: op(x, packed, a, b, scaling, bias, **options)

    def both(scaling, *inputs, **options):
        check(call(lora_linear, scaling, **options), call(reference.lora_linear, scaling, **options), inputs)

    both(SCALING, x, a, b, bias, adapter=adapter)
    both(0.5, x, a[0], b[0], bias)
    both(0.5, x, a[0], b[0], bias, dropout=0.3, seed=1)
    check(lambda x: lora_linear(x, packed), lambda x: reference.lora_linear(x, packed), [x])


@pytest.mark.parametrize("by_row", [False, True])
def test_qkv_of_a_normed_x(by_row, several) -> None:
    """q and v have adapters, k has none, and v a base of NF4."""
    (x, weight, a, b, bias), adapter = several(10, 20, 24, 6)
    packed = quantize_nf4(weight)
    a, b, options = (a, b, {"adapter": adapter}) if by_row else (a[0], b[0], {})
    scaling = SCALING if by_row else 0.75

    def call(op):
        def run(x, norm, weight, a, b, bias):
            layers = LoraLayer(weight, a, b, scaling, bias), LoraLayer(weight[:8]), LoraLayer(packed, a, b, scaling)
            return op(x, *layers, norm=(norm, 1e-5), **options)

        return run

    check(call(lora_qkv), call(reference.lora_qkv), [8 * x, 1 + x[0], weight, a, b, bias])


@pytest.mark.parametrize("by_row", [False, True])
def test_mlp_of_nf4_matrices(by_row, several, random) -> None:
    (x, weight, a, b, _), adapter = several(10, 16, 24, 4)
    down = quantize_nf4(random(16, 24)), *((random(3, 4, 24), random(3, 16, 4)) if by_row else (b[0].T, a[0].T))
    up = quantize_nf4(weight), *((a, b) if by_row else (a[0], b[0]))
    options = {"adapter": adapter} if by_row else {}

    def call(op):
        def run(x, *t):
            layers = (LoraLayer(base, *t[i : i + 2], 0.5) for base, i in ((up[0], 0), (up[0], 2), (down[0], 4)))
            return op(x, *layers, "silu", norm=(1 + t[0].flatten()[:16].detach(), 1e-5), **options)

        return run

    check(call(lora_mlp), call(reference.lora_mlp), [8 * x, *up[1:], *up[1:], *down[1:]])
