"""linear_logprob by tiles: a library GEMM makes a tile of logits, C++ folds it while it is in cache.

Vocabulary outside, rows inside, one tile of at most ROWS x COLUMNS logits at a time:

    statistics     per row, over the tokens v other than the target y: the largest logit, s = sum e^(z-m) and
                   t = sum (z-m) e^(z-m) for a reference m near the maximum
    unit           with E = sum over v != y of e^(z-m) W_v accumulated by a second GEMM per tile and q = 1 - p_y,
                   d logprob / dx = q (W_y - E / s): a frozen head's backward is one multiplication
    gradient       the tile again (or the cached logits), turned into dlogits, then the two GEMMs of a linear layer

Everything is computed in float32 (float64 for float64); half-precision weights are widened slab by slab. The CUDA
kernels' GEMMs take bfloat16 as it is and give float32: logits come out the same, but what multiplies bfloat16 in a
second GEMM (x A^T, e^(z-m), the gradient of the logits) is rounded once, by the kernel that makes it, in the tile's own
memory. float16 can't hold e^(z-m), which may reach e^16, so it is widened there too.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain import _C
from posttrain.ops.backend import CUDA_DTYPES, cuda_device, cuda_kernels, cuda_stream
from posttrain.ops.logprob_problem import IGNORED, Grads, Needs, Problem, has_gradient

ROWS, COLUMNS = 4096, 2048  # no more columns than kLogprobColumns of csrc/cuda/kernels.h


class _Targets(NamedTuple):
    """The m <= M targets that count, with what predicts them."""

    kept: Tensor | None  # their indices among the M, None for all
    rows: Tensor | None  # the row of hidden of each, None for 0, 1, 2, ...
    y: Tensor  # [m]
    x: Tensor  # [m, H], a factor of GEMMs
    lora_x: Tensor | None  # [m, R] scaling * x A^T, a factor of GEMMs


class _Slab(NamedTuple):
    """A run of the vocabulary."""

    columns: slice
    weight: Tensor  # [c, H], a factor of GEMMs
    lora_b: Tensor | None  # [c, R], a factor of GEMMs
    bias: Tensor | None  # [c] wide


def forward(p: Problem, save: str, backend: str) -> tuple[Tensor, ...]:
    """(logprob, entropy, lse, lse_low, is_top1, saved); `saved` is the unit `[M, H]`, the logits `[M, V]` or empty.

    `backend` is "cpu" or "cuda": whose kernels fold the tiles.
    """
    factor = _factor(p, backend)
    t = _select(p, p.targets != IGNORED, factor)
    wide = _wide(p)
    state = t.x.new_zeros(5, len(t.y), dtype=wide)  # m, largest other logit, s, t, the target's logit
    state[:2] = -torch.inf
    unit = torch.empty_like(t.x, dtype=wide) if save == "unit" else None
    logits = t.x.new_empty(len(t.y), len(p.weight), dtype=wide) if save == "logits" else None
    buffer = _buffer(p, t)
    for slab in _slabs(p, factor):
        for block in _blocks(p, t):
            tile = _view(buffer, block, slab) if logits is None else logits[block, slab.columns]
            _make_logits(tile, t, block, slab)
            _fold(tile, p, t.y[block], slab, state[:, block], None if unit is None else unit[block], backend)
            if unit is not None:
                _add_product(
                    unit[block], _as_factor(tile, factor), slab.weight, beta=0 if slab.columns.start == 0 else 1
                )
    if unit is not None:
        _finish_unit(unit, p, t, state)
    return (*_finish(p, t, state), _spread(unit if logits is None else logits, p, t))


def unit_backward(p: Problem, grad_logprob: Tensor, unit: Tensor) -> Tensor:
    """Gradient of hidden, from the unit that the forward saved."""
    if p.rows is None:
        return (unit * grad_logprob.to(unit.dtype).unsqueeze(-1)).to(p.hidden.dtype)
    grad = torch.zeros_like(p.hidden, dtype=unit.dtype)
    for start in range(0, len(p.targets), ROWS):
        block = slice(start, start + ROWS)
        _add_rows(grad, p.rows[block], unit[block] * grad_logprob[block].to(unit.dtype).unsqueeze(-1))
    return grad.to(p.hidden.dtype)


def backward(
    p: Problem,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    logprob: Tensor,
    entropy: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    logits: Tensor | None,
    needs: Needs,
    backend: str,
) -> Grads:
    """All gradients, from the logits recomputed by tiles or cached by the forward; rows with none cost nothing."""
    factor = _factor(p, backend)
    active = has_gradient(p, grad_logprob, grad_entropy, grad_lse)
    if not bool(active.any()):
        return _zeros(p, needs)
    t = _select(p, active, factor)
    grads = _Gradients(p, t, needs)
    per_target = (
        logprob,
        None if grad_entropy is None else entropy,
        lse,
        lse_low,
        grad_logprob,
        grad_entropy,
        grad_lse,
    )
    per_row = [None if g is None else _pick(g, p, t) for g in per_target]
    buffer = _buffer(p, t)
    for slab in _slabs(p, factor):
        grads.open(slab)
        for block in _blocks(p, t):
            tile = _view(buffer, block, slab)
            source = tile
            if logits is None:
                _make_logits(tile, t, block, slab)
            else:
                source = logits[block, slab.columns] if t.kept is None else logits[t.kept[block], slab.columns]
            _make_gradient(
                source,
                tile,
                p,
                t.y[block],
                slab,
                logits is not None,
                [None if g is None else g[block] for g in per_row],
                backend,
            )
            grads.add(_as_factor(tile, factor), block, slab)
        grads.close(slab)
    return grads.finish()


class _Gradients:
    """Gradients in the making: of x summed over the whole vocabulary, of the head slab by slab."""

    def __init__(self, p: Problem, t: _Targets, needs: Needs) -> None:
        self.p, self.t, self.needs = p, t, needs
        wide = _wide(p)
        self.x = torch.zeros_like(t.x, dtype=wide) if needs.hidden else None
        inner = t.lora_x if needs.hidden or needs.lora else None
        self.lora_x = None if inner is None else torch.zeros_like(inner, dtype=wide)
        self.weight = torch.empty_like(p.weight) if needs.weight else None
        self.bias = torch.empty_like(p.bias) if p.bias is not None and needs.bias else None
        self.lora_b = torch.empty_like(p.lora_b) if p.lora_b is not None and needs.lora else None

    def open(self, slab: _Slab) -> None:
        """Start the head's sums for a slab: in place where the gradient is wide, else in a buffer rounded once."""
        wanted = [None if g is None else g[slab.columns] for g in (self.weight, self.bias, self.lora_b)]
        self.slab_sums = [None if g is None else g.to(_wide(self.p)) for g in wanted]
        for total in self.slab_sums:
            if total is not None and total.ndim == 1:
                total.zero_()

    def add(self, tile: Tensor, block: slice, slab: _Slab) -> None:
        """Take in dlogits `[rows of block, columns of slab]`; the first block's products replace what was there."""
        weight, bias, lora_b = self.slab_sums
        beta = 0 if block.start == 0 else 1
        if self.x is not None:
            _add_product(self.x[block], tile, slab.weight)
        if self.lora_x is not None and slab.lora_b is not None:
            _add_product(self.lora_x[block], tile, slab.lora_b)
        if weight is not None:
            _add_product(weight, tile.T, self.t.x[block], beta)
        if bias is not None:
            bias.add_(tile.sum(0, dtype=bias.dtype))
        if lora_b is not None and self.t.lora_x is not None:
            _add_product(lora_b, tile.T, self.t.lora_x[block], beta)

    def close(self, slab: _Slab) -> None:
        """Round the slab's sums into the gradients that are not wide."""
        for grad, total in zip((self.weight, self.bias, self.lora_b), self.slab_sums, strict=True):
            if grad is not None and total is not None and grad.dtype != total.dtype:
                grad[slab.columns].copy_(total)

    def finish(self) -> Grads:
        """Undo the gathering of rows, and lead the gradient of the LoRA's inner product to A and x."""
        p, t = self.p, self.t
        lora_a = None
        if self.lora_x is not None and p.lora_a is not None:
            self.lora_x *= p.lora_scaling
            if self.needs.lora:
                lora_a = _product(self.lora_x.T, t.x).to(p.lora_a.dtype)
            if self.x is not None:
                _add_product(self.x, self.lora_x, p.lora_a.to(t.x.dtype))
        hidden = self.x
        if hidden is not None and t.rows is not None:
            hidden = _add_rows(torch.zeros_like(p.hidden, dtype=hidden.dtype), t.rows, hidden)
        hidden = None if hidden is None else hidden.to(p.hidden.dtype)
        return Grads(hidden, self.weight, self.bias, lora_a, self.lora_b)


def _zeros(p: Problem, needs: Needs) -> Grads:
    """The gradients where no target has one."""
    needed = (needs.hidden, needs.weight, needs.bias, needs.lora, needs.lora)
    inputs = (p.hidden, p.weight, p.bias, p.lora_a, p.lora_b)
    zeros = [torch.zeros_like(x) if x is not None and n else None for x, n in zip(inputs, needed, strict=True)]
    return Grads(*zeros)


def _select(p: Problem, wanted: Tensor, factor: torch.dtype) -> _Targets:
    kept = None if bool(wanted.all()) else wanted.nonzero().squeeze(-1)
    rows, y = p.rows, p.targets
    if kept is not None:
        rows, y = kept if rows is None else rows[kept], y[kept]
    x = (p.hidden if rows is None else p.hidden[rows]).to(factor)
    lora_x = None
    if p.lora_a is not None:
        lora_x = _product(x, p.lora_a.to(factor).T).mul_(p.lora_scaling).to(factor)
    return _Targets(kept, rows, y, x, lora_x)


def _wide(p: Problem) -> torch.dtype:
    """The dtype of logits, statistics and sums."""
    return torch.promote_types(p.hidden.dtype, torch.float32)


def _factor(p: Problem, backend: str) -> torch.dtype:
    """The dtype of what GEMMs multiply."""
    return p.hidden.dtype if backend == "cuda" and p.hidden.dtype == torch.bfloat16 else _wide(p)


def _as_factor(tile: Tensor, factor: torch.dtype) -> Tensor:
    """What a kernel left in a tile, in the first part of each row if it takes less room than the logits did."""
    return tile.view(factor)[:, : tile.shape[1]]


def _slabs(p: Problem, factor: torch.dtype) -> Iterator[_Slab]:
    wide = _wide(p)
    for start in range(0, len(p.weight), COLUMNS):
        columns = slice(start, min(start + COLUMNS, len(p.weight)))
        bias = None if p.bias is None else p.bias[columns].to(wide)
        lora_b = None if p.lora_b is None else p.lora_b[columns].to(factor)
        yield _Slab(columns, p.weight[columns].to(factor), lora_b, bias)


def _blocks(p: Problem, t: _Targets) -> Iterator[slice]:
    height = _height(p, t)
    for start in range(0, len(t.y), height):
        yield slice(start, min(start + height, len(t.y)))


def _height(p: Problem, t: _Targets) -> int:
    """Rows of a tile: ROWS, or fewer where the memory budget is small."""
    return max(1, min(ROWS, p.memory_budget // (min(COLUMNS, len(p.weight)) * _wide(p).itemsize)))


def _buffer(p: Problem, t: _Targets) -> Tensor:
    """Room for one tile; every tile is a contiguous view of its start."""
    return t.x.new_empty(min(_height(p, t), len(t.y)) * min(COLUMNS, len(p.weight)), dtype=_wide(p))


def _view(buffer: Tensor, block: slice, slab: _Slab) -> Tensor:
    shape = (block.stop - block.start, slab.columns.stop - slab.columns.start)
    return buffer[: shape[0] * shape[1]].view(shape)


def _make_logits(tile: Tensor, t: _Targets, block: slice, slab: _Slab) -> None:
    _add_product(tile, t.x[block], slab.weight.T, beta=0)
    if slab.lora_b is not None and t.lora_x is not None:
        _add_product(tile, t.lora_x[block], slab.lora_b.T)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 or wider; `a` is rounded to the dtype of `b`."""
    total = b.new_empty(len(a), b.shape[1], dtype=torch.promote_types(b.dtype, torch.float32))
    return _add_product(total, a, b, beta=0)


def _add_product(total: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> Tensor:
    """total = beta total + a b, with `a` rounded to the dtype of `b`; a GPU multiplies half and sums in float32."""
    a = a.to(b.dtype)
    if b.dtype == total.dtype or not total.is_cuda:
        return total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)
    return torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)


def _add_rows(total: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    """total[rows[i]] += x[i], in a fixed order: on CUDA index_put_ sorts, and index_add_ adds as it comes."""
    return total.index_put_((rows,), x, accumulate=True) if total.is_cuda else total.index_add_(0, rows, x)


def _fold(tile: Tensor, p: Problem, y: Tensor, slab: _Slab, state: Tensor, unit: Tensor | None, backend: str) -> None:
    m, top, s, t, z_target = state
    _kernel("logprob_fold", p, backend)(
        tile.data_ptr(),
        tile.stride(0),
        *tile.shape,
        slab.columns.start,
        y.data_ptr(),
        _address(slab.bias),
        *_transform(p),
        m.data_ptr(),
        top.data_ptr(),
        s.data_ptr(),
        t.data_ptr() if p.need_entropy else 0,
        z_target.data_ptr(),
        _address(unit),
        p.hidden.shape[-1],
    )


def _make_gradient(
    source: Tensor,
    tile: Tensor,
    p: Problem,
    y: Tensor,
    slab: _Slab,
    finished: bool,
    per_row: list[Tensor | None],
    backend: str,
) -> None:
    """Gradient of the logits in `source` (raw, or finished z) into `tile`; the CUDA kernel has raw ones in `tile`."""
    logprob, entropy, lse, lse_low, grad_logprob, grad_entropy, grad_lse = map(_address, per_row)
    on_cpu = backend == "cpu"
    _kernel("logprob_grad", p, backend)(
        *((source.data_ptr(), source.stride(0)) if on_cpu else ()),
        tile.data_ptr(),
        tile.stride(0),
        *tile.shape,
        slab.columns.start,
        y.data_ptr(),
        _address(slab.bias),
        *_transform(p),
        *((finished,) if on_cpu else ()),
        logprob,
        entropy,
        lse,
        lse_low,
        grad_logprob,
        grad_entropy,
        grad_lse,
    )


def _kernel(name: str, p: Problem, backend: str) -> Callable[..., None]:
    """The C++ kernel, or the CUDA kernel on the current stream, which writes what the next GEMM multiplies."""
    if backend == "cpu":
        return partial(getattr(_C, name), _wide(p).itemsize)
    kernel = getattr(cuda_kernels(p.hidden), f"cuda_{name}")

    def launch(*arguments: float) -> None:
        with cuda_device(p.hidden):
            kernel(cuda_stream(p.hidden), CUDA_DTYPES[_factor(p, backend)], *arguments)

    return launch


def _transform(p: Problem) -> tuple[float, float, float]:
    return p.logit_scale, p.softcap or 0.0, 1.0 / p.temperature


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _finish(p: Problem, t: _Targets, state: Tensor) -> tuple[Tensor, ...]:
    """Add the target to the statistics of the others, in float64 (posttrain/ops/logprob.py has the formulas)."""
    m, top, s, weighted, z = state.double()
    gap = (m - z) + s.log()
    logprob = -F.softplus(gap)
    lse = z - logprob
    rounded = lse.to(state.dtype)
    entropy = state.new_empty(0)
    if p.need_entropy:
        q = torch.sigmoid(gap)
        others = torch.where(s > 0, s.log() - weighted / s, 0.0)
        entropy = -torch.xlogy(q, q) - logprob.exp() * logprob + q * others
        entropy = _spread(entropy.to(state.dtype), p, t)
    logprob, low = logprob.to(state.dtype), (lse - rounded).to(state.dtype)
    logprob, lse, low, is_top1 = (_spread(x, p, t) for x in (logprob, rounded, low, z >= top))
    return logprob, entropy, lse, low, is_top1


def _finish_unit(unit: Tensor, p: Problem, t: _Targets, state: Tensor) -> None:
    """From E = sum over v != y of e^(z-m) W_v to d logprob / dx, in place."""
    m, _, s, _, z = state
    factor = torch.sigmoid((m - z) + s.log()) * (p.logit_scale / p.temperature)
    unit.mul_(torch.where(s > 0, -factor / s, 0.0).unsqueeze(-1))
    if p.softcap is not None:
        factor = factor * (1 - (z * p.temperature / p.softcap) ** 2)
    for block in _blocks(p, t):
        rows_of_head = p.weight[t.y[block]].to(unit.dtype)
        unit[block].addcmul_(rows_of_head, factor[block].unsqueeze(-1))


def _spread(x: Tensor | None, p: Problem, t: _Targets) -> Tensor:
    """Per-target values `[m, ...]` back to all M, zero where a target is skipped; empty for None."""
    if x is None:
        return t.x.new_empty(0, dtype=_wide(p))
    if t.kept is None:
        return x
    return x.new_zeros(len(p.targets), *x.shape[1:]).index_copy_(0, t.kept, x)


def _pick(x: Tensor, p: Problem, t: _Targets) -> Tensor:
    x = x if t.kept is None else x[t.kept]
    return x.to(_wide(p)).contiguous()
