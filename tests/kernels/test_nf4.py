"""The kernels of NF4 matrices, on the GPU or, small, on the CPU: bits of the reference, and products.

What only CUDA's have is in tests/cuda/test_nf4.py.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from draw import drawer
from places import with_dtypes
from tolerance import HALF, check
from torch import Tensor
from torch.nn import functional

from posttrain.kernels.nf4 import dequantize as dequantize_by_triton
from posttrain.ops import NF4Weight, nf4, nf4_dequantize, nf4_linear, quantize_nf4, reference
from posttrain.ops.nf4 import MATVEC_ROWS, Parts
from posttrain.ops.nf4_cuda import dequantize as dequantize_by_cuda

pytestmark = pytest.mark.usefixtures("poison", "place")
statistics = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])


@pytest.fixture
def random(place):
    """`random(*shape, dtype=...)`, the same numbers every time."""
    return drawer(place.device, 0.1)


def expected(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """The reference on the CPU, where product and sum of a nested absmax are rounded one after the other."""
    return reference.nf4_dequantize(weight.to("cpu"), dtype).to(weight.packed.device)


def with_bias(op, weight: NF4Weight):
    return lambda x, bias: op(x, weight, bias)


@with_dtypes(torch.float32, *HALF)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@statistics
def test_dequantising_agrees_bit_for_bit(nested, blocksize, dtype, random) -> None:
    for shape in ((0, 64), (1, 1), (7, 13), (3, 64), (70, 130)):
        weight = quantize_nf4(random(*shape), blocksize=blocksize, nested=nested)
        ours = nf4_dequantize(weight, dtype)
        assert ours.dtype == dtype
        assert torch.equal(ours, expected(weight, dtype))


def test_dequantising_slab_by_slab(random, place, monkeypatch) -> None:
    monkeypatch.setitem(nf4._SLAB, place.backend, 40)
    weight = quantize_nf4(random(11, 13), blocksize=32, nested=True)
    slabs = [slab.clone() for _, slab in nf4.slabs(Parts.of(weight), torch.float32, place.backend)]
    assert len(slabs) == 4
    assert torch.equal(torch.cat(slabs), expected(weight, torch.float32))


def test_elements_around_two_to_the_31(place) -> None:
    """Up to it in Triton, beyond it in CUDA. Most of this matrix is memory that nobody touches."""
    dequantize, height = {"triton": (dequantize_by_triton, 1 << 15), "cuda": (dequantize_by_cuda, 1 << 16)}[
        place.backend
    ]
    width, count, device = 1 << 16, 4096, place.device
    packed = torch.empty(height * width // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(0, device=device)
    absmax.set_(torch.UntypedStorage(4 * (height * width // 64), device=device), 0, (height * width // 64,))
    packed[-count // 2 :] = 0xFF
    absmax[-count // 64 :] = torch.arange(count // 64, device=device)
    out = torch.full((count,), torch.nan, device=device)
    dequantize(Parts(packed, absmax, None, None, None, height, width, 64, 0), height * width - count, out)
    assert torch.equal(out.view(-1, 64), absmax[-count // 64 :, None].expand(-1, 64))


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (9, 96), (5, 1024), (0, 64), (3, 0)], ids=str)
@statistics
def test_product_agrees_with_the_reference(nested, shape, random) -> None:
    weight = quantize_nf4(random(*shape), blocksize=32, nested=nested)
    op, truth = partial(nf4_linear, weight=weight), partial(reference.nf4_linear, weight=weight)
    for rows in (0, 1, 3, MATVEC_ROWS, 20):
        check(op, truth, [random(rows, shape[1])])


@pytest.mark.parametrize(("width", "blocksize"), [(128, 64), (4096, 64), (4096, 4096)])
def test_other_blocks_strides_and_dimensions(width, blocksize, random) -> None:
    weight = quantize_nf4(random(5, width), blocksize=blocksize)
    op, truth = with_bias(nf4_linear, weight), with_bias(reference.nf4_linear, weight)
    every_second, turned, shifted = random(3, 2 * width)[:, ::2], random(width, 3).T, random(3, width + 4)[:, 4:]
    for x in (random(width), random(2, 1, width), every_second, turned, shifted):
        check(op, truth, [x, random(10)[::2]])
    check(op, truth, [random(20, width), random(5)])


@with_dtypes(*HALF)
@pytest.mark.parametrize(
    ("shape", "blocksize"),
    [((24, 130), 64), ((9, 64), 32), ((33, 64), 64)],
    ids=str,
)
def test_half_precision_is_as_good_as_pytorch(blocksize, shape, dtype, random) -> None:
    """CUDA takes the last to tensor cores."""
    weight = quantize_nf4(random(*shape), blocksize=blocksize, nested=blocksize == 64)
    dense = nf4_dequantize(weight, dtype)
    for rows in (1, 3, MATVEC_ROWS, 20):
        check(
            with_bias(nf4_linear, weight),
            with_bias(reference.nf4_linear, weight),
            [random(rows, shape[1], dtype=dtype), random(shape[0], dtype=dtype)],
            lambda x, bias: functional.linear(x, dense, bias),
        )
    op, truth = partial(nf4_linear, weight=weight), partial(reference.nf4_linear, weight=weight)
    check(op, truth, [random(3, shape[1], dtype=dtype)], lambda x: functional.linear(x, dense))


@with_dtypes(torch.float32, *HALF)
@pytest.mark.parametrize("shape", [(6, 97), (6, 192)], ids=str)
def test_same_bits_every_time_and_alone_or_beside_others(shape, dtype, random) -> None:
    weight, x = quantize_nf4(random(*shape), nested=True), random(MATVEC_ROWS, shape[1], dtype=dtype)
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


def test_opcheck(random, place) -> None:
    weight = Parts.of(quantize_nf4(random(7, 13), nested=True))
    torch.library.opcheck(torch.ops.posttrain.nf4_dequantize, (*weight, torch.float16, place.backend))
    x = random(3, 13).requires_grad_()
    torch.library.opcheck(torch.ops.posttrain.nf4_linear, (x, random(7), *weight, place.backend))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: a matrix of this size takes long without")
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
