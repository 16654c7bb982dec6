"""lora_linear with a magnitude (DoRA): true to the reference and to PEFT."""

from collections.abc import Callable

import pytest
import torch
from lora_operands import operands, plain, randn
from tolerance import HALF, check
from torch import Tensor

from posttrain.ops import lora_linear, quantize_nf4, reference


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
