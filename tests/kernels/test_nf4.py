"""The Triton kernels of NF4 matrices, on the GPU or, small, interpreted on the CPU."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from draw import drawer
from tolerance import HALF, check
from torch import Tensor
from torch.nn import functional

from posttrain import ops
from posttrain.kernels.nf4 import dequantize
from posttrain.ops import NF4Weight, nf4, nf4_dequantize, nf4_linear, quantize_nf4, reference
from posttrain.ops.nf4 import MATVEC_ROWS, Parts

pytestmark = pytest.mark.usefixtures("poison")
statistics = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():  # Triton's interpreter truncates to bfloat16 instead of rounding
    DTYPES.append(torch.bfloat16)


@pytest.fixture(autouse=True)
def triton(triton_device):
    """Everything here runs on Triton."""
    with ops.use_backend("triton"):
        yield


@pytest.fixture
def random(triton_device):
    """`random(*shape, dtype=...)`, the same numbers every time."""
    return drawer(triton_device, 0.1)


def expected(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """The reference on the CPU, where product and sum of a nested absmax are rounded one after the other."""
    return reference.nf4_dequantize(weight.to("cpu"), dtype).to(weight.packed.device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@statistics
def test_dequantising_agrees_bit_for_bit(nested, blocksize, dtype, random) -> None:
    for shape in ((0, 64), (1, 1), (7, 13), (3, 64), (70, 130)):
        weight = quantize_nf4(random(*shape), blocksize=blocksize, nested=nested)
        ours = nf4_dequantize(weight, dtype)
        assert ours.dtype == dtype
        assert torch.equal(ours, expected(weight, dtype))


def test_dequantising_slab_by_slab(random, monkeypatch) -> None:
    monkeypatch.setitem(nf4._SLAB, "triton", 40)
    weight = quantize_nf4(random(11, 13), blocksize=32, nested=True)
    slabs = [slab.clone() for _, slab in nf4.slabs(Parts.of(weight), torch.float32, "triton")]
    assert len(slabs) == 4
    assert torch.equal(torch.cat(slabs), expected(weight, torch.float32))


def test_elements_up_to_two_to_the_31(triton_device) -> None:
    """Most of this matrix is memory that nobody touches."""
    height, width, count = 1 << 15, 1 << 16, 4096
    packed = torch.empty(height * width // 2, dtype=torch.uint8, device=triton_device)
    absmax = torch.empty(height * width // 64, device=triton_device)
    packed[-count // 2 :] = 0xFF
    absmax[-count // 64 :] = torch.arange(count // 64, device=triton_device)
    out = torch.full((count,), torch.nan, device=triton_device)
    dequantize(Parts(packed, absmax, None, None, None, height, width, 64, 0), height * width - count, out)
    assert torch.equal(out.view(-1, 64), absmax[-count // 64 :, None].expand(-1, 64))


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (9, 96), (5, 1024)], ids=str)
@statistics
def test_product_agrees_with_the_reference(nested, shape, random) -> None:
    weight = quantize_nf4(random(*shape), blocksize=32, nested=nested)
    for rows in (0, 1, 3, MATVEC_ROWS, 20):
        check(
            partial(nf4_linear, weight=weight), partial(reference.nf4_linear, weight=weight), [random(rows, shape[1])]
        )


@pytest.mark.parametrize("blocksize", [64, 4096])
def test_other_blocks_strides_and_dimensions(blocksize, random) -> None:
    weight = quantize_nf4(random(5, 4096), blocksize=blocksize)
    truth = lambda x, bias: reference.nf4_linear(x, weight, bias)  # noqa: E731
    for x in (random(4096), random(2, 1, 4096), random(3, 8192)[:, ::2], random(4096, 3).T, random(3, 4100)[:, 4:]):
        check(lambda x, bias: nf4_linear(x, weight, bias), truth, [x, random(10)[::2]])
    check(lambda x, bias: nf4_linear(x, weight, bias), truth, [random(20, 4096), random(5)])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("rows", [3, 20])
def test_half_precision_is_as_good_as_pytorch(rows, dtype, random) -> None:
    weight = quantize_nf4(random(24, 130))
    dense = nf4_dequantize(weight, dtype)
    inputs = [random(rows, 130, dtype=dtype)]
    truth = partial(reference.nf4_linear, weight=weight)
    check(partial(nf4_linear, weight=weight), truth, inputs, lambda x: functional.linear(x, dense))


@pytest.mark.parametrize("shape", [(6, 97), (6, 192)], ids=str)
def test_same_bits_every_time_and_alone_or_beside_others(shape, random) -> None:
    weight, x = quantize_nf4(random(*shape), nested=True), random(MATVEC_ROWS, shape[1])
    whole = nf4_linear(x, weight)
    assert torch.equal(nf4_linear(x, weight), whole)
    for rows in (1, 2, 3, 5, 9):
        assert torch.equal(nf4_linear(x[:rows], weight), whole[:rows])
    assert torch.equal(nf4_linear(x[-1], weight), whole[-1])


def test_parts_with_gaps(random) -> None:
    weight, x = quantize_nf4(random(7, 13)), random(3, 13)
    packed = torch.zeros(weight.packed.numel(), 2, dtype=torch.uint8, device=x.device)
    packed[:, 0] = weight.packed[:, 0]
    assert torch.equal(nf4_linear(x, replace(weight, packed=packed[:, 0])), nf4_linear(x, weight))


def test_opcheck(random) -> None:
    weight = Parts.of(quantize_nf4(random(7, 13), nested=True))
    torch.library.opcheck(torch.ops.posttrain.nf4_dequantize, (*weight, torch.float16, "triton"))
    x = random(3, 13).requires_grad_()
    torch.library.opcheck(torch.ops.posttrain.nf4_linear, (x, random(7), *weight, "triton"))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: a matrix of this size takes the interpreter long"
)
@pytest.mark.parametrize("dtype", HALF)
@statistics
def test_a_large_matrix(nested, dtype, random) -> None:
    weight = quantize_nf4(random(4096, 4096), nested=nested)
    dense = expected(weight, dtype)
    assert torch.equal(nf4_dequantize(weight, dtype), dense)
    for rows in (1, 8, MATVEC_ROWS):
        inputs = [random(rows, 4096, dtype=dtype)]
        truth = partial(reference.nf4_linear, weight=weight)
        check(partial(nf4_linear, weight=weight), truth, inputs, lambda x: functional.linear(x, dense))
