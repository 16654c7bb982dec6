"""rms_norm, rope, swiglu and geglu: as fast as memory allows, so what counts is the bytes.

Tensors that a perfect forward, and a perfect forward and backward, read and write, in tensors like the first argument:
rms_norm 2 and 5 (x, y; then dy, x, dx), with a residual 4 and 8, swiglu and geglu 3 and 8 (gate, up, y; then gate, up,
dy, dgate, dup), rope twice the queries and keys in each direction.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from posttrain import ops
from posttrain.bench import peers
from posttrain.bench.case import BOTH, FORWARD, Case, Function, Problem, Work, randn
from posttrain.bench.device import DEVICE, DTYPE
from posttrain.bench.shapes import Suite

_COPIES = 24  # tensors of the first argument's size that the truth and its gradients take, in a wider dtype


def rms_norm(suite: Suite) -> list[Case]:
    """Norms of the residual stream, with and without the addition to it."""
    named: peers.Makers = {
        "torch.compile": peers.compiled,
        "torch": peers.torch_rms_norm,
        "Liger": peers.liger_rms_norm,
        "quack": peers.quack_rms_norm,
        "Unsloth": peers.unsloth_rms_norm,
    }
    added: peers.Makers = {
        "torch.compile": peers.compiled,
        "Liger": peers.liger_add_rms_norm,
        "quack": peers.quack_add_rms_norm,
    }
    cases = []
    for hidden in dict.fromkeys(model.hidden for model in suite.models):
        shape = (suite.tokens, hidden)
        size = suite.tokens * hidden * DTYPE.itemsize
        cases.append(_case("rms_norm", f"{list(shape)}", size, (2, 5), partial(_norm, shape, False), named))
        cases.append(_case("rms_norm", f"{list(shape)} residual", size, (4, 8), partial(_norm, shape, True), added))
    return cases


def _norm(shape: tuple[int, int], residual: bool) -> Problem:
    x, weight = randn(*shape, grad=True), randn(shape[1], grad=True)
    arguments = (x, weight, randn(*shape, grad=True)) if residual else (x, weight)
    if residual:
        return Problem(arguments, lambda x, w, r: ops.rms_norm(x, w, 1e-6, r), _add_norm)
    return Problem(arguments, lambda x, w: ops.rms_norm(x, w, 1e-6), _llama_norm)


def _llama_norm(x: Tensor, weight: Tensor) -> Tensor:
    """LlamaRMSNorm of transformers."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


def _add_norm(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _llama_norm(total, weight), total


def rope(suite: Suite) -> list[Case]:
    """Queries and keys in the layout that transformers has them in, `[1, heads, T, D]` with heads inside."""
    named: peers.Makers = {"torch.compile": peers.compiled, "Liger": peers.liger_rope, "Unsloth": peers.unsloth_rope}
    cases = {}
    for model in suite.models:
        heads, key_heads, width = model.heads, model.key_heads, model.width
        title = f"{heads}+{key_heads} heads [{suite.tokens}, {width}]"
        size = suite.tokens * heads * width * DTYPE.itemsize
        sizes = (suite.tokens, heads, key_heads, width)
        both = (heads + key_heads) / heads  # queries and keys, in tensors of queries
        cases[title] = _case("rope", title, size, (2 * both, 4 * both), partial(_rope, *sizes), named)
    return list(cases.values())


def _rope(tokens: int, heads: int, key_heads: int, width: int) -> Problem:
    q, k = (randn(1, tokens, h, width).transpose(1, 2).requires_grad_() for h in (heads, key_heads))
    angle = torch.randn(1, tokens, width // 2, device=DEVICE).repeat(1, 1, 2)
    return Problem((q, k, angle.cos().to(DTYPE), angle.sin().to(DTYPE)), ops.rope, turned)


def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb of transformers."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _half_turn(q) * sin, k * cos + _half_turn(k) * sin


def _half_turn(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((-right, left), -1)


def swiglu(suite: Suite) -> list[Case]:
    """The activation of Llama, Qwen and Mistral."""
    named: peers.Makers = {"torch.compile": peers.compiled, "Liger": peers.liger_swiglu}
    return _gated(suite, "swiglu", lambda gate, up: functional.silu(gate) * up, named)


def geglu(suite: Suite) -> list[Case]:
    """The activation of Gemma."""
    named: peers.Makers = {"torch.compile": peers.compiled, "Liger": peers.liger_geglu}
    return _gated(suite, "geglu", lambda gate, up: functional.gelu(gate, approximate="tanh") * up, named)


def _gated(suite: Suite, name: str, plain: Function, named: peers.Makers) -> list[Case]:
    op, cases = getattr(ops, name), []
    for inner in dict.fromkeys(model.inner for model in suite.models if model.gate == name):

        def make(inner: int = inner) -> Problem:
            gate, up = randn(suite.tokens, inner, grad=True), randn(suite.tokens, inner, grad=True)
            return Problem((gate, up), op, plain)

        size = suite.tokens * inner * DTYPE.itemsize
        cases.append(_case(name, f"[{suite.tokens}, {inner}]", size, (3, 8), make, named))
    return cases


def _case(
    op: str,
    title: str,
    size: float,
    tensors: tuple[float, float],
    make: Callable[[], Problem],
    named: peers.Makers,
) -> Case:
    """`size` is that of the first argument, `tensors` how many like it the two passes read and write."""
    work = {name: Work(0, count * size) for name, count in zip((FORWARD, BOTH), tensors, strict=True)}
    return Case(op, title, _COPIES * size, make, work, named)
