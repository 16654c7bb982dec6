"""rope on the CPU: true to the reference and to transformers, without copies, clear about wrong arguments."""

from functools import partial
from importlib import import_module

import pytest
import torch
from tolerance import HALF, assert_true_to, assert_unbiased, check
from torch import Tensor

from posttrain import ops
from posttrain.ops import reference


def by_transformers(family: str, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    """What the models of `family` compute; imported here, since tests/ops/test_simd.py needs this file without them."""
    models = import_module(f"transformers.models.{family}.modeling_{family}")
    return models.apply_rotary_pos_emb(*arguments)


def operands(
    tokens: int,
    heads: tuple[int, int] = (4, 2),
    width: int = 64,
    rotated: int | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k as transformers has them, `[B, heads, T, D]` views of `[B, T, heads, D]`; cos, sin with unequal halves."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, tokens, h, width, generator=generator).to(dtype).transpose(1, 2) for h in heads)
    angle = 10 * torch.randn(batch, tokens, width if rotated is None else rotated, generator=generator)
    return q, k, angle.cos().to(dtype), angle.sin().to(dtype)


def check_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, peer=None) -> None:
    check(
        lambda q, k: ops.rope(q, k, cos, sin, unsqueeze_dim),
        lambda q, k: reference.rope(q, k, cos.double(), sin.double(), unsqueeze_dim),
        [q, k],
        peer,
    )


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("tokens", "heads", "width", "rotated", "batch"),
    [
        (0, (4, 2), 64, 64, 1),
        (1, (4, 2), 64, 64, 1),
        (63, (1, 1), 2, 2, 3),
        (100, (3, 1), 96, 72, 2),
        (1000, (4, 2), 34, 34, 1),
        (17, (5, 0), 20, 14, 1),
        (5, (2, 1), 8, 0, 1),
    ],
)
def test_agrees_with_the_reference(tokens, heads, width, rotated, batch, dtype) -> None:
    check_rope(*operands(tokens, heads, width, rotated, batch, dtype))


@pytest.mark.usefixtures("poison")
def test_agrees_in_every_layout() -> None:
    q, k, cos, sin = operands(37, width=24, rotated=18, batch=2)
    check_rope(q.contiguous(), k, cos, sin)
    check_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, 2)
    check_rope(q, k, cos[:1], sin[:1])
    check_rope(q[0], k[0], cos[0], sin[0], 0)
    check_rope(q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0], sin[0], 1)
    check_rope(q.flip(-1)[..., ::2], k[..., ::2], cos[..., :12], sin[..., :12])
    check_rope(q, k[:, :1].expand(-1, 6, -1, -1), cos.mT.contiguous().mT, sin)
    fused = torch.randn(2, 37, (4 + 2 + 2) * 24)
    q, k, _ = (x.unflatten(-1, (-1, 24)).transpose(1, 2) for x in fused.split([96, 48, 48], dim=-1))
    check_rope(q, k, cos, sin)


def test_is_what_transformers_computes() -> None:
    q, k, cos, sin = operands(50)
    for ours, theirs in zip(ops.rope(q, k, cos, sin), by_transformers("llama", q, k, cos, sin), strict=True):
        torch.testing.assert_close(ours, theirs)
    q, k, cos, sin = operands(50, width=96, rotated=72)
    for ours, theirs in zip(ops.rope(q, k, cos, sin), by_transformers("phi3", q, k, cos, sin), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_known_value() -> None:
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    cos, sin = torch.tensor([[[0.5, 0.25, 0.5, 0.25]]]), torch.tensor([[[2.0, 3.0, 2.0, 3.0]]])
    turned, _ = ops.rope(x, x, cos, sin)
    assert_true_to(turned, torch.tensor([[[[-5.5, -11.5, 3.5, 7.0]]]], dtype=torch.float64))


def test_backward_turns_back() -> None:
    q, k, *_ = operands(20)
    angle = torch.randn(1, 20, 32).repeat(1, 1, 2)
    q.requires_grad_()
    turned, _ = ops.rope(q, k, angle.cos(), angle.sin())
    assert_true_to(torch.autograd.grad(turned, q, turned.detach())[0], q.detach().double())


def test_keeps_the_memory_order_of_heads_and_tokens_and_copies_nothing(monkeypatch) -> None:
    fused = torch.randn(1, 9, (4 + 2 + 2) * 16)
    q, k, _ = (x.unflatten(-1, (-1, 16)).transpose(1, 2) for x in fused.split([64, 32, 32], dim=-1))
    _, _, cos, sin = operands(9, width=16)
    copies = []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda x: contiguous(x) if x.is_contiguous() else copies.append(list(x.shape))
    )
    turned_q, turned_k = ops.rope(q, k, cos, sin)
    assert not copies
    assert turned_q.transpose(1, 2).is_contiguous()
    assert turned_k.transpose(1, 2).is_contiguous()
    assert all(
        x.is_contiguous() for x in ops.rope(q.clone(memory_format=torch.contiguous_format), turned_k, cos, sin)[:1]
    )


def test_gradients_have_the_memory_order_of_q_whatever_comes_in() -> None:
    q, k, cos, sin = operands(9)
    q.requires_grad_()
    turned, _ = ops.rope(q, k, cos, sin)
    grad = torch.autograd.grad(turned, q, torch.ones(q.shape))[0]
    assert grad.stride() == q.stride()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("angles_in", [torch.float32, None])
def test_half_precision_is_as_good_as_transformers(dtype, angles_in) -> None:
    q, k, cos, sin = operands(63, dtype=dtype)
    cos, sin = (x.to(angles_in or dtype) for x in (cos, sin))
    check(
        lambda q, k: ops.rope(q, k, cos, sin),
        lambda q, k: reference.rope(q, k, cos.float(), sin.float()),
        [q, k],
        lambda q, k: by_transformers("llama", q, k, cos.to(dtype), sin.to(dtype)),
    )


@pytest.mark.parametrize("rotated", [10, 6])
def test_gradcheck(rotated) -> None:
    q, k, cos, sin = operands(3, width=10, rotated=rotated, dtype=torch.float64)
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    options = {"eps": 1e-6, "atol": 1e-8, "rtol": 1e-6}
    assert torch.autograd.gradcheck(lambda q, k: ops.rope(q, k, cos, sin), (q, k), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("heads_dim", [-3, -2])
def test_opcheck(heads_dim, dtype) -> None:
    q, k, cos, sin = operands(6, width=12, rotated=8, batch=2, dtype=dtype)
    if heads_dim == -2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    arguments = (q.detach().requires_grad_(), k.detach().requires_grad_(), cos, sin, heads_dim, "cpu")
    torch.library.opcheck(torch.ops.posttrain.rope, arguments)
    torch.library.opcheck(torch.ops.posttrain.rope_backward, (q, k, cos, sin, heads_dim, True, "cpu"))


def test_compiles_without_graph_breaks_to_the_same_bits() -> None:
    q, k, cos, sin = operands(9)
    ours, theirs = ([x.detach().requires_grad_() for x in (q, k)] for _ in range(2))
    turned = torch.compile(ops.rope, backend="aot_eager", fullgraph=True)(*ours, cos, sin)
    expected = ops.rope(*theirs, cos, sin)
    sum(y.square().sum() for y in turned).backward()
    sum(y.square().sum() for y in expected).backward()
    for a, b in zip((*turned, *(x.grad for x in ours)), (*expected, *(x.grad for x in theirs)), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


def test_same_bits_every_time_and_for_a_token_alone() -> None:
    q, k, cos, sin = operands(1000, width=34)
    whole = ops.rope(q, k, cos, sin)
    for again, first in zip(ops.rope(q, k, cos, sin), whole, strict=True):
        assert torch.equal(again, first)
    for i in (0, 17, 999):
        token = slice(i, i + 1)
        alone = ops.rope(q[:, :, token], k[:, :, token], cos[:, token], sin[:, token])
        for x, y in zip(alone, whole, strict=True):
            assert torch.equal(x[:, :, 0], y[:, :, i])


def test_errors_have_no_side() -> None:
    def turned(rope, seed: int, dtype: torch.dtype) -> Tensor:
        return rope(*(x.to(dtype).abs() for x in operands(64, seed=seed)))[0]

    assert_unbiased(
        lambda seed: turned(ops.rope, seed, torch.float32),
        lambda seed: turned(partial(by_transformers, "llama"), seed, torch.float32),
        lambda seed: turned(reference.rope, seed, torch.float64),
    )


def test_angles_get_no_gradient() -> None:
    q, k, cos, sin = operands(5)
    cos.requires_grad_()
    for backend in ("cpu", "reference"):
        with ops.use_backend(backend):
            assert torch.autograd.grad(ops.rope(q.requires_grad_(), k, cos, sin)[0].sum(), cos, allow_unused=True) == (
                None,
            )


_Q, _K, _COS, _SIN = operands(5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((_Q[0, 0], _K[0, 0], _COS, _SIN), r"q must be floating with 3 or 4 dimensions, got torch.float32 \[5, 64\]"),
        ((_Q.int(), _K.int(), _COS, _SIN), "q must be floating .* got torch.int32"),
        ((_Q, _K, _COS, _SIN, 3), r"unsqueeze_dim is the heads' dimension, 1 or 2 for q \[1, 4, 5, 64\]; got 3"),
        ((_Q, _K[:, :, :4], _COS, _SIN), r"k must have the shape of q but for dimension 1; got \[1, 2, 4, 64\]"),
        ((_Q, _K[..., :32], _COS, _SIN), r"got \[1, 2, 5, 32\] for \[1, 4, 5, 64\]"),
        ((_Q, _K.double(), _COS, _SIN), "q is torch.float32 on cpu, k torch.float64 on cpu"),
        ((_Q, _K, _COS[:, :4], _SIN), r"cos and sin must be \[1, 5, R\].* got \[1, 4, 64\] and \[1, 5, 64\]"),
        ((_Q, _K, _COS[0], _SIN[0]), r"got \[5, 64\] and \[5, 64\]"),
        ((_Q, _K, _COS[..., :3], _SIN[..., :3]), "width of cos must be even and at most 64, got 3"),
        ((_Q[..., :32], _K[..., :32], _COS, _SIN), "width of cos must be even and at most 32, got 64"),
        ((_Q, _K, _COS.int(), _SIN), "cos and sin must be floating on cpu; got torch.int32 on cpu and torch.float32"),
        ((_Q, _K, _COS, _SIN.to("meta")), "torch.float32 on meta"),
    ],
)
def test_wrong_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ops.rope(*arguments)
