"""The Triton kernels of packed_attention, on the GPU or, small, interpreted on the CPU."""

from functools import partial

import pytest
import torch
from tolerance import check, gradients
from torch import Tensor

from posttrain import ops
from posttrain.kernels import packed_attention as kernels
from posttrain.ops import reference
from posttrain.ops.layout import PackedLayout

pytestmark = pytest.mark.usefixtures("poison")
FORESTS = {
    "sequences": ([3, 40, 1, 0, 37], [-1] * 5),
    "prompt with completions": ([45, 20, 7, 33], [-1, 0, 0, 0]),
    "tree after a sequence": ([10, 30, 5, 12, 40, 3], [-1, -1, 1, 2, 1, -1]),
}
OPTIONS = [{}, {"window": 9}, {"softcap": 2.0, "scale": 0.3}]


@pytest.fixture(autouse=True)
def triton(triton_device):
    """Everything here runs on Triton."""
    with ops.use_backend("triton"):
        yield


def operands(tokens: int, heads: int, key_heads: int, width: int, device: str, dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, width), (tokens, key_heads, width), (tokens, key_heads, width)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def both(layout: PackedLayout, **options):
    """The op and its definition."""
    return tuple(
        partial(lambda f, *x, **o: f(*x[:3], layout, sinks=x[3] if len(x) > 3 else None, **o), function, **options)
        for function in (ops.packed_attention, reference.packed_attention)
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS)
def test_agrees_with_the_reference(forest, options, triton_device) -> None:
    layout = PackedLayout.from_forest(*forest, device=triton_device)
    check(*both(layout, **options), operands(layout.num_tokens, 4, 2, 16, triton_device))


def test_full_blocks_widths_and_strides(triton_device) -> None:
    layout = PackedLayout.from_forest([100, 70, 36], [-1, 0, 0], device=triton_device)
    q, k, v = operands(206, 3, 1, 40, triton_device)
    check(*both(layout), [q[..., :20], k[..., 20:], v])
    fused = torch.cat([q, k, v], 1).transpose(1, 2).contiguous().transpose(1, 2)
    check(*both(layout), [x.contiguous() for x in fused.split([3, 1, 1], 1)])
    check(*both(layout), list(fused.split([3, 1, 1], 1)))


def test_sinks(triton_device) -> None:
    layout = PackedLayout.from_lengths([33, 8], device=triton_device)
    sinks = torch.tensor([0.5, 20.0, -20.0, -1.0], device=triton_device)
    check(*both(layout), [*operands(41, 4, 2, 16, triton_device), sinks])


@pytest.mark.parametrize("lengths", [[], [1], [0, 0]], ids=str)
def test_few_tokens(lengths, triton_device) -> None:
    layout = PackedLayout.from_lengths(lengths, device=triton_device)
    check(*both(layout), operands(layout.num_tokens, 2, 1, 16, triton_device))


@pytest.mark.parametrize("queries, keys, window", [(64, 32, None), (32, 64, None), (128, 32, 50), (16, 16, None)])
def test_any_blocks(queries, keys, window, monkeypatch, triton_device) -> None:
    """Runs of blocks that all, some or none of a tile's queries see begin and end anywhere in a tile."""
    for table in ("FLOAT_FORWARD", "FLOAT_DKV", "FLOAT_DQ"):
        monkeypatch.setattr(kernels, table, {64: kernels.Blocks(queries, keys, 4, 1)})
    layout = PackedLayout.from_forest([70, 36, 40, 33, 5, 64, 31], [-1, 0, 1, 0, -1, 4, 4], device=triton_device)
    check(*both(layout, window=window), operands(layout.num_tokens, 1, 1, 16, triton_device))


@pytest.mark.parametrize("heads, key_heads", [(70, 10), (7, 1), (5, 5)])
def test_numbers_of_heads(heads, key_heads, triton_device) -> None:
    layout = PackedLayout.from_forest([7, 5, 2], [-1, 0, 0], device=triton_device)
    check(*both(layout), operands(14, heads, key_heads, 16, triton_device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, triton_device) -> None:
    if triton_device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16")
    layout = PackedLayout.from_lengths([40, 9], device=triton_device)
    op, truth = both(layout)
    check(op, truth, operands(49, 2, 2, 16, triton_device, dtype), plain)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's way in the dtype of its inputs, one sequence at a time."""
    outputs = []
    for part in zip(*(x.split([40, 9]) for x in (q, k, v)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", part[0], part[1]) * q.shape[-1] ** -0.5
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), part[2]))
    return torch.cat(outputs)


def test_runs_repeat_bit_for_bit(triton_device) -> None:
    layout = PackedLayout.from_forest([45, 20, 7], [-1, 0, 0], device=triton_device)
    inputs = operands(72, 4, 2, 16, triton_device)
    first, second = (sum(gradients(both(layout)[0], inputs), ()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
