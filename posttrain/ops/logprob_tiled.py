"""The forward of linear_logprob by tiles: a library GEMM makes a tile of logits, C++ folds it while it is in cache.

Vocabulary outside, rows inside, one tile of at most ROWS x COLUMNS logits at a time:

    statistics     per row, over the tokens v other than the target y: the largest logit, s = sum e^(z-m) and
                   t = sum (z-m) e^(z-m) for a reference m near the maximum
    unit           with E = sum over v != y of e^(z-m) W_v accumulated by a second GEMM per tile and q = 1 - p_y,
                   d logprob / dx = q (W_y - E / s): a frozen head's backward is one multiplication

The backward is in logprob_tiled_gradient.py, dtypes are explained in logprob_tiles.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.ops.logprob_problem import IGNORED, Problem
from posttrain.ops.logprob_tiles import Slab, Tiles, add_product, address


def forward(p: Problem, save: str, backend: str) -> tuple[Tensor, ...]:
    """(logprob, entropy, lse, lse_low, is_top1, saved); `saved` is the unit `[M, H]`, the logits `[M, V]` or empty.

    `backend` is "cpu" or "cuda": whose kernels fold the tiles.
    """
    tiles = Tiles(p, backend, p.targets != IGNORED)
    size = len(tiles.y)
    state = tiles.x.new_zeros(5, size, dtype=p.wide)  # m, largest other logit, s, t, the target's logit
    state[:2] = -torch.inf
    unit = torch.empty_like(tiles.x, dtype=p.wide) if save == "unit" else None
    logits = tiles.x.new_empty(size, len(p.weight), dtype=p.wide) if save == "logits" else None
    for slab in tiles.slabs():
        for block in tiles.blocks():
            tile = tiles.room(block, slab) if logits is None else logits[block, slab.columns]
            tiles.fill(tile, block, slab)
            _fold(tiles, tile, block, slab, state[:, block], None if unit is None else unit[block])
            if unit is not None:
                beta = 0 if slab.columns.start == 0 else 1
                add_product(unit[block], tiles.as_factor(tile), slab.weight, beta)
    if unit is not None:
        _finish_unit(tiles, unit, state)
    return (*_finish(tiles, state), tiles.spread(unit if logits is None else logits))


def _fold(tiles: Tiles, tile: Tensor, block: slice, slab: Slab, state: Tensor, unit: Tensor | None) -> None:
    """Take a tile's raw logits into the statistics and, with a unit, leave e^(z-m) in their place."""
    m, top, s, t, z_target = state
    tiles.kernel("logprob_fold")(
        tile.data_ptr(),
        tile.stride(0),
        *tile.shape,
        slab.columns.start,
        tiles.y[block].data_ptr(),
        address(slab.bias),
        *tiles.transform(),
        m.data_ptr(),
        top.data_ptr(),
        s.data_ptr(),
        t.data_ptr() if tiles.p.need_entropy else 0,
        z_target.data_ptr(),
        address(unit),
        tiles.p.hidden.shape[-1],
    )


def _finish(tiles: Tiles, state: Tensor) -> tuple[Tensor, ...]:
    """Add the target to the statistics of the others, in float64 (posttrain/ops/logprob.py has the formulas)."""
    m, top, s, weighted, z = state.double()
    gap = (m - z) + s.log()
    logprob = -F.softplus(gap)
    lse = z - logprob
    rounded = lse.to(state.dtype)
    entropy = state.new_empty(0)
    if tiles.p.need_entropy:
        q = torch.sigmoid(gap)
        others = torch.where(s > 0, s.log() - weighted / s, 0.0)
        entropy = -torch.xlogy(q, q) - logprob.exp() * logprob + q * others
        entropy = tiles.spread(entropy.to(state.dtype))
    logprob, low = logprob.to(state.dtype), (lse - rounded).to(state.dtype)
    logprob, lse, low, is_top1 = map(tiles.spread, (logprob, rounded, low, z >= top))
    return logprob, entropy, lse, low, is_top1


def _finish_unit(tiles: Tiles, unit: Tensor, state: Tensor) -> None:
    """From E = sum over v != y of e^(z-m) W_v to d logprob / dx, in place."""
    p = tiles.p
    m, _, s, _, z = state
    factor = torch.sigmoid((m - z) + s.log()) * (p.logit_scale / p.temperature)
    unit.mul_(torch.where(s > 0, -factor / s, 0.0).unsqueeze(-1))
    if p.softcap is not None:
        factor = factor * (1 - (z * p.temperature / p.softcap) ** 2)
    for block in tiles.blocks():
        rows_of_head = p.weight[tiles.y[block]].to(unit.dtype)
        unit[block].addcmul_(rows_of_head, factor[block].unsqueeze(-1))
