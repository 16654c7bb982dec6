"""What only the CUDA kernels of NF4 matrices have: parts, exact codes, an adapter beside; the rest: tests/kernels."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from draw import drawer
from tolerance import HALF, assert_as_good_as, check
from torch import Tensor
from torch.nn import functional

from posttrain.ops import NF4Weight, lora_linear, nf4_dequantize, nf4_linear, quantize_nf4, reference
from posttrain.ops.nf4 import MATVEC_ROWS, Parts
from posttrain.ops.nf4_cuda import _counters, dequantize

pytestmark = pytest.mark.usefixtures("poison", "cuda")


@pytest.fixture
def random(device):
    """`random(*shape, dtype=...)`, the same numbers every time."""
    return drawer(device, 0.1)


def expected(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """The reference on the CPU, where product and sum of a nested absmax are rounded one after the other."""
    return reference.nf4_dequantize(weight.to("cpu"), dtype).to(weight.packed.device)


def test_dequantising_any_part_to_any_address(random) -> None:
    weight = quantize_nf4(random(11, 13), blocksize=32, nested=True)
    whole = expected(weight, torch.float16).flatten()
    out = whole.new_empty(len(whole) + 8)
    for first, count in ((0, 143), (1, 100), (7, 9), (16, 16), (17, 3), (142, 1)):
        for shift in (0, 1, 8):
            out.fill_(torch.nan)
            dequantize(Parts.of(weight), first, out[shift : shift + count])
            assert torch.equal(out[shift : shift + count], whole[first : first + count])
            assert out[:shift].isnan().all() and out[shift + count :].isnan().all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("shape", "blocksize"),
    [((70, 192), 64), ((40, 1088), 128)],
    ids=str,
)
def test_half_precision_on_tensor_cores(blocksize, shape, dtype, random) -> None:
    """With fewer spans than warps and with more."""
    weight = quantize_nf4(random(*shape), blocksize=blocksize, nested=blocksize == 64)
    dense = nf4_dequantize(weight, dtype)
    truth = lambda x, bias: reference.nf4_linear(x, weight, bias)  # noqa: E731
    for rows in (1, MATVEC_ROWS, 20):
        check(
            lambda x, bias: nf4_linear(x, weight, bias),
            truth,
            [random(rows, shape[1], dtype=dtype), random(shape[0], dtype=dtype)],
            lambda x, bias: functional.linear(x, dense, bias),
        )


@pytest.mark.parametrize("dtype", HALF)
def test_the_code_is_exact_to_the_digits_of_two_numbers_of_half_precision(dtype, random) -> None:
    """x of one element, so that nothing but the code's digits and the result's rounding is left of the product."""
    weight = quantize_nf4(random(64, 64))
    x = torch.eye(64, dtype=dtype, device=weight.packed.device)[:MATVEC_ROWS]
    values = expected(weight, torch.float32)[:, :MATVEC_ROWS].T
    assert torch.equal(nf4_linear(x, weight), values.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape", [(6, 97), (34, 192)], ids=str)
def test_same_bits_every_time_and_alone_or_beside_others(shape, dtype, random) -> None:
    weight = quantize_nf4(random(*shape), nested=True)
    x, a, b = (random(*s, dtype=dtype) for s in ((MATVEC_ROWS, shape[1]), (9, shape[1]), (shape[0], 9)))
    for op in (partial(nf4_linear, weight=weight), partial(lora_linear, weight=weight, lora_a=a, lora_b=b)):
        whole = op(x)
        assert torch.equal(op(x), whole)
        for rows in (1, 9):
            assert torch.equal(op(x[:rows]), whole[:rows])
        assert torch.equal(op(x[-1]), whole[-1])


def test_odd_addresses(random) -> None:
    weight = quantize_nf4(random(5, 128))
    half, shifted = random(3, 128, dtype=torch.float16), random(385, dtype=torch.float16)[1:].view(3, 128)
    shifted.copy_(half)
    assert torch.equal(nf4_linear(shifted, weight), nf4_linear(half, weight))
    moved = torch.empty(weight.packed.numel() + 1, dtype=torch.uint8, device=half.device)[1:]
    moved.copy_(weight.packed.flatten())
    other = NF4Weight(moved, weight.absmax, weight.shape)
    check(partial(nf4_linear, weight=other), partial(reference.nf4_linear, weight=other), [half.float()])
    dense = expected(weight, torch.float16)
    check(
        partial(nf4_linear, weight=other), partial(reference.nf4_linear, weight=other), [half],
        lambda x: functional.linear(x, dense),
    )  # fmt: skip


def with_adapter(op: Callable[..., Tensor], weight: NF4Weight) -> Callable[..., Tensor]:
    return lambda x, a, b, bias: op(x, weight, a, b, 0.75, bias)


@pytest.mark.parametrize("shape", [(7, 13), (9, 96), (40, 128)], ids=str)
@pytest.mark.parametrize("rank", [1, 8, 13])
def test_an_adapter_in_the_same_launch(rank, shape, random) -> None:
    height, width = shape
    weight = quantize_nf4(random(*shape), nested=True)
    for rows in (1, 3, MATVEC_ROWS):
        inputs = [random(rows, width), random(rank, width), random(height, rank), random(height)]
        check(with_adapter(lora_linear, weight), with_adapter(reference.lora_linear, weight), inputs)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("adapters", ["half", "float32"])
@pytest.mark.parametrize("shape", [(40, 192), (35, 100)], ids=str)
@pytest.mark.parametrize("rank", [3, 72])
def test_an_adapter_in_half_precision(rank, shape, adapters, dtype, random) -> None:
    height, width = shape
    weight = quantize_nf4(random(*shape))
    dense = nf4_dequantize(weight, dtype)

    def plain(x, a, b, bias):
        return functional.linear(x, dense, bias) + functional.linear(functional.linear(x, a), b) * 0.75

    def mixed(x, a, b, bias):
        wide = (a.float(), b.float()) if adapters == "float32" else (a, b)
        return with_adapter(lora_linear, weight)(x, *wide, bias)

    inputs = [random(*s, dtype=dtype) for s in ((9, width), (rank, width), (height, rank), (height,))]
    check(mixed, with_adapter(reference.lora_linear, weight), inputs, plain)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [1e-4, 1e-6, 1e6])
def test_a_float32_adapter_keeps_its_digits_at_any_size(size, dtype, random) -> None:
    weight = quantize_nf4(torch.zeros_like(random(40, 192)))
    x, a, b = random(9, 192, dtype=dtype), random(11, 192) * size, random(40, 11) / size
    truth = reference.lora_linear(x.float(), weight, a, b, 1.0)
    assert_as_good_as(lora_linear(x, weight, a, b, 1.0), truth.to(dtype), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counters_are_zero_again_after_every_launch(dtype, random) -> None:
    weight = quantize_nf4(random(70, 64))
    for rows in (1, MATVEC_ROWS):
        lora_linear(random(rows, 64, dtype=dtype), weight, random(20, 64, dtype=dtype), random(70, 20, dtype=dtype))
        assert _counters(weight.packed).eq(0).all()
