"""The backward of linear_logprob on a GPU (posttrain/ops/logprob.py has the formulas).

The kernels are in logprob_gradient_device.py; kernels/logprob.py has the forward and the choice of tiles.

For each slab of the vocabulary one kernel recomputes the logits and writes their gradient in the dtype of the inputs;
then two library GEMMs, dX += D W in float32 and dW = D^T X, rounded once. A target whose incoming gradients are all 0
counts as skipped there: a block of such targets writes zeros without computing logits. The library GEMMs keep their
size, since nobody waits to learn how many targets are left.

A unit that the forward saved only has to be weighted, and summed over the targets of each row of hidden.
"""

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from posttrain.kernels import logprob_gradient_device as kernels
from posttrain.kernels.entry import Entry, entry
from posttrain.kernels.logprob import (
    accumulate,
    blocks,
    gemm_arguments,
    low_rank,
    new_slab,
    problems_ahead_of_time,
    row_major,
)
from posttrain.ops.backend import cuda_device
from posttrain.ops.logprob_problem import IGNORED, Grads, Incoming, Needs, Problem, Results, has_gradient


def logprob_backward(p: Problem, incoming: Incoming, results: Results, needs: Needs) -> Grads:
    """The gradients, from logits that are computed again slab by slab, except where a block of targets has none."""
    p = row_major(p)
    size, width = len(p.targets), p.hidden.shape[1]
    with cuda_device(p.hidden):
        p = p._replace(targets=p.targets.where(has_gradient(p, incoming), IGNORED))
        low = low_rank(p)
        grad_x = p.hidden.new_zeros((size, width), dtype=torch.float32) if needs.hidden else None
        grad_low = None if low is None else low.new_zeros(low.shape, dtype=torch.float32)
        x = _gathered(p) if needs.weight or needs.lora else p.hidden
        grad_weight = torch.empty_like(p.weight) if needs.weight else None
        grad_bias = torch.empty_like(p.bias) if p.bias is not None and needs.bias else None
        grad_b = torch.empty_like(p.lora_b) if p.lora_b is not None and needs.lora else None
        coefficients = _coefficients(p, incoming, results)
        for columns, d in _gradient_slabs(p, low, coefficients):
            if grad_x is not None:
                accumulate(grad_x, d, p.weight[columns])
            if grad_weight is not None:
                torch.mm(d.T, x, out=grad_weight[columns])
            if grad_bias is not None:
                grad_bias[columns] = d.sum(0, dtype=torch.float32)
            if low is not None and grad_low is not None and p.lora_b is not None:
                accumulate(grad_low, d, p.lora_b[columns])
                if grad_b is not None:
                    torch.mm(d.T, low, out=grad_b[columns])
        grad_a = None
        if p.lora_a is not None and grad_low is not None:
            grad_low = (grad_low * p.lora_scaling).to(p.hidden.dtype)
            if grad_x is not None:
                accumulate(grad_x, grad_low, p.lora_a)
            grad_a = torch.mm(grad_low.T, x) if needs.lora else None
        grad_hidden = None if grad_x is None else _to_rows(p, grad_x)
    return Grads(grad_hidden, grad_weight, grad_bias, grad_a, grad_b)


def unit_backward(grad_logprob: Tensor, unit: Tensor, rows: Tensor | None, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Gradient of hidden `[num_rows, H]` from the saved unit: sum of g u over each row's targets, in order."""
    with cuda_device(unit):
        return _sum_rows(unit, grad_logprob.contiguous(), rows, num_rows, dtype)


def _coefficients(p: Problem, incoming: Incoming, results: Results) -> dict[str, Tensor | None]:
    """What the gradient of a target's logits depends on besides the logits."""
    scale = p.logit_scale / p.temperature
    grad_logprob, grad_entropy, grad_lse = incoming
    logprob, entropy, lse, lse_low = results
    common, at_target = torch.zeros_like(logprob), torch.zeros_like(logprob)
    if grad_logprob is not None:
        common -= grad_logprob
        at_target -= grad_logprob * torch.expm1(logprob)
    if grad_lse is not None:
        common += grad_lse
        at_target += grad_lse * logprob.exp()
    if grad_entropy is not None:
        common -= grad_entropy * entropy
        at_target -= grad_entropy * logprob.exp() * (logprob + entropy)
        grad_entropy = grad_entropy * scale
    return {
        "lse_ptr": lse,
        "lse_low_ptr": lse_low,
        "common_ptr": common * scale,
        "grad_target_ptr": at_target * scale,
        "grad_entropy_ptr": grad_entropy,
    }


def _gradient_slabs(
    p: Problem, low: Tensor | None, coefficients: dict[str, Tensor | None]
) -> Iterator[tuple[slice, Tensor]]:
    """Slabs of the vocabulary with the gradient of their raw logits `[M, columns]`; each overwrites the one before."""
    size = len(p.targets)
    if size == 0:
        yield slice(None), p.hidden.new_empty(0, len(p.weight))
        return
    b = blocks(p)
    row_blocks, num_tiles = triton.cdiv(size, b.rows), triton.cdiv(len(p.weight), b.columns)
    step = min(num_tiles, max(1, p.memory_budget // (size * b.columns * p.hidden.itemsize)))
    slab = new_slab(p, step * b.columns)
    for first_tile in range(0, num_tiles, step):
        slab_tiles = min(step, num_tiles - first_tile)
        kernels.gradient_kernel[(row_blocks * slab_tiles,)](
            **gemm_arguments(p, low, b),
            **coefficients,
            d_ptr=slab,
            d_stride=slab.stride(0),
            first_tile=first_tile,
            num_tiles=slab_tiles,
        )
        first, last = first_tile * b.columns, min((first_tile + slab_tiles) * b.columns, len(p.weight))
        yield slice(first, last), slab[:size, : last - first]


def _gathered(p: Problem) -> Tensor:
    return p.hidden if p.rows is None else p.hidden[p.rows]


def _to_rows(p: Problem, grad_x: Tensor) -> Tensor:
    if p.rows is None:
        return grad_x.to(p.hidden.dtype)
    return _sum_rows(grad_x, None, p.rows, len(p.hidden), p.hidden.dtype)


def _sum_rows(x: Tensor, factor: Tensor | None, rows: Tensor | None, num_rows: int, dtype: torch.dtype) -> Tensor:
    out = x.new_empty(num_rows, x.shape[1], dtype=dtype)
    order = ends = None
    if rows is not None:
        ordered, order = torch.sort(rows, stable=True)
        ends = torch.searchsorted(ordered, torch.arange(num_rows, device=x.device), right=True)
    if out.numel():
        grid = (num_rows, triton.cdiv(x.shape[1], kernels.SUM_ROWS["BLOCK_H"]))
        kernels.sum_rows_kernel[grid](x, factor, order, ends, out, x.shape[1], **kernels.SUM_ROWS)
    return out


def ahead_of_time() -> Iterator[Entry]:
    """The kernels with their production block sizes, for tests/kernels/aot.py."""
    for capability, p, b in problems_ahead_of_time():
        low = p.hidden[:, :16]
        arguments = gemm_arguments(p._replace(lora_b=low), low, b)
        arguments |= {"d_ptr": p.hidden, "d_stride": 1024, "first_tile": 1, "num_tiles": 1}
        arguments |= {} if p.need_entropy else {"grad_entropy_ptr": None}
        yield entry(kernels.gradient_kernel, f"{p.hidden.dtype} {tuple(b)}", arguments, capability=capability)
    index, half = (torch.empty(16, dtype=dtype, device="meta") for dtype in (torch.int64, torch.bfloat16))
    arguments = {"order_ptr": index, "ends_ptr": index, "out_ptr": half, "H": 16, **kernels.SUM_ROWS}
    yield entry(kernels.sum_rows_kernel, "", arguments)
