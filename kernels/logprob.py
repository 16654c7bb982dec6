"""linear_logprob on a GPU: GEMM and softmax statistics in one kernel (posttrain/ops/logprob.py has the formulas).

The kernels are in logprob_device.py and logprob_unit_device.py; here are the method, the choice of tiles, and the
launches. The backward is in logprob_gradient.py.

A program owns a block of targets and a *split* of the vocabulary, a fixed number of column tiles. It computes each
tile of logits in registers and folds it into the statistics of the tokens other than the target:

    m = max z_v,   s = sum e^(z_v - m),   t = sum (z_v - m) e^(z_v - m)

A second kernel merges the splits in order. Tiles, splits and that order don't depend on how many targets there are, so
a target's results have the same bits alone and in a batch, and with or without a gradient.

Saved state of a frozen head ("unit"): u = d logprob / dx = q W_y - sum over v != y of p_v W_v, with q = 1 - p_y. The
statistics kernel also writes P = e^(z_v - r) for a slab of the vocabulary, and a library GEMM adds P W to u. The
reference r of a target starts at z_y, which is near the maximum for any model worth training, and rises only if some
logit exceeds it by HEADROOM: then `align_kernel` rescales that target's rows. At the end u takes the factor
e^(r - lse). Two GEMMs in all.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from posttrain.kernels import logprob_device as kernels
from posttrain.kernels import logprob_unit_device as unit_kernels
from posttrain.kernels.entry import Entry, entry
from posttrain.kernels.tiles import Blocks
from posttrain.ops.backend import cuda_device
from posttrain.ops.block_sizes import capability_of, chosen, newest
from posttrain.ops.logprob_problem import Problem

HEADROOM = {torch.float16: 10.0, torch.bfloat16: 40.0, torch.float32: 40.0}  # e^10 < 65504

# Compute capability -> tiles for half precision, targets by columns of the vocabulary. A bias, a softcap or the entropy
# takes registers: then NARROW.
WIDE = {
    80: Blocks(128, 128, 64, 8, 3),
    86: Blocks(128, 128, 32, 8, 3),
    90: Blocks(128, 256, 64, 8, 3),
    120: Blocks(128, 128, 32, 8, 3),
}
NARROW = {
    80: Blocks(128, 64, 32, 4, 3),
    86: Blocks(64, 64, 32, 4, 3),
    90: Blocks(128, 128, 64, 8, 4),
    100: Blocks(128, 64, 64, 4, 4),
    120: Blocks(64, 64, 32, 4, 3),
}
FLOAT_BLOCKS = Blocks(64, 64, 32, 8, 2)
INTERPRETER_BLOCKS = Blocks(16, 16, 16, 4, 1)


def logprob_forward(p: Problem, save: str) -> tuple[Tensor, ...]:
    """(logprob, entropy, lse, what rounding took from lse, is_top1, saved); `save` is "none" or "unit" (no adapter)."""
    p = row_major(p)
    size = len(p.targets)
    logprob, lse, lse_low = p.hidden.new_empty((3, size), dtype=torch.float32)
    entropy = p.hidden.new_empty(size if p.need_entropy else 0, dtype=torch.float32)
    is_top1 = torch.empty_like(p.targets, dtype=torch.uint8)
    results = (logprob, entropy, lse, lse_low, is_top1)
    unit = p.hidden.new_zeros((size, p.hidden.shape[1]) if save == "unit" else 0, dtype=torch.float32)
    with cuda_device(p.hidden):
        if save == "unit":
            for part in _parts(p):
                _forward_with_unit(_part(p, part), unit[part], *(x[part] if len(x) else x for x in results))
        elif size:
            low = low_rank(p)
            partials = _partials(p)
            _statistics(p, low, partials, range(len(partials[0])), None)
            _combine(p, partials, _target_logits(p, low), *results, None)
    return logprob, entropy, lse, lse_low, is_top1.view(torch.bool), unit


def blocks(p: Problem) -> Blocks:
    """Tile sizes for a problem: they depend on the device, the dtype and the features, never on M."""
    if not p.hidden.is_cuda:
        return INTERPRETER_BLOCKS
    if p.hidden.dtype == torch.float32:
        return FLOAT_BLOCKS
    plain = p.bias is None and p.softcap is None and not p.need_entropy
    shipped = newest(WIDE if plain else NARROW, capability_of(p.hidden.device))
    return chosen(f"linear_logprob {'wide' if plain else 'narrow'}", shipped, p.hidden.device)


_Partials = tuple[Tensor, Tensor, Tensor | None]


class _Slab(NamedTuple):
    """Unnormalised probabilities of some splits, and the r that they are relative to."""

    p: Tensor  # [M in whole blocks, columns]
    reference: Tensor  # [M]
    tile_reference: Tensor  # [tiles, M]


def _split_width(p: Problem) -> int:
    return kernels.TILES.value * blocks(p).columns


def new_slab(p: Problem, columns: int) -> Tensor:
    """Room for all targets, in whole blocks, and some columns of the vocabulary."""
    rows = blocks(p).rows
    return p.hidden.new_empty(triton.cdiv(len(p.targets), rows) * rows, columns)


def _partials(p: Problem) -> _Partials:
    """Room for the statistics m, s and t of every split `[splits, M]`."""
    shape = (triton.cdiv(len(p.weight), _split_width(p)), len(p.targets))
    m, s = (p.hidden.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return m, s, torch.empty_like(m) if p.need_entropy else None


def row_major(p: Problem) -> Problem:
    """The problem with tensors whose rows are contiguous; hidden and weight may keep a row stride."""
    hidden, weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (p.hidden, p.weight))
    others = {name: getattr(p, name) for name in ("targets", "rows", "bias", "lora_a", "lora_b")}
    others = {name: None if x is None else x.contiguous() for name, x in others.items()}
    return p._replace(hidden=hidden, weight=weight, **others)


def _parts(p: Problem) -> Iterator[slice]:
    """Runs of targets so short that their probabilities of one split fit in the budget."""
    step = blocks(p).rows
    fitting = p.memory_budget // (_split_width(p) * p.hidden.itemsize)
    step = max(step, fitting // step * step)
    for first in range(0, len(p.targets), step):
        yield slice(first, min(first + step, len(p.targets)))


def _part(p: Problem, part: slice) -> Problem:
    """The problem of some of its targets."""
    if p.rows is None:
        return p._replace(targets=p.targets[part], hidden=p.hidden[part])
    return p._replace(targets=p.targets[part], rows=p.rows[part])


def _head(p: Problem, low: Tensor | None) -> dict[str, Any]:
    """The arguments of the kernels that compute logits: z = raw inner, or outer tanh(raw inner)."""
    return {
        "hidden_ptr": p.hidden,
        "weight_ptr": p.weight,
        "targets_ptr": p.targets,
        "rows_ptr": p.rows,
        "bias_ptr": p.bias,
        "low_ptr": low,
        "lora_b_ptr": p.lora_b,
        "M": len(p.targets),
        "V": len(p.weight),
        "H": p.hidden.shape[1],
        "R": 0 if low is None else low.shape[1],
        "hidden_stride": p.hidden.stride(0),
        "weight_stride": p.weight.stride(0),
        "inner": p.logit_scale / (p.temperature if p.softcap is None else p.softcap),
        "outer": _outer(p),
        "SOFTCAP": p.softcap is not None,
    }


def _outer(p: Problem) -> float:
    return 1.0 if p.softcap is None else p.softcap / p.temperature


def gemm_arguments(p: Problem, low: Tensor | None, b: Blocks) -> dict[str, Any]:
    """The arguments and launch options of the kernels that compute tiles of logits."""
    return _head(p, low) | {
        "BLOCK_M": b.rows,
        "BLOCK_V": b.columns,
        "BLOCK_K": b.depth,
        "BLOCK_R": _rank_block(p),
        "EVEN_H": p.hidden.shape[1] % b.depth == 0,
        "num_warps": b.warps,
        "num_stages": b.stages,
    }


def _rank_block(p: Problem) -> int:
    return 16 if p.lora_a is None else max(16, min(32, triton.next_power_of_2(len(p.lora_a))))


def low_rank(p: Problem) -> Tensor | None:
    """scaling x A^T `[M, R]`, in the dtype of hidden."""
    if p.lora_a is None:
        return None
    size, (rank, width) = len(p.targets), p.lora_a.shape
    low = p.hidden.new_empty(size, rank)
    if low.numel():
        grid = (triton.cdiv(size, kernels.PROJECT["BLOCK_M"]), triton.cdiv(rank, _rank_block(p)))
        tensors = (p.hidden, p.rows, p.lora_a, low)
        scalars = (size, width, rank, p.hidden.stride(0), p.lora_scaling)
        kernels.project_kernel[grid](*tensors, *scalars, BLOCK_R=_rank_block(p), **kernels.PROJECT)
    return low


def _target_logits(p: Problem, low: Tensor | None) -> Tensor:
    z_target = p.hidden.new_empty(p.targets.shape, dtype=torch.float32)
    grid = (triton.cdiv(len(p.targets), kernels.TARGET_LOGIT["BLOCK_M"]),)
    kernels.target_logit_kernel[grid](**_head(p, low), z_target_ptr=z_target, **kernels.TARGET_LOGIT)
    return z_target


def _statistics(p: Problem, low: Tensor | None, partials: _Partials, splits: range, slab: _Slab | None) -> None:
    """Fill the partials of some splits, and their slab if there is one."""
    b = blocks(p)
    kernels.statistics_kernel[(triton.cdiv(len(p.targets), b.rows) * len(splits),)](
        **gemm_arguments(p, low, b),
        m_ptr=partials[0],
        s_ptr=partials[1],
        t_ptr=partials[2],
        p_ptr=None if slab is None else slab.p,
        reference_ptr=None if slab is None else slab.reference,
        tile_reference_ptr=None if slab is None else slab.tile_reference,
        p_stride=0 if slab is None else slab.p.stride(0),
        headroom=HEADROOM[p.hidden.dtype],
        first_split=splits.start,
        num_splits=len(splits),
        ENTROPY=p.need_entropy,
    )


def _combine(p: Problem, partials: _Partials, z_target: Tensor, *results: Tensor | None) -> None:
    """Fill logprob, entropy, lse, lse_low, is_top1 and, if it is there, q from the partials."""
    size = len(p.targets)
    grid = (triton.cdiv(size, kernels.COMBINE["BLOCK_M"]),)
    tensors = (p.targets, *partials, z_target, *results)
    sizes = (size, len(p.weight), len(partials[0]))
    kernels.combine_kernel[grid](*tensors, *sizes, ENTROPY=p.need_entropy, **kernels.COMBINE)


def _forward_with_unit(p: Problem, unit: Tensor, *results: Tensor) -> None:
    """Statistics and u of all targets, slab by slab; `unit` comes in as zeros."""
    size, split_width = len(p.targets), _split_width(p)
    partials, z_target = _partials(p), _target_logits(p, None)
    num_splits = len(partials[0])
    step = min(num_splits, max(1, p.memory_budget // (size * split_width * p.hidden.itemsize)))
    tile_reference = z_target.new_empty(step * kernels.TILES.value, size)
    slab = _Slab(new_slab(p, step * split_width), z_target.clone(), tile_reference)
    for first in range(0, num_splits, step):
        splits = range(first, min(first + step, num_splits))
        _statistics(p, None, partials, splits, slab)
        weight = p.weight[first * split_width : splits.stop * split_width]
        _align(slab, unit, len(weight), blocks(p).columns)
        accumulate(unit, slab.p[:size, : len(weight)], weight)
    others = torch.empty_like(z_target)
    _combine(p, partials, z_target, *results, others)
    _, _, lse, lse_low, _ = results
    _finish_unit(p, unit, slab.reference, z_target, lse, lse_low, others)


def _align(slab: _Slab, unit: Tensor, slab_columns: int, tile: int) -> None:
    """Make everything relative to the highest reference so far."""
    size, width = unit.shape
    grid = (triton.cdiv(size, unit_kernels.ALIGN["BLOCK_M"]),)
    sizes = (size, width, slab.p.stride(0), triton.cdiv(slab_columns, tile))
    unit_kernels.align_kernel[grid](
        slab.p, unit, slab.reference, slab.tile_reference, *sizes, BLOCK_V=tile, **unit_kernels.ALIGN
    )


def _finish_unit(p: Problem, unit: Tensor, *per_target: Tensor) -> None:
    """u from its sum, given reference, z_target, lse, lse_low and q."""
    size, width = unit.shape
    tile = unit_kernels.FINISH_UNIT
    grid = (triton.cdiv(size, tile["BLOCK_M"]), triton.cdiv(width, tile["BLOCK_H"]))
    sizes = (size, len(p.weight), width, p.weight.stride(0))
    scales = {"outer": _outer(p), "scale": p.logit_scale / p.temperature, "SOFTCAP": p.softcap is not None}
    unit_kernels.finish_unit_kernel[grid](p.weight, p.targets, unit, *per_target, *sizes, **scales, **tile)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in float32 whatever the dtype of a and b."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def ahead_of_time() -> Iterator[Entry]:
    """The kernels with their production block sizes, for tests/kernels/aot.py."""
    for capability, p, b in problems_ahead_of_time():
        arguments = gemm_arguments(p, None, b) | {"headroom": HEADROOM[p.hidden.dtype], "ENTROPY": p.need_entropy}
        arguments |= {"p_ptr": p.hidden, "p_stride": 1024, "first_split": 1, "num_splits": 1}
        arguments |= {} if p.need_entropy else {"t_ptr": None}
        yield entry(kernels.statistics_kernel, f"{p.hidden.dtype} {tuple(b)}", arguments, capability=capability)
    index, half = (torch.empty(16, dtype=dtype, device="meta") for dtype in (torch.int64, torch.bfloat16))
    arguments = dict.fromkeys(("targets_ptr", "rows_ptr"), index)
    data = ("hidden_ptr", "weight_ptr", "bias_ptr", "low_ptr", "lora_a_ptr", "lora_b_ptr", "p_ptr")
    arguments |= dict.fromkeys(data, half) | {"is_top1_ptr": half.new_empty(16, dtype=torch.uint8)}
    arguments |= dict.fromkeys(("V", "H", "R", "hidden_stride", "weight_stride", "p_stride"), 16)
    arguments |= dict.fromkeys(("M", "num_splits", "num_tiles"), 1)
    arguments |= dict.fromkeys(("inner", "outer", "scale", "scaling"), 1.0)
    arguments |= {"SOFTCAP": True, "ENTROPY": True, "BLOCK_V": 256, "BLOCK_R": 16}
    for kernel, block in (
        (kernels.project_kernel, kernels.PROJECT),
        (kernels.target_logit_kernel, kernels.TARGET_LOGIT),
        (kernels.combine_kernel, kernels.COMBINE),
        (unit_kernels.align_kernel, unit_kernels.ALIGN),
        (unit_kernels.finish_unit_kernel, unit_kernels.FINISH_UNIT),
    ):
        yield entry(kernel, "", arguments | block)


def problems_ahead_of_time() -> Iterator[tuple[int, Problem, Blocks]]:
    """(compute capability, problem on the meta device, its tiles) for each kind of tile.

    With softcap, bias, entropy and an H that is no multiple of a tile, or without any of them.
    """
    for capability, rich in product((80, 89, 90, 100, 120), (False, True)):
        yield capability, _problem_ahead_of_time(torch.bfloat16, rich), newest(NARROW if rich else WIDE, capability)
    yield 80, _problem_ahead_of_time(torch.float32, True), FLOAT_BLOCKS


def _problem_ahead_of_time(dtype: torch.dtype, rich: bool) -> Problem:
    width = 4112 if rich else 4096
    data = torch.empty(width, width, dtype=dtype, device="meta")
    index = torch.empty(100, dtype=torch.int64, device="meta")
    bias, softcap = data[0] if rich else None, 30.0 if rich else None
    return Problem(data, data, index, index, bias, None, None, 1.0, 1.0, softcap, 1.0, rich, memory_budget=0)
