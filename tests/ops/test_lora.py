"""lora_linear: true to the reference, differentiable, one saved input."""

from functools import partial

import pytest
import torch
from lora_operands import of, operands, plain, several
from tolerance import HALF, check
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain import ops
from posttrain.ops import LoraLayer, lora_linear, quantize_nf4, reference
from posttrain.ops.lora_layer import Options, flatten
from posttrain.ops.lora_products import project_gradient

# rows, K, N, R
SHAPES = [(0, 8, 8, 2), (1, 13, 7, 1), (63, 97, 40, 8), (100, 100, 129, 13), (1000, 64, 33, 64), (17, 40, 24, 256)]
RANKS = (0, 1, 8, 13, 64, 256)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(shape, dtype) -> None:
    check(of(lora_linear), of(reference.lora_linear), operands(*shape, dtype))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("rank", RANKS)
def test_agrees_for_every_rank_without_bias_and_in_three_dimensions(rank) -> None:
    x, *rest, _ = operands(60, 37, 50, rank)
    op = partial(lora_linear, scaling=2.0)
    check(op, partial(reference.lora_linear, scaling=2.0), [x.view(3, 20, 37), *rest])


@pytest.mark.usefixtures("poison")
def test_agrees_for_strided_inputs_and_gradients() -> None:
    x, weight, a, b, bias = operands(80, 60, 48, 6)
    strided = [x[::2, ::3], weight[:, ::3], a[::2, ::3], b.T.contiguous().T[:, ::2], bias]
    check(of(lora_linear), of(reference.lora_linear), strided)
    check(lambda *o: of(lora_linear)(*o).T, lambda *o: of(reference.lora_linear)(*o).T, strided)
    expanded = [x[0, :20].expand(40, 20), *strided[1:]]
    check(of(lora_linear), of(reference.lora_linear), expanded)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_gradient_of_many_tiles(dtype, monkeypatch) -> None:
    from posttrain.ops import lora_products

    monkeypatch.setattr(lora_products, "_TILE", 500)
    check(of(lora_linear), of(reference.lora_linear), operands(100, 100, 33, 8, dtype), plain)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_as_good_as_pytorch(dtype) -> None:
    check(of(lora_linear), of(reference.lora_linear), operands(63, 100, 97, 8, dtype), plain)


@pytest.mark.parametrize("dtype", HALF)
def test_float32_adapters_on_a_half_precision_base_get_float32_gradients(dtype) -> None:
    x, weight, a, b, bias = operands(63, 100, 97, 8)
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    truth = [t.detach().float().requires_grad_() for t in (x, a, b)]
    ours = [t.detach().requires_grad_() for t in (x, a, b)]
    incoming = torch.full((63, 97), 0.5)
    lora_linear(ours[0], weight, *ours[1:], 0.75, bias).backward(incoming.to(dtype))
    reference.lora_linear(truth[0], weight.float(), *truth[1:], 0.75, bias.float()).backward(incoming)
    for mine, true in zip(ours[1:], truth[1:], strict=True):
        assert mine.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, true.grad)


@pytest.mark.parametrize("size", [2.0**14, 2.0**-60])
def test_large_and_small_values_scale_exactly(size) -> None:
    x, weight, a, b, _ = operands(30, 50, 40, 4)
    assert torch.equal(lora_linear(size * x, weight, a, b), size * lora_linear(x, weight, a, b))


def test_gradcheck() -> None:
    inputs = [t.requires_grad_() for t in operands(5, 7, 6, 3, torch.float64)]
    assert torch.autograd.gradcheck(of(lora_linear), inputs, eps=1e-6, atol=1e-8, rtol=1e-6)
    dropping = of(lora_linear, dropout=0.4, seed=1)
    assert torch.autograd.gradcheck(dropping, inputs, eps=1e-6, atol=1e-8, rtol=1e-6)


# Several adapters


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_each_row_uses_the_adapter_it_names(dropout) -> None:
    inputs, adapter = several()
    options = {"adapter": adapter, "dropout": dropout, "seed": 7}

    def call(op):
        return lambda x, weight, a, b, bias: op(x, weight, a, b, (0.5, 1.0, 2.0), bias, **options)

    check(call(lora_linear), call(reference.lora_linear), inputs)
    y = call(lora_linear)(*inputs)
    x, weight, a, b, bias = inputs
    assert torch.equal(y[adapter == -1], functional.linear(x, weight, bias)[adapter == -1])
    if dropout == 0:
        alone = lora_linear(x, weight, a[1], b[1], 1.0, bias)
        torch.testing.assert_close(y[adapter == 1], alone[adapter == 1])


def test_an_adapter_that_no_row_names_does_no_harm_and_has_no_gradient() -> None:
    (x, weight, a, b, bias), _ = several()
    a[2] = float("inf")
    a.requires_grad_()
    y = lora_linear(x, weight, a, b, 1.0, bias, adapter=torch.zeros(40, dtype=torch.int64))
    assert torch.equal(y, y.nan_to_num(nan=-1.0))
    b_grad = torch.autograd.grad(y.sum(), a)[0]
    assert b_grad[0].abs().sum() > 0 and b_grad[1].eq(0).all()


def test_gradcheck_of_several_adapters() -> None:
    inputs, adapter = several(torch.float64)
    x, weight, a, b, _ = (t.requires_grad_() for t in inputs)
    small = (x[:6, :5].detach().requires_grad_(), weight[:4, :5].detach(), a[..., :5].detach().requires_grad_())
    op = lambda x, a, b: lora_linear(x, small[1], a, b, (0.5, 1.0, 2.0), adapter=adapter[:6])  # noqa: E731
    inputs = (small[0], small[2], b[:, :4].detach().requires_grad_())
    assert torch.autograd.gradcheck(op, inputs, eps=1e-6, atol=1e-8, rtol=1e-6)


# Adapter off, dropout, frozen and trained parts


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_without_adapter_the_result_is_exactly_the_base(dtype) -> None:
    x, weight, _, _, bias = operands(63, 100, 97, 8, dtype)
    assert torch.equal(lora_linear(x, weight, bias=bias), functional.linear(x, weight, bias))
    check(
        lambda *o: lora_linear(*o), lambda *o: reference.lora_linear(*o), [x, weight], lambda *o: functional.linear(*o)
    )


def test_dropout_is_that_of_the_seed_forward_and_backward() -> None:
    inputs = operands(63, 97, 40, 8)
    check(of(lora_linear, dropout=0.3, seed=5), of(reference.lora_linear, dropout=0.3, seed=5), inputs)
    first, again, other = (of(lora_linear, dropout=0.3, seed=seed)(*inputs) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_dropout_keeps_the_mean() -> None:
    x, _, a, b, _ = operands(16, 64, 8, 4)
    weight = torch.zeros(8, 64)
    samples = torch.stack([lora_linear(x, weight, a, b, dropout=0.25, seed=seed) for seed in range(400)])
    error = samples.mean(0) - lora_linear(x, weight, a, b)
    assert (error.abs() <= 5 * samples.std(0) / 20).all()


def test_a_frozen_base_gets_no_gradient_and_only_x_is_saved() -> None:
    x, weight, a, b, bias = operands(64, 100, 80, 8)
    for tensor in (x, a, b):
        tensor.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(x, weight, a, b, 0.75, bias, dropout=0.1)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in (x, weight, a, b, bias)}
    y.sum().backward()
    assert weight.grad is None and bias.grad is None


@pytest.mark.parametrize("trained", range(5))
def test_any_operand_may_be_the_only_one_that_trains(trained) -> None:
    inputs = operands(20, 12, 10, 3)
    inputs[trained].requires_grad_()
    gradient = torch.autograd.grad(of(lora_linear)(*inputs).square().sum(), inputs[trained])[0]
    true = [t.detach().double() for t in inputs]
    true[trained].requires_grad_()
    truth = torch.autograd.grad(of(reference.lora_linear)(*true).square().sum(), true[trained])[0]
    torch.testing.assert_close(gradient, truth.float())


class Products(TorchDispatchMode):
    """Counts the matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "mm" in func.overloadpacket.__name__
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("needs_x", "needs_a", "needs_b", "products"),
    [
        (True, True, True, 6),  # u, dB, v, dA, v A and dy W
        (True, False, False, 3),  # v, v A and dy W
        (True, False, True, 5),
        (False, True, False, 2),  # v and dA
        (False, False, True, 2),  # u and dB
        (False, False, False, 0),
    ],
)
def test_what_is_frozen_costs_nothing(needs_x, needs_a, needs_b, products) -> None:
    x, weight, a, b, bias = operands(20, 12, 10, 3)
    layer = flatten("lora_linear", "layer", x, LoraLayer(weight, a, b, 0.75, bias), False)
    needs = [[needs_x], [False, False, needs_a, needs_b]]
    with Products() as counted:
        project_gradient([x.new_ones(20, 10)], x, [layer], Options(None, 0.0, 0), needs, "cpu")
    assert counted.count == products


def test_same_bits_every_time() -> None:
    results = []
    for _ in range(2):
        inputs = [t.requires_grad_() for t in operands(300, 97, 65, 8)]
        y = of(lora_linear, dropout=0.1, seed=3)(*inputs)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# NF4 base


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows", [3, 40])
def test_an_nf4_base(rows, nested) -> None:
    x, weight, a, b, bias = operands(rows, 97, 40, 8)
    packed = quantize_nf4(weight, nested=nested)
    check(
        lambda x, a, b, bias: lora_linear(x, packed, a, b, 0.75, bias),
        lambda x, a, b, bias: reference.lora_linear(x, packed, a, b, 0.75, bias),
        [x, a, b, bias],
    )
    check(lambda x: lora_linear(x, packed), lambda x: reference.lora_linear(x, packed), [x])


@pytest.mark.parametrize("dtype", HALF)
def test_an_nf4_base_in_half_precision(dtype) -> None:
    x, weight, a, b, bias = operands(40, 97, 33, 8, dtype)
    packed = quantize_nf4(weight)
    dense = ops.nf4_dequantize(packed)
    check(
        lambda x, a, b: lora_linear(x, packed, a, b, 0.75, bias),
        lambda x, a, b: reference.lora_linear(x, packed, a, b, 0.75, bias.to(x.dtype)),
        [x, a, b],
        lambda x, a, b: plain(x, dense, a, b, bias),
    )
