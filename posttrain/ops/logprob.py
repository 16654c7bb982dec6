"""Log-probabilities of target tokens straight from hidden states, without the `[M, V]` logits in memory.

With a_v = x W_v + s (x A^T) B_v + bias_v the raw logits of a row x, the logits are

    z_v = cap(a_v logit_scale) / temperature,    cap(t) = softcap tanh(t / softcap), or t

and, for a target y, everything follows from the tokens other than y, so that confident tokens keep their digits:

    L        = log sum over v != y of e^z_v
    logprob  = -softplus(L - z_y)                                    (not z_y - lse, which rounds to 0)
    lse      = logaddexp(L, z_y)
    entropy  = -p_y log p_y - q log q + q H_others,    q = 1 - p_y = sigmoid(L - z_y)

(the chain rule of entropy; H_others is that of the other tokens among themselves). The gradient is

    dz_v = p_v (g_lse - g_logprob - g_entropy (log p_v + entropy))   for v != y
    dz_y = g_logprob q + p_y (g_lse - g_entropy (log p_y + entropy))

The vocabulary is walked in slabs with running statistics (Milakov and Gimelshein, "Online normalizer calculation for
softmax", 2018). What the forward saves decides what the backward costs, in GEMMs of M x H x V, forward included:

    unit     d logprob / dx, accumulated beside the statistics: 2      hidden wants a gradient, the head is frozen
    logits   z itself, where it fits in `memory_budget`: 3             trainable head (2 if frozen)
    none     the logits are recomputed slab by slab: 4                 trainable head (3 if frozen)

A target whose incoming gradients are all exactly 0 (a clipped token, a group without advantage) adds exact zeros to
every gradient. On a CPU the backward's GEMMs go over the other targets only, and without any it computes nothing; on a
GPU, where nobody waits to count them, a block of such targets computes no logits. The forward can't know them, so a
frozen head's unit costs its two GEMMs whatever comes back.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.ops import logprob_tiled, logprob_tiled_gradient, reference
from posttrain.ops.backend import backend_for
from posttrain.ops.library import define
from posttrain.ops.logprob_problem import IGNORED, Grads, Incoming, Needs, Problem, Results

# A GPU's slabs are wider: each one reads and writes the whole float32 sum of the second GEMM.
DEFAULT_MEMORY_BUDGET = {"cpu": 32 << 20, "cuda": 512 << 20}


class TokenLogprobs(NamedTuple):
    """What a policy says of M target tokens.

    Attributes:
        logprob: `[M]`, log p(target), 0 for a target of -100.
        entropy: `[M]`, entropy of the distribution in nats, or None if it was not asked for.
        lse: `[M]`, log of the sum of exponentials of the scaled logits.
        is_top1: bool `[M]`, whether no other token is more likely.
    """

    logprob: Tensor
    entropy: Tensor | None
    lse: Tensor
    is_top1: Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
    need_entropy: bool = False,
    memory_budget: int | None = None,
) -> TokenLogprobs:
    """Log-probability of each target under the softmax of a language head.

    Args:
        hidden: `[N, H]`, floating.
        weight: `[V, H]`, the head; dtype and device of `hidden`.
        targets: int64 `[M]` in `[0, V)`, or -100 to skip (log-probability 0, no gradient, no cost).
        rows: int64 `[M]`, the row of `hidden` that predicts each target; rows may repeat or be absent. None means
            row m predicts target m.
        bias: `[V]`, added to the raw logits.
        temperature: divides the logits.
        softcap: squashes the logits to `(-softcap, softcap)` before the temperature (Gemma 2).
        logit_scale: multiplies the raw logits.
        lora: (A `[R, H]`, B `[V, R]`, scaling), an adapter on the head; never merged. Computed in hidden's dtype.
        need_entropy: also compute the entropy.
        memory_budget: bytes of workspace, beyond inputs, outputs, gradients and one `[M, H]` of saved state; by
            default 32 MiB on a CPU and 512 MiB on a GPU.

    Returns:
        `TokenLogprobs`, in float32 (float64 for float64). logprob, entropy and lse are differentiable with respect
        to hidden, weight, bias and the adapter. Repeated calls give the same bits.

    Raises:
        ValueError: shapes, dtypes, devices or values that don't fit, with the numbers. On a GPU a target or row out
            of range is a device-side assertion instead, since looking at it would stall.
    """
    lora_a, lora_b, scaling = lora or (None, None, 1.0)
    if lora_a is not None and lora_b is not None:  # adapters are often kept in float32 beside a bfloat16 head
        lora_a, lora_b = lora_a.to(hidden.dtype), lora_b.to(hidden.dtype)
    if memory_budget is None:
        memory_budget = DEFAULT_MEMORY_BUDGET.get(hidden.device.type, 32 << 20)
    scalars = (float(scaling), float(temperature), softcap, float(logit_scale), need_entropy, memory_budget)
    p = Problem(hidden, weight, targets, rows, bias, lora_a, lora_b, *scalars)
    _check(p)
    backend = backend_for("linear_logprob", hidden)
    if backend == "reference":
        logprob, entropy, lse, is_top1 = reference.linear_logprob(
            hidden,
            weight,
            targets,
            rows=rows,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            lora=lora,
        )
        return TokenLogprobs(logprob, entropy if need_entropy else None, lse, is_top1)
    logprob, entropy, lse, _, is_top1, _ = _linear_logprob(*p, _what_to_save(p, backend), backend)
    return TokenLogprobs(logprob, entropy if need_entropy else None, lse, is_top1)


def _what_to_save(p: Problem, backend: str) -> str:
    head_trains = any(x is not None and x.requires_grad for x in (p.weight, p.bias, p.lora_a, p.lora_b))
    if not torch.is_grad_enabled() or not (p.hidden.requires_grad or head_trains):
        return "none"
    if backend == "cpu" and len(p.targets) * len(p.weight) * p.wide.itemsize <= p.memory_budget:
        return "logits"
    return "none" if head_trains or p.lora_a is not None else "unit"


def _forward(*arguments) -> tuple[Tensor, ...]:
    """(logprob, entropy, lse, what rounding took from lse, is_top1, saved)."""
    *fields, save, backend = arguments
    p = Problem(*fields)
    with torch.autocast(p.hidden.device.type, enabled=False):
        if backend == "triton":
            from posttrain.kernels.logprob import logprob_forward

            return logprob_forward(p, save)
        return logprob_tiled.forward(_contiguous(p), save, backend)


def _fake(*arguments):
    *fields, save, _ = arguments
    p = Problem(*fields)
    per_target = p.hidden.new_empty(p.targets.shape, dtype=p.wide)
    saved_width = {"unit": p.hidden.shape[-1], "logits": p.weight.shape[0]}.get(save)
    saved_shape = (0,) if saved_width is None else (len(p.targets), saved_width)
    return (
        per_target,
        torch.empty_like(per_target) if p.need_entropy else per_target.new_empty(0),
        torch.empty_like(per_target),
        torch.empty_like(per_target),
        torch.empty_like(per_target, dtype=torch.bool),
        p.hidden.new_empty(saved_shape, dtype=p.wide),
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, scaling, temperature, softcap, logit_scale, need_entropy, memory_budget, save, backend = inputs
    logprob, entropy, lse, lse_low, is_top1, saved = output
    ctx.mark_non_differentiable(lse_low, is_top1, saved)
    ctx.set_materialize_grads(False)
    ctx.scalars = (scaling, temperature, softcap, logit_scale, need_entropy, memory_budget)
    ctx.save, ctx.backend = save, backend
    ctx.save_for_backward(*tensors, logprob, entropy, lse, lse_low, saved)


def _backward(ctx, grad_logprob, grad_entropy, grad_lse, *_):
    *tensors, logprob, entropy, lse, lse_low, saved = ctx.saved_tensors
    needs_hidden, needs_weight, _, _, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:7]
    nothing = [None] * len(ctx.needs_input_grad)
    if grad_logprob is None and grad_entropy is None and grad_lse is None:
        return tuple(nothing)
    needs = [needs_hidden, needs_weight, needs_bias, needs_a or needs_b]
    incoming = (grad_logprob, grad_entropy, grad_lse)
    results = (logprob, entropy, lse, lse_low, saved)
    grads = _linear_logprob_backward(*incoming, *results, *tensors, *ctx.scalars, needs, ctx.save, ctx.backend)
    hidden, weight, bias, lora_a, lora_b = (g if n else None for g, n in zip(grads, [*needs, needs[3]], strict=True))
    return hidden, weight, None, None, bias, lora_a, lora_b, *nothing[7:]


def _gradient(*arguments) -> tuple[Tensor, ...]:
    incoming, results, (saved, *fields, needs, save, backend) = _parted(arguments)
    p = Problem(*fields)
    with torch.autocast(p.hidden.device.type, enabled=False):
        if save == "unit" and incoming.logprob is not None and incoming.entropy is None and incoming.lse is None:
            grads = Grads(_unit_gradient(p, incoming.logprob, saved, backend), None, None, None, None)
        elif backend == "triton":
            from posttrain.kernels.logprob_gradient import logprob_backward

            grads = logprob_backward(p, incoming, results, Needs(*needs))
        else:
            logits = saved if save == "logits" else None
            grads = logprob_tiled_gradient.backward(_contiguous(p), incoming, results, logits, Needs(*needs), backend)
    return _filled(p, grads)


def _unit_gradient(p: Problem, grad_logprob: Tensor, unit: Tensor, backend: str) -> Tensor:
    if backend == "triton":
        from posttrain.kernels.logprob_gradient import unit_backward

        return unit_backward(grad_logprob, unit, p.rows, len(p.hidden), p.hidden.dtype)
    return logprob_tiled_gradient.unit_backward(_contiguous(p), grad_logprob, unit)


def _parted(arguments: Sequence[Any]) -> tuple[Incoming, Results, Sequence[Any]]:
    """The first arguments of the backward, and the others."""
    return Incoming(*arguments[:3]), Results(*arguments[3:7]), arguments[7:]


def _filled(p: Problem, grads: Grads) -> tuple[Tensor, ...]:
    """A registered op returns tensors only: empty ones stand for gradients that nobody needs."""
    return tuple(p.hidden.new_empty(0) if g is None else g for g in grads)


def _fake_gradient(*arguments):
    _, _, (_, *fields, needs, _, _) = _parted(arguments)
    p, needs = Problem(*fields), Needs(*needs)
    wanted = zip((p.hidden, p.weight, p.bias, p.lora_a, p.lora_b), [*needs, needs.lora], strict=True)
    return tuple(torch.empty_like(x) if x is not None and need else p.hidden.new_empty(0) for x, need in wanted)


def _contiguous(p: Problem) -> Problem:
    tensors: dict[str, Any] = {name: x.contiguous() for name, x in p._asdict().items() if isinstance(x, Tensor)}
    return p._replace(**tensors)


def _check(p: Problem) -> None:
    hidden, weight, targets, rows = p[:4]
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        _refuse(f"hidden must be [N, H] and weight [V, H]; got {list(hidden.shape)} and {list(weight.shape)}")
    if len(weight) == 0:
        _refuse(f"the vocabulary must not be empty; got weight {list(weight.shape)}")
    if not hidden.is_floating_point():
        _refuse(f"hidden must be floating, got {hidden.dtype}")
    if targets.ndim != 1 or targets.dtype != torch.int64:
        _refuse(f"targets must be int64 [M]; got {targets.dtype} {list(targets.shape)}")
    if rows is None and len(targets) != len(hidden):
        _refuse(f"without rows, targets need one entry per row of hidden; got {len(targets)} for {len(hidden)} rows")
    if targets.device != hidden.device or (rows is not None and rows.device != hidden.device):
        where = "no rows" if rows is None else f"rows on {rows.device}"
        _refuse(f"targets and rows must be on {hidden.device} like hidden; got targets on {targets.device}, {where}")
    if rows is not None and (rows.shape != targets.shape or rows.dtype != torch.int64):
        _refuse(f"rows must be int64 {list(targets.shape)} like targets; got {rows.dtype} {list(rows.shape)}")
    if p.bias is not None and p.bias.shape != weight.shape[:1]:
        _refuse(f"bias must be [V] = [{len(weight)}]; got {list(p.bias.shape)}")
    if p.lora_a is not None and p.lora_b is not None:
        rank = p.lora_a.shape[0] if p.lora_a.ndim == 2 else -1
        if p.lora_a.shape != (rank, hidden.shape[1]) or p.lora_b.shape != (len(weight), rank):
            _refuse(f"lora must be A [R, H], B [V, R]; got {list(p.lora_a.shape)} and {list(p.lora_b.shape)}")
    for name, x in {"weight": weight, "bias": p.bias, "lora A": p.lora_a, "lora B": p.lora_b}.items():
        if x is not None and (x.dtype != hidden.dtype or x.device != hidden.device):
            _refuse(f"{name} must be {hidden.dtype} on {hidden.device} like hidden; got {x.dtype} on {x.device}")
    if not p.temperature > 0:
        _refuse(f"temperature must be positive, got {p.temperature}")
    if p.softcap is not None and not 0 < p.softcap < math.inf:
        _refuse(f"softcap must be positive and finite, got {p.softcap}")
    _check_range("targets", targets, len(weight), also=IGNORED)
    if rows is not None:
        _check_range("rows", rows, len(hidden), also=0 if len(hidden) else None)


def _check_range(name: str, index: Tensor, size: int, also: int | None) -> None:
    if torch.compiler.is_compiling() or len(index) == 0:
        return
    bad = (index < 0) | (index >= size)
    if also is not None:
        bad &= index != also
    if index.device.type == "cuda":
        torch._assert_async(~bad.any(), f"linear_logprob: {name} out of range [0, {size})")
    elif bool(bad.any()):
        where = int(bad.nonzero()[0])
        _refuse(f"{name}[{where}] is {int(index[where])}, out of range [0, {size})")


def _refuse(message: str) -> None:
    raise ValueError(f"linear_logprob: {message}")


_PROBLEM = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor? rows, Tensor? bias, Tensor? lora_a, Tensor? lora_b, "
    "float lora_scaling, float temperature, float? softcap, float logit_scale, bool need_entropy, SymInt memory_budget"
)
_linear_logprob_backward = define(
    "linear_logprob_backward",
    "(Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_lse, Tensor logprob, Tensor entropy, Tensor lse, "
    f"Tensor lse_low, Tensor saved, {_PROBLEM}, bool[] needs, str save, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gradient,
    _fake_gradient,
)
_linear_logprob = define(
    "linear_logprob",
    f"({_PROBLEM}, str save, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _setup_context,
    _backward,
)
