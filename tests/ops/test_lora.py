"""lora_linear: true to the reference, differentiable, one saved input, clear about wrong arguments."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from lora_operands import operands, randn, several
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


def of(op: Callable[..., Tensor], **options) -> Callable[..., Tensor]:
    """`op` as a function of the five operands."""
    return lambda x, weight, a, b, bias: op(x, weight, a, b, 0.75, bias, **options)


def plain(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """What PEFT computes."""
    return functional.linear(x, weight, bias) + functional.linear(functional.linear(x, a), b) * 0.75


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


# DoRA


def dora(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weight, A, B, bias, magnitude."""
    return [*operands(40, 97, 33, 8, dtype), 1 + randn(33, seed=9).abs().to(dtype)]


def of_dora(op: Callable[..., Tensor], base: Callable[[Tensor], object] = lambda w: w, **options):
    return lambda x, w, a, b, bias, m: op(x, base(w), a, b, 0.75, bias, magnitude=m, **options)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dora_agrees_with_the_reference(dtype) -> None:
    check(of_dora(lora_linear), of_dora(reference.lora_linear), dora(dtype))
    check(of_dora(lora_linear, dropout=0.2), of_dora(reference.lora_linear, dropout=0.2), dora(dtype))


@pytest.mark.usefixtures("poison")
def test_dora_on_an_nf4_base() -> None:
    x, weight, *rest = dora()
    packed = quantize_nf4(weight, nested=True)

    def call(op):
        return lambda x, *t: of_dora(op, lambda _: packed)(x, weight, *t)

    check(call(lora_linear), call(reference.lora_linear), [x, *rest])


@pytest.mark.parametrize("dtype", HALF)
def test_dora_in_half_precision(dtype) -> None:
    def peer(x, w, a, b, bias, m):
        norm = (w + 0.75 * b @ a).norm(dim=1).detach()
        return plain(x, w, a, b, torch.zeros_like(bias)) * (m / norm) + bias

    check(of_dora(lora_linear), of_dora(reference.lora_linear), dora(dtype), peer)


def test_dora_equals_peft() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    layers = torch.nn.ModuleDict({"layer": torch.nn.Linear(30, 20)})
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["layer"], use_dora=True), layers)
    layer = layers["layer"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    magnitude = layer.lora_magnitude_vector["default"].weight
    x = randn(10, 30, seed=1).requires_grad_()
    ours = lora_linear(x, layer.base_layer.weight, a, b, 2.0, layer.base_layer.bias, magnitude=magnitude)
    torch.testing.assert_close(ours, layer(x))
    grads = [torch.autograd.grad(y.square().sum(), (x, a, b, magnitude)) for y in (ours, layer(x))]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradcheck_of_dora() -> None:
    x, w, a, b, bias, m = (t.double() for t in (*operands(5, 7, 6, 3), 1 + randn(6, seed=9).abs()))
    op = lambda x, bias, m: of_dora(lora_linear)(x, w, a, b, bias, m)  # noqa: E731  (the norm counts as a constant)
    inputs = tuple(t.requires_grad_() for t in (x, bias, m))
    assert torch.autograd.gradcheck(op, inputs, eps=1e-6, atol=1e-8, rtol=1e-6)


# Registration, errors


def flat(dtype: torch.dtype, adapters: bool = False, nf4: bool = False) -> tuple:
    """Arguments of torch.ops.posttrain.lora_linear, all trained that may be."""
    if adapters:
        (x, weight, a, b, bias), adapter = several(dtype)
    else:
        (x, weight, a, b, bias), adapter = operands(6, 20, 12, 3, dtype), None
    x, a, b, bias = (t.detach().requires_grad_() for t in (x, a, b, bias))
    base = quantize_nf4(weight.float(), nested=True) if nf4 else weight.detach().requires_grad_()
    layer = flatten("lora_linear", "layer", x, LoraLayer(base, a, b, 0.75, bias), adapters)
    return x, *layer, adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_opcheck(dtype) -> None:
    for kind in ({}, {"adapters": True}, {"nf4": True}) if dtype == torch.float32 else ({},):
        torch.library.opcheck(torch.ops.posttrain.lora_linear, (*flat(dtype, **kind), 0.1, 3, None, 0.0, "cpu"))
        x, *layer, adapter = flat(dtype, **kind)
        grads = [torch.ones(len(x), layer[8], dtype=dtype)]
        needs = [True, False, "nf4" not in kind, True, True, True]
        arguments = (grads, x, *layer, adapter, 0.1, 3, None, 0.0, needs, "cpu")
        torch.library.opcheck(
            torch.ops.posttrain.lora_linear_backward, arguments, test_utils=("test_schema", "test_faketensor")
        )
        torch.library.opcheck(
            torch.ops.posttrain.lora_adapted_norm, [*(t.detach() if isinstance(t, Tensor) else t for t in layer), "cpu"]
        )


def test_compiles_without_graph_breaks_to_the_same_bits() -> None:
    op = of(lora_linear, dropout=0.1, seed=3)
    ours, theirs = ([t.requires_grad_() for t in operands(40, 30, 20, 4)] for _ in range(2))
    y, expected = torch.compile(op, backend="aot_eager", fullgraph=True)(*ours), op(*theirs)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(y, expected)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_autocast_changes_nothing() -> None:
    inputs = operands(20, 12, 10, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = of(lora_linear)(*inputs)
    assert torch.equal(y, of(lora_linear)(*inputs))


@pytest.mark.parametrize("scaling", [2, np.float32(2), torch.tensor(2.0), (2.0,)], ids=lambda x: type(x).__name__)
def test_any_number_is_a_scaling(scaling) -> None:
    x, weight, a, b, _ = operands(4, 12, 10, 3)
    assert torch.equal(lora_linear(x, weight, a, b, scaling), lora_linear(x, weight, a, b, 2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.ones(4, 11)},
            r"layer: needs floating x \[..., K\] and weight \[N, K\]; got .* \[4, 11\] and \[10",
        ),
        ({"x": torch.ones(4, 12).int()}, r"layer: needs floating x .*got torch.int32 \[4, 12\]"),
        ({"weight": torch.ones(10, 12).half()}, r"layer: weight must be torch.float32 like x, got torch.float16"),
        ({"bias": torch.ones(9)}, r"layer: bias must be \[10\] torch.float32, got \[9\] torch.float32"),
        ({"lora_a": torch.ones(4, 12)}, r"lora_a \[R, K\] and lora_b \[N, R\] .*got \[4, 12\] and \[10, 3\]"),
        ({"lora_b": None}, r"lora_a and lora_b belong together, got only one"),
        ({"lora_a": torch.ones(3, 12).int()}, r"must be floating, got torch.int32 and torch.float32"),
        ({"lora_a": torch.ones(3, 12, device="meta")}, r"lora_a is on meta, x on cpu"),
        ({"scaling": (1.0, 2.0)}, r"scaling must be 1 numbers, got 2"),
        ({"scaling": "2"}, r"scaling must be a number or 1 of them, got '2'"),
        ({"scaling": None}, r"scaling must be a number or 1 of them, got None"),
        ({"magnitude": torch.ones(9)}, r"magnitude must be floating \[10\], got torch.float32 \[9\]"),
        ({"magnitude": torch.ones(10), "lora_a": None, "lora_b": None}, r"magnitude is for a layer with one adapter"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and below 1, got 1.0"),
        ({"adapter": torch.zeros(4, dtype=torch.int64)}, r"lora_a \[E, R, K\] and lora_b \[E, N, R\]"),
        (
            {"adapter": -torch.ones(4, dtype=torch.int64), "lora_a": None, "lora_b": None},
            r"adapter is for layers with adapters, and there is no lora_a",
        ),
    ],
)
def test_wrong_arguments(change, message) -> None:
    x, weight, a, b, bias = operands(4, 12, 10, 3)
    arguments = {"x": x, "weight": weight, "lora_a": a, "lora_b": b, "scaling": 1.0, "bias": bias, **change}
    with pytest.raises(ValueError, match=f"lora_linear: .*{message}"):
        lora_linear(**arguments)


def test_no_columns() -> None:
    """The product with nothing is 0, and its gradients are empty or 0."""
    x, weight, a, b, bias = (t.requires_grad_() for t in operands(4, 0, 10, 3))
    y = lora_linear(x, weight, a, b, bias=bias)
    assert torch.equal(y, bias.expand(4, 10))
    grads = torch.autograd.grad(y.sum(), [x, weight, a, b, bias])
    assert [grad.shape for grad in grads] == [t.shape for t in (x, weight, a, b, bias)]
    assert torch.equal(grads[3], torch.zeros(10, 3)) and torch.equal(grads[4], torch.full((10,), 4.0))


def test_wrong_adapter_names() -> None:
    (x, weight, a, b, _), adapter = several()
    with pytest.raises(ValueError, match=r"adapter must be int64 \[40\] on cpu; got torch.int64 \[39\] on cpu"):
        lora_linear(x, weight, a, b, adapter=adapter[1:])
    with pytest.raises(ValueError, match=r"adapter must be -1 \(none\) or one of 0 to 2, got 3"):
        lora_linear(x, weight, a, b, adapter=adapter + 1)
    with pytest.raises(ValueError, match=r"scaling must be 3 numbers, got 2"):
        lora_linear(x, weight, a, b, (1.0, 2.0), adapter=adapter)


def test_backends_can_be_forced() -> None:
    inputs = operands(20, 12, 10, 3)
    with ops.use_backend("reference"):
        assert torch.equal(of(lora_linear)(*inputs), of(reference.lora_linear)(*inputs))
