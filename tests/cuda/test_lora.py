"""LoRA layers by CUDA kernels: rows that name their adapter, and the layers that share an input."""

from collections.abc import Callable

import pytest
import torch
from draw import drawer
from tolerance import HALF, assert_as_good_as, check
from torch import Tensor
from torch.nn import functional

from posttrain import ops
from posttrain.ops import LoraLayer, lora_linear, lora_mlp, lora_qkv, quantize_nf4, reference
from posttrain.ops.lora_layer import flatten

pytestmark = pytest.mark.usefixtures("poison")
SCALING = (0.5, 1.0, 2.0)


@pytest.fixture(autouse=True)
def cuda(device):
    """Everything here runs on CUDA kernels."""
    with ops.use_backend("cuda"):
        yield


@pytest.fixture
def random(device):
    """`random(*shape, dtype=...)`, the same numbers every time, so small that sums over many are still near 1."""
    return drawer(device, 1 / 8)


@pytest.fixture
def several(random, device):
    """`several(rows, K, N, R)`: x, weight, A and B of three adapters, bias; and the adapter of each row."""

    def make(rows: int, k: int, n: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
        shapes = [(rows, k), (n, k), (3, rank, k), (3, n, rank), (n,)]
        adapter = (torch.arange(rows, device=device) * 7).remainder(4) - 1
        adapter[rows // 2 : rows // 2 + 20] = 1  # more rows of an adapter than one product takes
        return [random(*shape, dtype=dtype) for shape in shapes], adapter

    return make


def of(op: Callable[..., Tensor], **options) -> Callable[..., Tensor]:
    """`op` as a function of the five operands."""
    return lambda x, weight, a, b, bias: op(x, weight, a, b, SCALING, bias, **options)


@pytest.mark.parametrize("shape", [(0, 8, 8, 2), (1, 13, 7, 1), (70, 40, 130, 13), (80, 33, 20, 40)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_each_row_uses_the_adapter_it_names(dropout, shape, several) -> None:
    inputs, adapter = several(*shape)
    options = {"adapter": adapter, "dropout": dropout, "seed": 7}
    check(of(lora_linear, **options), of(reference.lora_linear, **options), inputs)


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

    check(ours, of(reference.lora_linear, adapter=adapter), inputs, plain)


def test_float32_adapters_on_a_half_precision_base_get_float32_gradients(several) -> None:
    (x, weight, a, b, bias), adapter = several(40, 128, 64, 8)
    x, weight, bias = (t.half() for t in (x, weight, bias))
    truth = [t.detach().float().requires_grad_() for t in (x, a, b)]
    ours = [t.detach().requires_grad_() for t in (x, a, b)]
    incoming = torch.full((40, 64), 0.5, device=x.device)
    lora_linear(ours[0], weight, *ours[1:], SCALING, bias, adapter=adapter).backward(incoming.half())
    wide = weight.float(), bias.float()
    reference.lora_linear(truth[0], wide[0], *truth[1:], SCALING, wide[1], adapter=adapter).backward(incoming)
    for mine, true in zip(ours[1:], truth[1:], strict=True):
        assert mine.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, true.grad)


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


def test_gradients_have_the_same_bits_every_time(several) -> None:
    inputs, adapter = several(70, 40, 130, 13)
    results = []
    for _ in range(2):
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = of(lora_linear, adapter=adapter, dropout=0.1, seed=3)(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for first, again in zip(*results, strict=True):
        assert torch.equal(first, again)


def test_an_adapter_that_no_row_names_does_no_harm_and_has_no_gradient(random, device) -> None:
    x, weight, a, b = random(20, 30), random(10, 30), random(2, 4, 30), random(2, 10, 4)
    a[1] = float("inf")
    a.requires_grad_()
    y = lora_linear(x, weight, a, b, adapter=torch.zeros(20, dtype=torch.int64, device=device))
    assert y.isfinite().all()
    grad = torch.autograd.grad(y.sum(), a)[0]
    assert grad[0].abs().sum() > 0 and grad[1].eq(0).all()


def test_strided_operands_and_three_dimensions(several) -> None:
    (x, weight, a, b, bias), adapter = several(80, 60, 48, 6)
    inputs = [x[::2, ::3].view(2, 20, 20), weight[:, ::3], a[:, ::2, ::3], b.mT.contiguous().mT[..., ::2], bias]
    options = {"adapter": adapter[::2].view(2, 20)}
    check(of(lora_linear, **options), of(reference.lora_linear, **options), inputs)


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
