"""The LoRA ops in Triton, on the GPU or, small, interpreted on the CPU; the large products fused and the library's."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from draw import drawer
from lora_operands import of, plain
from tolerance import HALF, check
from torch import Tensor
from torch.nn import functional

from posttrain import ops
from posttrain.kernels import lora as kernels
from posttrain.ops import LoraLayer, lora_linear, lora_mlp, lora_qkv, quantize_nf4, reference
from posttrain.ops.lora_layer import flatten

pytestmark = pytest.mark.usefixtures("poison", "triton")
DTYPES = [torch.float16]
if torch.cuda.is_available():  # Triton's interpreter truncates to bfloat16 instead of rounding
    DTYPES.append(torch.bfloat16)


@pytest.fixture(params=[True, False], ids=["fused", "library"])
def each_way(request, monkeypatch) -> None:
    """Whichever way the device would take."""
    monkeypatch.setattr(kernels, "fused", lambda x: request.param)


both_ways = pytest.mark.usefixtures("each_way")


@pytest.fixture
def random(triton_device):
    """`random(*shape, dtype=...)`, the same numbers every time, so small that sums over many are still near 1."""
    return drawer(triton_device, 1 / 8)


@pytest.fixture
def operands(random):
    """`operands(rows, K, N, R)`: x, weight, A, B, bias."""

    def make(rows: int, k: int, n: int, rank: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        shapes = [(rows, k), (n, k), (rank, k), (n, rank), (n,)]
        return [random(*shape, dtype=dtype) for shape in shapes]

    return make


@both_ways
@pytest.mark.parametrize("shape", [(0, 8, 8, 2), (1, 13, 7, 1), (63, 97, 40, 8), (70, 33, 64, 13)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_agrees_with_the_reference(dropout, shape, operands) -> None:
    options = {"dropout": dropout, "seed": 3}
    check(of(lora_linear, **options), of(reference.lora_linear, **options), operands(*shape))


@both_ways
@pytest.mark.parametrize("rank", [0, 1, 8, 13, 64, 256])
def test_every_rank_without_bias_and_in_three_dimensions(rank, operands) -> None:
    x, *rest, _ = operands(20, 37, 50, rank)
    check(partial(lora_linear, scaling=2.0), partial(reference.lora_linear, scaling=2.0), [x.view(2, 10, 37), *rest])


@both_ways
def test_strided_inputs_and_gradients(operands) -> None:
    x, weight, a, b, bias = operands(80, 60, 48, 6)
    strided = [x[::2, ::3], weight[:, ::3], a[::2, ::3], b.T.contiguous().T[:, ::2], bias]
    check(of(lora_linear), of(reference.lora_linear), strided)
    check(lambda *o: of(lora_linear)(*o).T, lambda *o: of(reference.lora_linear)(*o).T, strided)
    check(of(lora_linear), of(reference.lora_linear), [x[0, :20].expand(40, 20), *strided[1:]])


def test_gradients_in_several_splits_have_the_same_bits_every_time(operands, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "SPLIT_ROWS", 40)
    inputs = operands(150, 40, 33, 8)
    check(of(lora_linear), of(reference.lora_linear), inputs)
    results = []
    for _ in range(2):
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = of(lora_linear, dropout=0.1, seed=3)(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for first, again in zip(*results, strict=True):
        assert torch.equal(first, again)


@both_ways
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_each_row_uses_the_adapter_it_names(dropout, random, triton_device) -> None:
    inputs = [random(40, 30), random(20, 30), random(3, 5, 30), random(3, 20, 5), random(20)]
    adapter = torch.arange(80, device=triton_device).remainder(4)[::2] - 1
    adapter[5] = 1
    options = {"adapter": adapter, "dropout": dropout, "seed": 7, "scaling": (0.5, 1.0, 2.0)}
    check(of(lora_linear, **options), of(reference.lora_linear, **options), inputs)
    if dropout == 0:
        x, weight, a, b, bias = inputs
        y = of(lora_linear, **options)(*inputs)
        alone = lora_linear(x, weight, a[1], b[1], 1.0, bias)
        torch.testing.assert_close(y[adapter == 1], alone[adapter == 1])
        torch.testing.assert_close(y[adapter == -1], functional.linear(x, weight, bias)[adapter == -1])


def test_without_adapter_the_result_is_exactly_the_base(operands) -> None:
    x, weight, _, _, bias = operands(63, 100, 97, 8)
    assert torch.equal(lora_linear(x, weight, bias=bias), functional.linear(x, weight, bias))
    check(lambda *o: lora_linear(*o), lambda *o: reference.lora_linear(*o), [x, weight])


@both_ways
@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_is_as_good_as_pytorch(dtype, operands) -> None:
    for rows in (7, 63):
        check(of(lora_linear), of(reference.lora_linear), operands(rows, 100, 97, 8, dtype), plain)


@both_ways
@pytest.mark.parametrize(("rows", "nested"), [(3, True), (40, False)])
def test_an_nf4_base(rows, nested, operands, monkeypatch) -> None:
    monkeypatch.setitem(ops.nf4._SLAB, "triton", 1500)  # several slabs
    x, weight, a, b, bias = operands(rows, 97, 40, 8)
    packed = quantize_nf4(weight, nested=nested)
    check(
        lambda x, a, b, bias: lora_linear(x, packed, a, b, 0.75, bias),
        lambda x, a, b, bias: reference.lora_linear(x, packed, a, b, 0.75, bias),
        [x, a, b, bias],
    )
    check(lambda x: lora_linear(x, packed), lambda x: reference.lora_linear(x, packed), [x])


@pytest.mark.parametrize("nf4", [False, True])
def test_dora(nf4, operands, random) -> None:
    x, weight, *rest = operands(20, 65, 33, 8)
    base = quantize_nf4(weight, nested=True) if nf4 else weight

    def call(op):
        return lambda x, a, b, bias, m: op(x, base, a, b, 0.75, bias, magnitude=m)

    check(call(lora_linear), call(reference.lora_linear), [x, *rest, 1 + random(33)])


def qkv(random, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[LoraLayer]]:
    """x [2, 15, 20]; q and v with adapters, k without."""
    weight, a, b = (random(*shape, dtype=dtype) for shape in ((24, 20), (6, 20), (24, 6)))
    layers = [
        LoraLayer(weight, a, b, 0.75, random(24, dtype=dtype)),
        LoraLayer(weight[:8]),
        LoraLayer(weight[8:16], a[:3], b[:8, :3], 2.0),
    ]
    return random(2, 15, 20, dtype=dtype), layers


@both_ways
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_qkv_of_a_normed_x(dropout, random) -> None:
    x, (q, k, v) = qkv(random)

    def call(op):
        def run(x, norm, *t):
            layers = LoraLayer(*t[:3], 0.75, t[3]), k, LoraLayer(*t[4:], 2.0)
            return op(x, *layers, norm=(norm, 1e-5), dropout=dropout, seed=2)

        return run

    tensors = [q.weight, q.lora_a, q.lora_b, q.bias, v.weight, v.lora_a, v.lora_b]
    check(call(lora_qkv), call(reference.lora_qkv), [8 * x, 1 + x[0, 0], *tensors])


def of_mlp(op: Callable[..., Tensor], activation: str):
    """`op` as a function of x, the norm's weight, and weight, A and B of gate, up and down."""

    def call(x: Tensor, norm: Tensor, *t: Tensor) -> Tensor:
        layers = [LoraLayer(*t[i : i + 3], scaling) for i, scaling in ((0, 0.5), (3, 2.0), (6, 1.0))]
        return op(x, *layers, activation, norm=(norm, 1e-5))

    return call


def plain_mlp(x: Tensor, norm: Tensor, *t: Tensor) -> Tensor:
    """What PEFT computes."""
    x = functional.rms_norm(x, x.shape[-1:], norm, 1e-5)

    def layer(x: Tensor, i: int, scaling: float) -> Tensor:
        return functional.linear(x, t[i]) + functional.linear(functional.linear(x, t[i + 1]), t[i + 2]) * scaling

    return layer(functional.silu(layer(x, 0, 0.5)) * layer(x, 3, 2.0), 6, 1.0)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
def test_mlp(dtype, random) -> None:
    shapes = [(40, 16), (24, 16), (4, 16), (24, 4), (24, 16), (3, 16), (24, 3), (16, 24), (5, 24), (16, 5)]
    x, *rest = (random(*shape, dtype=dtype) for shape in shapes)
    for activation in ("silu",) if dtype in HALF else ("silu", "gelu_tanh"):
        inputs = [8 * x, 1 + x[0], *rest]
        check(of_mlp(lora_mlp, activation), of_mlp(reference.lora_mlp, activation), inputs, plain_mlp)


def test_rows_that_lie_further_apart_than_int32_reaches(operands, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "fused", lambda x: True)
    x, weight, a, b, bias = operands(200, 24, 16, 4, torch.float16)
    step = 2**24
    far = torch.empty(0, dtype=torch.float16, device=x.device)
    far.set_(torch.UntypedStorage(2 * (199 * step + 24), device=x.device), 0, (200, 24), (step, 1)).copy_(x)
    assert torch.equal(of(lora_linear)(far, weight, a, b, bias), of(lora_linear)(x, weight, a, b, bias))
    ours, true = (
        torch.autograd.grad(of(lora_linear)(source, weight, leaf, b, bias).sum(), leaf)[0]
        for source, leaf in ((far, a.requires_grad_()), (x, a))
    )
    assert torch.equal(ours, true)


def test_opcheck(operands, triton_device) -> None:
    x, weight, a, b, bias = (t.detach().requires_grad_() for t in operands(6, 20, 12, 3))
    layer = flatten("lora_linear", "layer", x, LoraLayer(weight, a, b, 0.75, bias), False)
    torch.library.opcheck(torch.ops.posttrain.lora_linear, (x, *layer, None, 0.1, 3, None, 0.0, "triton"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the production tiles are for one")
@both_ways
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(1000, 1024, 520, 16), (4096, 4096, 1000, 64)], ids=str)
def test_large_matrices(shape, dtype, operands) -> None:
    inputs = [t / 4 for t in operands(*shape, dtype)]
    check(of(lora_linear), of(reference.lora_linear), inputs, plain)
