"""The Triton kernels of rms_norm, rope, swiglu and geglu, on the GPU or, small, interpreted on the CPU."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from tolerance import check
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from posttrain import ops
from posttrain.ops import reference

pytestmark = [pytest.mark.usefixtures("poison", "triton"), pytest.mark.filterwarnings("ignore:overflow encountered")]
each_dtype = pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason="Triton's interpreter truncates to bfloat16 instead of rounding"
            ),
        ),
    ],
)


@pytest.fixture
def random(triton_device):
    """`random(*shape, dtype=...)`, the same numbers every time."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(triton_device, dtype)

    return make


def norm_as_transformers(x: Tensor, weight: Tensor, residual: Tensor | None = None):
    total = x if residual is None else x + residual
    wide = total.float()
    y = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return y if residual is None else (y, total)


def norm(function, x: Tensor, weight: Tensor, residual: Tensor):
    return function(x, weight, 1e-6, residual)


@each_dtype
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 1), (63, 100), (2, 3, 64), (5, 300), (2, 4500)], ids=str)
def test_rms_norm(shape, dtype, random) -> None:
    x, weight, residual = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype), random(*shape, dtype=dtype)
    check(ops.rms_norm, reference.rms_norm, [x, weight], norm_as_transformers)
    check(partial(norm, ops.rms_norm), partial(norm, reference.rms_norm), [x, weight, residual], norm_as_transformers)


def test_rms_norm_of_strided_inputs(random) -> None:
    x, residual = random(10, 66)[:, ::2], random(66, 10)[:33].T
    check(partial(norm, ops.rms_norm), partial(norm, reference.rms_norm), [x, random(33), residual])


def test_rms_norm_row_alone_and_again(random) -> None:
    x, weight, grad = random(63, 100), random(100), random(63, 100)

    def run(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        leaf, scale = x[rows].clone().requires_grad_(), weight.clone().requires_grad_()
        y = ops.rms_norm(leaf, scale)
        return y, *torch.autograd.grad(y, (leaf, scale), grad[rows])

    whole = run(slice(None))
    for again, first in zip(run(slice(None)), whole, strict=True):
        assert torch.equal(again, first)
    y, grad_x, _ = run(slice(40, 41))
    assert torch.equal(y[0], whole[0][40])
    assert torch.equal(grad_x[0], whole[1][40])


GLU = {
    "swiglu": (ops.swiglu, reference.swiglu, lambda gate, up: functional.silu(gate) * up),
    "geglu tanh": (ops.geglu, reference.geglu, lambda gate, up: functional.gelu(gate, approximate="tanh") * up),
    "geglu none": (
        partial(ops.geglu, approximate="none"),
        partial(reference.geglu, approximate="none"),
        lambda gate, up: functional.gelu(gate) * up,
    ),
}


@each_dtype
@pytest.mark.parametrize(("op", "truth", "peer"), GLU.values(), ids=GLU)
def test_glu(op, truth, peer, dtype, random) -> None:
    for shape in ((0, 8), (3, 0), (1,), (9, 100), (2, 3, 64), (2, 1100)):
        check(op, truth, [3 * random(*shape, dtype=dtype), random(*shape, dtype=dtype)], peer)


@pytest.mark.parametrize(("op", "truth", "peer"), GLU.values(), ids=GLU)
def test_glu_of_strided_and_extreme_inputs(op, truth, peer, random) -> None:
    fused = random(2, 9, 134)
    check(op, truth, fused.chunk(2, dim=-1))
    check(op, truth, [fused[..., ::2], fused[:, ::1, 67:]])
    gate = torch.tensor([0.0, 1e4, -1e4, 88.7, -88.7, 104.0, -104.0, 20.0, -20.0, 5.4, -5.4], device=fused.device)
    check(op, truth, [gate, torch.full_like(gate, 2.0)])
    assert torch.equal(op(fused, fused)[1, 3], op(fused[1, 3], fused[1, 3]))


@each_dtype
@pytest.mark.parametrize(
    ("tokens", "heads", "width", "rotated", "batch"),
    [
        (0, (4, 2), 64, 64, 1),
        (1, (4, 2), 64, 64, 1),
        (7, (3, 1), 12, 8, 2),
        (5, (18, 2), 34, 34, 1),
        (3, (1, 1), 8, 0, 1),
    ],
)
def test_rope(tokens, heads, width, rotated, batch, dtype, random) -> None:
    q, k = (random(batch, tokens, h, width, dtype=dtype).transpose(1, 2) for h in heads)
    angle = random(batch, tokens, rotated)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    for strided in (False, True):
        if strided:
            q, k = q.contiguous(), random(batch, tokens, heads[1], 2 * width, dtype=dtype)[..., width:].transpose(1, 2)
        check(
            lambda q, k: ops.rope(q, k, cos, sin),
            lambda q, k: reference.rope(q, k, cos.double(), sin.double()),
            [q, k],
            lambda q, k: peer_rope(q, k, cos, sin),
        )


def peer_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """transformers, on the part that turns."""
    rotated = cos.shape[-1]
    turned = apply_rotary_pos_emb(q[..., :rotated], k[..., :rotated], cos, sin)
    return tuple(torch.cat([t, x[..., rotated:]], -1) for t, x in zip(turned, (q, k), strict=True))


def test_rope_shares_angles_over_the_batch_and_takes_packed_tokens(random) -> None:
    q, k, angle = random(3, 5, 2, 8), random(3, 5, 1, 8), random(1, 5, 8)
    cos, sin = angle.cos(), angle.sin()
    for args in ((q, k, cos, sin, 2), (q[0], k[0], cos[0], sin[0], 1)):
        check(
            lambda q, k, args=args: ops.rope(q, k, *args[2:]),
            lambda q, k, args=args: reference.rope(q, k, *args[2:]),
            args[:2],
        )


@pytest.mark.parametrize("module", ["rms_norm", "rope", "glu"])
def test_launches_go_to_the_device_of_the_tensors(module, random, monkeypatch):
    """Also where another GPU is the current one."""
    launched_on = []
    monkeypatch.setattr(
        f"posttrain.kernels.{module}.cuda_device", lambda tensor: launched_on.append(tensor.device) or nullcontext()
    )
    x = random(1, 2, 3, 16).requires_grad_()
    angle = random(1, 3, 16)
    calls = {
        "rms_norm": lambda: ops.rms_norm(x, random(16)),
        "rope": lambda: ops.rope(x, x, angle.cos(), angle.sin())[0],
        "glu": lambda: ops.swiglu(x, x),
    }
    calls[module]().sum().backward()
    assert launched_on == [x.device] * 2
