"""What only the CUDA kernels of LoRA layers promise; the rest is in tests/kernels/test_lora_adapters.py."""

from functools import partial

import pytest
import torch
from draw import drawer
from lora_operands import SCALING, of, rows_of_adapters
from tolerance import HALF, assert_as_good_as, check
from torch.nn import functional

from posttrain import ops
from posttrain.ops import LoraLayer, lora_linear, reference
from posttrain.ops.lora_layer import flatten

pytestmark = pytest.mark.usefixtures("poison", "cuda")


@pytest.fixture
def random(device):
    """`random(*shape, dtype=...)`, the same numbers every time, so small that sums over many are still near 1."""
    return drawer(device, 1 / 8)


@pytest.fixture
def several(random):
    """`several(rows, K, N, R)`: x, weight, A and B of three adapters, bias; and the adapter of each row."""
    return partial(rows_of_adapters, random)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("wide", [False, True], ids=["half", "float32"])
@pytest.mark.parametrize("shape", [(40, 128, 40, 20), (40, 100, 33, 8)], ids=str)
def test_half_precision_is_as_good_as_pytorch(shape, wide, dtype, several) -> None:
    inputs, adapter = several(*shape, dtype)

    def plain(x, weight, a, b, bias):
        y = functional.linear(x, weight, bias)
        for e, scaling in enumerate(SCALING):
            part = functional.linear(functional.linear(x, a[e]), b[e]) * scaling
            y = y + part.masked_fill((adapter != e)[:, None], 0)
        return y

    def ours(x, weight, a, b, bias):
        a, b = (a.float(), b.float()) if wide else (a, b)
        return lora_linear(x, weight, a, b, SCALING, bias, adapter=adapter)

    check(ours, of(reference.lora_linear, SCALING, adapter=adapter), inputs, plain)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6, 1e6])
def test_float32_adapters_keep_their_digits_at_any_size(size, dtype, several) -> None:
    """A times `size`, B divided by it: B starts at 0 in training, and float16 ends at 6e-8 and at 65504."""
    (x, weight, a, b, _), adapter = several(40, 128, 64, 8)
    x, nothing, small = x.to(dtype), torch.zeros_like(weight), 2.0**-8
    incoming = (torch.arange(40 * 64, device=x.device).remainder(7) - 3).view(40, 64) * small

    def results(op, wide):
        leaves = [t.detach().requires_grad_() for t in (x.to(wide), a * size, b / size)]
        y = op(leaves[0], nothing.to(wide), *leaves[1:], SCALING, adapter=adapter)
        grad_x, grad_a, grad_b = torch.autograd.grad(y, leaves, incoming.to(wide))
        return y.detach(), grad_x / small, grad_a * size / small, grad_b / size / small

    ours, truth = results(lora_linear, dtype), results(reference.lora_linear, torch.float32)
    for mine, true in zip(ours[:2], truth[:2], strict=True):
        assert_as_good_as(mine, true.to(dtype), true)
    for mine, true in zip(ours[2:], truth[2:], strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_have_the_same_bits_in_any_batch(dtype, several) -> None:
    (x, _, a, b, _), adapter = several(70, 128, 40, 20, dtype)
    nothing = torch.zeros(40, 128, dtype=dtype, device=x.device)  # the library's product depends on the batch
    whole = lora_linear(x, nothing, a, b, SCALING, adapter=adapter)
    assert torch.equal(lora_linear(x, nothing, a, b, SCALING, adapter=adapter), whole)
    for rows in (slice(1), slice(33, 37), slice(5, 70, 9)):
        assert torch.equal(lora_linear(x[rows], nothing, a, b, SCALING, adapter=adapter[rows]), whole[rows])
    alone = lora_linear(x[adapter == 1], nothing, a[1:2], b[1:2], 1.0, adapter=adapter[adapter == 1] - 1)
    assert torch.equal(alone, whole[adapter == 1])


def test_rows_that_lie_further_apart_than_int32_reaches(random, device) -> None:
    """Rows of the result; x, if it has gaps, is copied."""
    u, adapter, b = random(65, 4), torch.zeros(65, dtype=torch.int64, device=device), random(1, 16, 4)
    step = 2**26
    far = torch.empty(0, device=device).set_(
        torch.UntypedStorage(4 * (64 * step + 16), device=device), 0, (65, 16), (step, 1)
    )
    far.zero_()
    ops.lora_cuda._expand(u, b, adapter, far)
    torch.testing.assert_close(far, u @ b[0].T)


def test_opcheck(several) -> None:
    (x, weight, a, b, bias), adapter = several(6, 20, 12, 3)
    leaves = [t.requires_grad_() for t in (x, weight, a, b, bias)]
    layer = flatten("lora_linear", "layer", leaves[0], LoraLayer(*leaves[1:4], SCALING, bias), True)
    torch.library.opcheck(torch.ops.posttrain.lora_linear, (x, *layer, adapter, 0.1, 3, None, 0.0, "cuda"))


def test_opcheck_of_layers_that_share_an_input(several, random) -> None:
    (x, weight, a, b, bias), adapter = several(6, 20, 12, 3)
    leaves = [t.requires_grad_() for t in (x, weight, a, b, bias)]
    norm = torch.ones(20, device=x.device, requires_grad=True)
    layer = LoraLayer(*leaves[1:4], SCALING, bias)
    down = LoraLayer(random(20, 12), random(3, 3, 12), random(3, 20, 3), SCALING)
    flat = flatten("lora_qkv", "layer", x, layer, True)
    wide = flatten("lora_mlp", "down", x.new_empty(0, 12), down, True)
    torch.library.opcheck(torch.ops.posttrain.lora_qkv, (x, *flat, *flat, *flat, adapter, 0.1, 3, norm, 1e-6, "cuda"))
    torch.library.opcheck(
        torch.ops.posttrain.lora_mlp, (x, *flat, *flat, *wide, adapter, 0.1, 3, norm, 1e-6, "silu", "cuda")
    )
