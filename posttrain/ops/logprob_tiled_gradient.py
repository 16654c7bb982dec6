"""The backward of linear_logprob by tiles (posttrain/ops/logprob.py has the formulas).

A tile of logits, made again or cached by the forward, is turned into their gradient by C++; then come the two GEMMs of
a linear layer. A unit that the forward saved only has to be weighted and summed.
"""

import torch
from torch import Tensor

from posttrain.ops import logprob_tiles
from posttrain.ops.logprob_problem import Grads, Incoming, Needs, Problem, Results, has_gradient
from posttrain.ops.logprob_tiles import Slab, Tiles, add_product, address, product


def unit_backward(p: Problem, grad_logprob: Tensor, unit: Tensor) -> Tensor:
    """Gradient of hidden, from the unit that the forward saved."""
    if p.rows is None:
        return (unit * grad_logprob.to(unit.dtype).unsqueeze(-1)).to(p.hidden.dtype)
    grad = torch.zeros_like(p.hidden, dtype=unit.dtype)
    for start in range(0, len(p.targets), logprob_tiles.ROWS):
        block = slice(start, start + logprob_tiles.ROWS)
        _add_rows(grad, p.rows[block], unit[block] * grad_logprob[block].to(unit.dtype).unsqueeze(-1))
    return grad.to(p.hidden.dtype)


def backward(
    p: Problem, incoming: Incoming, results: Results, logits: Tensor | None, needs: Needs, backend: str
) -> Grads:
    """All gradients, from the logits `[M, V]` if the forward saved them, else recomputed by tiles.

    Targets without a gradient cost nothing.
    """
    active = has_gradient(p, incoming)
    if not bool(active.any()):
        return _zeros(p, needs)
    tiles = Tiles(p, backend, active)
    grads = _Gradients(tiles, needs)
    entropy = None if incoming.entropy is None else results.entropy
    per_target = (results.logprob, entropy, results.lse, results.lse_low, *incoming)
    picked = [None if x is None else tiles.pick(x) for x in per_target]
    for slab in tiles.slabs():
        grads.open(slab)
        for block in tiles.blocks():
            tile = source = tiles.room(block, slab)
            if logits is None:
                tiles.fill(tile, block, slab)
            else:
                source = logits[block if tiles.kept is None else tiles.kept[block], slab.columns]
            _make_gradient(tiles, source, tile, block, slab, picked)
            grads.add(tiles.as_factor(tile), block, slab)
        grads.close(slab)
    return grads.finish()


def _make_gradient(
    tiles: Tiles, source: Tensor, tile: Tensor, block: slice, slab: Slab, per_target: list[Tensor | None]
) -> None:
    """Gradient of the logits in `source`, finished z or in `tile` itself raw, into `tile`.

    `per_target` has logprob, entropy, lse, lse_low, and the incoming gradients of the first three.
    """
    on_cpu = tiles.backend == "cpu"  # the CUDA kernel has raw logits in `tile`
    tiles.kernel("logprob_grad")(
        *((source.data_ptr(), source.stride(0)) if on_cpu else ()),
        tile.data_ptr(),
        tile.stride(0),
        *tile.shape,
        slab.columns.start,
        tiles.y[block].data_ptr(),
        address(slab.bias),
        *tiles.transform(),
        *((source is not tile,) if on_cpu else ()),
        *(address(None if x is None else x[block]) for x in per_target),
    )


class _Gradients:
    """Gradients in the making: of x summed over the whole vocabulary, of the head slab by slab."""

    def __init__(self, tiles: Tiles, needs: Needs) -> None:
        self.tiles, self.needs = tiles, needs
        p = tiles.p
        self.x = torch.zeros_like(tiles.x, dtype=p.wide) if needs.hidden else None
        inner = tiles.lora_x if needs.hidden or needs.lora else None
        self.lora_x = None if inner is None else torch.zeros_like(inner, dtype=p.wide)
        self.weight = torch.empty_like(p.weight) if needs.weight else None
        self.bias = torch.empty_like(p.bias) if p.bias is not None and needs.bias else None
        self.lora_b = torch.empty_like(p.lora_b) if p.lora_b is not None and needs.lora else None

    def open(self, slab: Slab) -> None:
        """Start the head's sums for a slab: in place where the gradient is wide, else in a buffer rounded once."""
        wanted = [None if g is None else g[slab.columns] for g in (self.weight, self.bias, self.lora_b)]
        self.slab_sums = [None if g is None else g.to(self.tiles.p.wide) for g in wanted]
        for total in self.slab_sums:
            if total is not None and total.ndim == 1:
                total.zero_()

    def add(self, tile: Tensor, block: slice, slab: Slab) -> None:
        """Take in dlogits `[rows of block, columns of slab]`; the first block's products replace what was there."""
        weight, bias, lora_b = self.slab_sums
        beta = 0 if block.start == 0 else 1
        if self.x is not None:
            add_product(self.x[block], tile, slab.weight)
        if self.lora_x is not None and slab.lora_b is not None:
            add_product(self.lora_x[block], tile, slab.lora_b)
        if weight is not None:
            add_product(weight, tile.T, self.tiles.x[block], beta)
        if bias is not None:
            bias.add_(tile.sum(0, dtype=bias.dtype))
        if lora_b is not None and self.tiles.lora_x is not None:
            add_product(lora_b, tile.T, self.tiles.lora_x[block], beta)

    def close(self, slab: Slab) -> None:
        """Round the slab's sums into the gradients that are not wide."""
        for grad, total in zip((self.weight, self.bias, self.lora_b), self.slab_sums, strict=True):
            if grad is not None and total is not None and grad.dtype != total.dtype:
                grad[slab.columns].copy_(total)

    def finish(self) -> Grads:
        """Undo the gathering of rows, and lead the gradient of the LoRA's inner product to A and x."""
        tiles, p = self.tiles, self.tiles.p
        lora_a = None
        if self.lora_x is not None and p.lora_a is not None:
            self.lora_x *= p.lora_scaling
            if self.needs.lora:
                lora_a = product(self.lora_x.T, tiles.x).to(p.lora_a.dtype)
            if self.x is not None:
                add_product(self.x, self.lora_x, p.lora_a.to(tiles.x.dtype))
        hidden = self.x
        if hidden is not None and tiles.rows is not None:
            hidden = _add_rows(torch.zeros_like(p.hidden, dtype=hidden.dtype), tiles.rows, hidden)
        hidden = None if hidden is None else hidden.to(p.hidden.dtype)
        return Grads(hidden, self.weight, self.bias, lora_a, self.lora_b)


def _zeros(p: Problem, needs: Needs) -> Grads:
    """The gradients where no target has one."""
    needed = (needs.hidden, needs.weight, needs.bias, needs.lora, needs.lora)
    inputs = (p.hidden, p.weight, p.bias, p.lora_a, p.lora_b)
    zeros = [torch.zeros_like(x) if x is not None and n else None for x, n in zip(inputs, needed, strict=True)]
    return Grads(*zeros)


def _add_rows(total: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    """total[rows[i]] += x[i], in a fixed order: on CUDA index_put_ sorts, and index_add_ adds as it comes."""
    return total.index_put_((rows,), x, accumulate=True) if total.is_cuda else total.index_add_(0, rows, x)
