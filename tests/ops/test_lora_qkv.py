"""lora_qkv: three lora_linear of one x, true to the reference, through a norm too."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from lora_operands import operands, several
from tolerance import HALF, check
from torch import Tensor
from torch.nn import functional

from posttrain import ops
from posttrain.ops import LoraLayer, lora_qkv, quantize_nf4, reference
from posttrain.ops.lora_layer import flatten


def qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[LoraLayer]]:
    """x [2, 30, 20]; q and v with adapters, k without."""
    x, weight, a, b, bias = operands(60, 20, 24, 6, dtype)
    layers = [
        LoraLayer(weight, a, b, 0.75, bias),
        LoraLayer(weight[:8]),
        LoraLayer(weight[8:16], a[:3], b[:8, :3], 2.0),
    ]
    return x.view(2, 30, 20), layers


def of_layers(op: Callable, layers: Sequence[LoraLayer], **options) -> tuple[Callable, list[Tensor]]:
    """`op` as a function of x and of the tensors of `layers`, and those tensors."""
    fields = [[name for name in LoraLayer._fields if isinstance(getattr(layer, name), Tensor)] for layer in layers]

    def call(x: Tensor, *tensors: Tensor):
        rest = iter(tensors)
        made = [layer._replace(**{n: next(rest) for n in names}) for layer, names in zip(layers, fields, strict=True)]
        return op(x, *made, **options)

    return call, [getattr(layer, n) for layer, names in zip(layers, fields, strict=True) for n in names]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_qkv_agrees_with_the_reference(dtype, dropout) -> None:
    x, layers = qkv(dtype)
    ours, tensors = of_layers(lora_qkv, layers, dropout=dropout, seed=2)
    truth, _ = of_layers(reference.lora_qkv, layers, dropout=dropout, seed=2)
    check(ours, truth, [x, *tensors])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_qkv_of_a_normed_x(dtype) -> None:
    x, layers = qkv(dtype)

    def call(op):
        return lambda x, w, *t: of_layers(partial(op, norm=(w, 1e-5)), layers)[0](x, *t)

    check(call(lora_qkv), call(reference.lora_qkv), [x, 1 + x[0, 0], *of_layers(lora_qkv, layers)[1]])


@pytest.mark.parametrize("dtype", HALF)
def test_qkv_in_half_precision(dtype) -> None:
    x, layers = qkv(dtype)

    def peer(x, *layers):
        return tuple(
            functional.linear(x, w, bias)
            + (0 if a is None else functional.linear(functional.linear(x, a), b) * scaling)
            for w, a, b, scaling, bias in layers
        )

    ours, tensors = of_layers(lora_qkv, layers)
    check(ours, of_layers(reference.lora_qkv, layers)[0], [x, *tensors], of_layers(peer, layers)[0])


def test_qkv_gradcheck_also_where_one_output_is_unused() -> None:
    x, layers = qkv(torch.float64)
    ours, tensors = of_layers(lora_qkv, [layer._replace(weight=layer.weight[:, :5]) for layer in layers])
    tensors = [t[..., :5] if t.shape[-1] == 20 else t for t in tensors]
    inputs = [t.detach().clone().requires_grad_() for t in (x[:1, :3, :5], *tensors)]
    assert torch.autograd.gradcheck(ours, inputs, eps=1e-6, atol=1e-8, rtol=1e-6)
    assert torch.autograd.gradcheck(lambda *t: ours(*t)[2], inputs, eps=1e-6, atol=1e-8, rtol=1e-6)


def test_qkv_gradcheck_through_the_norm() -> None:
    x, (layer, *_) = qkv(torch.float64)
    small = LoraLayer(layer.weight[:4, :5], layer.lora_a[:2, :5], layer.lora_b[:4, :2], 0.75)
    op = lambda x, w, a: lora_qkv(x, small._replace(lora_a=a), small, small, norm=(w, 1e-5))  # noqa: E731
    inputs = [t.clone().requires_grad_() for t in (8 * x[0, :4, :5], 1 + x[1, 0, :5], small.lora_a)]
    assert torch.autograd.gradcheck(op, inputs, eps=1e-6, atol=1e-8, rtol=1e-6)


def test_qkv_with_an_nf4_base_and_several_adapters() -> None:
    inputs, adapter = several()
    x, weight, a, b, bias = inputs
    layers = [
        LoraLayer(quantize_nf4(weight), a, b, (0.5, 1.0, 2.0), bias),
        LoraLayer(quantize_nf4(weight[:8], nested=True), a[:, :2], b[:, :8, :2]),
        LoraLayer(weight),
    ]
    ours, tensors = of_layers(lora_qkv, layers, adapter=adapter)
    check(ours, of_layers(reference.lora_qkv, layers, adapter=adapter)[0], [x, *tensors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_opcheck(dtype) -> None:
    x, weight, a, b, bias = (t.requires_grad_() for t in operands(6, 20, 12, 3, dtype))
    layer = flatten("lora_qkv", "q", x, LoraLayer(weight, a, b, 0.75, bias), False)
    norm = torch.ones(20, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.posttrain.lora_qkv, (x, *layer, *layer, *layer, None, 0.0, 0, norm, 1e-6, "cpu"))


def test_wrong_arguments() -> None:
    x, weight, *_ = operands(40, 30, 20, 4)
    with pytest.raises(ValueError, match=r"lora_qkv: v: weight must be torch.float32"):
        lora_qkv(x, LoraLayer(weight), LoraLayer(weight), LoraLayer(weight.half()))
    with pytest.raises(ValueError, match=r"lora_qkv: the norm's weight must be \[30\] on cpu; got \[20\] on cpu"):
        lora_qkv(x, *[LoraLayer(weight)] * 3, norm=(torch.ones(20), 1e-6))
    with pytest.raises(ValueError, match=r"lora_qkv: the norm's weight must be floating, got torch.int64"):
        lora_qkv(x, *[LoraLayer(weight)] * 3, norm=(torch.ones(30, dtype=torch.int64), 1e-6))


def test_backends_can_be_forced() -> None:
    x, layers = qkv()
    with ops.use_backend("reference"):
        for mine, true in zip(lora_qkv(x, *layers), reference.lora_qkv(x, *layers), strict=True):
            assert torch.equal(mine, true)
