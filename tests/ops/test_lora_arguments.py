"""lora_linear as a registered op: what it takes, what it refuses, and that PyTorch may compile it."""

import numpy as np
import pytest
import torch
from lora_operands import of, operands, several
from tolerance import HALF
from torch import Tensor

from posttrain import ops
from posttrain.ops import LoraLayer, lora_linear, quantize_nf4, reference
from posttrain.ops.lora_layer import flatten


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
