"""The LoRA ops on a GPU (posttrain/ops/lora_products.py has the formulas).

The kernels are in lora_device.py; here are the method, the choice of tiles, and the launches.

The products with A and B are one kernel, which also scales them, leaves out what dropout takes, and sets to 0 what
belongs to other adapters than the row's: u = c x̃ A^T and v = c dy B. Their gradients are another, dA = v^T x̃ and
dB^T = u^T dy, over splits of the rows that are then added in order. Both sum in float32. Where x and the adapters have
one half precision u and v are rounded to it; float32 adapters over a half precision x keep theirs in float32, in three
products of TF32, which hold x exactly.

The large products, x W^T + u B^T and dy W + v A, either have their depth extended by R inside one kernel, or are the
library's: the product of rank R first, then the large one adding to it. FUSED says which.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from posttrain.kernels import lora_device as kernels
from posttrain.kernels.entry import Entry, entry
from posttrain.kernels.tiles import Blocks
from posttrain.ops import nf4
from posttrain.ops.backend import cuda_device
from posttrain.ops.block_sizes import capability_of, chosen, newest
from posttrain.ops.lora_layer import Layer, Options, flat_b
from posttrain.ops.lora_products import Bundle, Wanted

# Compute capability -> whether the large products of half precision are the kernel's. Triton's GEMM by pointers is
# about as fast as the library where both use mma; from sm_90 on the library has TMA and warp specialisation.
FUSED = {80: True, 86: True, 90: False, 100: False, 120: True}

# Compute capability -> tiles for half precision.
BLOCKS = {
    80: Blocks(128, 128, 64, 8, 3),
    86: Blocks(128, 128, 32, 8, 3),
    90: Blocks(128, 256, 64, 8, 3),
    100: Blocks(128, 128, 64, 8, 3),
    120: Blocks(128, 128, 32, 8, 3),
}
SMALL_BLOCKS = Blocks(32, 32, 32, 4, 1)  # for the interpreter and, where a test fuses it, float32
SPLIT_ROWS, PROGRAMS = 512, 512  # of the gradients of A and B: at least, of a split; about, in all


def adapter_gradient(
    grads: Sequence[Tensor], x: Tensor, layers: Sequence[Layer], options: Options, bundle: Bundle, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """(v `[T, ranks]`, dA `[ranks, K]`, the dB^T `[ranks, N]` of its layers)."""
    u = low_rank(x, layers, options, bundle) if any(wanted.lora_b) else None
    v = bundle.lora_a.new_empty(len(x), len(bundle.lora_a)) if wanted.v else None
    grad_bs: list[Tensor | None] = []
    for i, columns, needed in zip(bundle.layers, bundle.columns, wanted.lora_b, strict=True):
        if v is not None:
            lora_b = flat_b(layers[i], v.dtype)
            _low_rank(grads[i], lora_b.T, [layers[i]], options, None, v[:, columns])
        grad_bs.append(_outer(u[:, columns], grads[i], None) if u is not None and needed else None)
    grad_a = _outer(v, x, bundle.dropped) if v is not None and wanted.lora_a else None
    return v, grad_a, grad_bs


def low_rank(x: Tensor, layers: Sequence[Layer], options: Options, bundle: Bundle) -> Tensor:
    """u `[T, ranks]` of the layers of a bundle, in the dtype of its A."""
    u = bundle.lora_a.new_empty(len(x), len(bundle.lora_a))
    _low_rank(x, bundle.lora_a, [layers[i] for i in bundle.layers], options, bundle.dropped, u)
    return u


def output(x: Tensor, layer: Layer, low: Tensor) -> Tensor:
    """x W^T + b + u B^T `[T, N]`, in one kernel."""
    y = x.new_empty(len(x), layer.height)
    lora_b = flat_b(layer, x.dtype)
    for rows, slab in _dense(layer, x.dtype):
        bias = None if layer.bias is None else layer.bias[rows]
        _extended(x, slab, low, lora_b[rows], bias, y[:, rows], False)
    return y


def input_gradient(
    grads: Sequence[Tensor], x: Tensor, layers: Sequence[Layer], low: Tensor | None, lora_a: Tensor | None
) -> Tensor:
    """Sum of dy W over the layers, and v A, `[T, K]`; each layer is one kernel that adds to those before."""
    grad_x = x.new_empty(x.shape)
    add = False
    for grad, layer in zip(grads, layers, strict=True):
        for rows, slab in _dense(layer, x.dtype):
            factor = None if lora_a is None or add else lora_a.T
            _extended(grad[:, rows], slab.T, None if add else low, factor, None, grad_x, add)
            add = True
    return grad_x if add else grad_x.zero_()


def fused(x: Tensor) -> bool:
    """Whether the large products with x are those of the kernel."""
    if not x.is_cuda:
        return True
    return x.dtype != torch.float32 and len(x) > nf4.MATVEC_ROWS and newest(FUSED, capability_of(x.device))


def _low_rank(
    x: Tensor, factor: Tensor, layers: Sequence[Layer], options: Options, dropped: Tensor | None, out: Tensor
) -> None:
    """out = c x̃ factor^T, for factor `[ranks, K]`."""
    if out.numel() == 0:
        return
    x = _readable(x)
    ranks, block = len(factor), _rank_block(len(factor), factor.dtype)
    keys = tuple((tuple(s / (1 - options.dropout) for s in layer.scaling), layer.rank) for layer in layers)
    scale, owner = _columns(keys, x.device)
    adapter = None if options.adapter is None else options.adapter.contiguous()
    with cuda_device(x):
        kernels.low_rank_kernel[triton.cdiv(ranks, block), triton.cdiv(len(x), kernels.LOW_RANK["BLOCK_T"])](
            x, _bytes(dropped), factor, scale, owner, adapter, out,
            *x.shape, ranks, x.stride(0), *factor.stride(), out.stride(0),
            BLOCK_R=block, BLOCK_K=_depth(factor.dtype), HALF=_mixed(x, factor), **kernels.LOW_RANK,
        )  # fmt: skip


def _outer(low: Tensor, x: Tensor, dropped: Tensor | None) -> Tensor:
    """low^T x̃ `[ranks, K]`, float32, without the factor 1 / (1 - p), which low has."""
    x = _readable(x)
    (rows, width), ranks = x.shape, low.shape[1]
    block = _rank_block(ranks, low.dtype)
    tiles = triton.cdiv(width, kernels.OUTER["BLOCK_K"]), triton.cdiv(ranks, block)
    splits = max(1, min(triton.cdiv(rows, SPLIT_ROWS), PROGRAMS // max(1, tiles[0] * tiles[1])))
    total = x.new_empty(splits, ranks, width, dtype=torch.float32)
    if total.numel():
        with cuda_device(x):
            kernels.outer_kernel[*tiles, splits](
                low, x, _bytes(dropped), total, *x.shape, ranks, low.stride(0), x.stride(0),
                triton.cdiv(triton.cdiv(rows, splits), kernels.OUTER["BLOCK_T"]) * kernels.OUTER["BLOCK_T"],
                BLOCK_R=block, HALF=_mixed(x, low), **kernels.OUTER,
            )  # fmt: skip
    return total[0] if splits == 1 else total.sum(0)


def _extended(
    x: Tensor,
    weight: Tensor,
    low: Tensor | None,
    factor: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    add: bool,
) -> None:
    """out = x weight^T + low factor^T + bias, for weight `[N, K]` and factor `[N, ranks]`; added to out if `add`."""
    if out.numel() == 0:
        return
    x, low = _readable(x), None if low is None else _readable(low.to(x.dtype))
    factor = None if factor is None else factor.to(x.dtype)
    with cuda_device(x):
        b = _blocks(x)
        grid = (triton.cdiv(len(x), b.rows) * triton.cdiv(len(weight), b.columns),)
        kernels.extended_kernel[grid](**_arguments(x, weight, low, factor, bias, out, add, b))


def _arguments(
    x: Tensor,
    weight: Tensor,
    low: Tensor | None,
    factor: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    add: bool,
    b: Blocks,
) -> dict[str, Any]:
    ranks = 0 if low is None else low.shape[1]
    return {
        "x_ptr": x,
        "weight_ptr": weight,
        "low_ptr": low,
        "factor_ptr": factor,
        "bias_ptr": None if bias is None else bias.contiguous(),
        "out_ptr": out,
        "M": len(x),
        "N": len(weight),
        "K": x.shape[1],
        "R": ranks,
        "x_stride": x.stride(0),
        "weight_stride": weight.stride(0),
        "weight_depth": weight.stride(1),
        "low_stride": 0 if low is None else low.stride(0),
        "factor_stride": 0 if factor is None else factor.stride(0),
        "factor_depth": 0 if factor is None else factor.stride(1),
        "out_stride": out.stride(0),
        "ADD": add,
        "EVEN": x.shape[1] % b.depth == 0 and len(weight) % b.columns == 0,
        "BLOCK_M": b.rows,
        "BLOCK_N": b.columns,
        "BLOCK_K": b.depth,
        "BLOCK_R": _rank_block(ranks, torch.float32),
        "num_warps": b.warps,
        "num_stages": b.stages,
    }


def _dense(layer: Layer, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """W in runs of its rows: in one, or as many as it is dequantised in."""
    if layer.nf4 is None:
        return iter([(slice(None), layer.weight)])
    return nf4.slabs(layer.nf4, dtype, "triton")


def _rank_block(ranks: int, dtype: torch.dtype) -> int:
    return max(16, min(32 if dtype == torch.float32 else 64, triton.next_power_of_2(ranks)))


def _depth(dtype: torch.dtype) -> int:
    """Step along K of the products with a factor of this dtype."""
    return 64 if dtype == torch.float32 else 128


def _mixed(x: Tensor, other: Tensor) -> bool:
    """Whether x is in half precision and `other` in float32."""
    return x.dtype != other.dtype


@lru_cache(maxsize=256)
def _columns(layers: tuple[tuple[tuple[float, ...], int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(factor, adapter) of each column of u, for the factors and the ranks E R of layers."""
    scale = [s for factors, rank in layers for s in factors for _ in range(rank // len(factors))]
    owner = [e for factors, rank in layers for e in range(len(factors)) for _ in range(rank // len(factors))]
    return torch.tensor(scale, device=device).float(), torch.tensor(owner, device=device).long()


def _blocks(x: Tensor) -> Blocks:
    """Tile sizes: they depend on the device and the dtype, never on the number of rows."""
    if not x.is_cuda or x.dtype == torch.float32:
        return SMALL_BLOCKS
    return chosen("lora_linear", newest(BLOCKS, capability_of(x.device)), x.device)


def _readable(x: Tensor) -> Tensor:
    """`x` with its rows contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()


def _bytes(dropped: Tensor | None) -> Tensor | None:
    return None if dropped is None else dropped.view(torch.uint8)


def ahead_of_time() -> Iterator[Entry]:
    """The kernels with their production block sizes, for tests/kernels/aot.py."""
    half = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    ragged, single = half[:4080, :4080], half.float()
    for capability in (80, 89, 90, 100, 120):
        yield _extended_entry("dx", half, half.T, 64, newest(BLOCKS, capability), capability)
    yield _extended_entry("y", half, half, 16, BLOCKS[90], 90)
    yield _extended_entry("ragged dx", ragged, ragged.T, 16, BLOCKS[90], 90)
    yield _extended_entry("float32", single, single, 16, SMALL_BLOCKS, 120)
    mixed, same, wide = (half, torch.float32), (half, torch.bfloat16), (single, torch.float32)
    for capability, (x, dtype) in ((80, wide), (80, mixed), (90, mixed), (120, mixed), (90, same)):
        yield from _rank_entries(x, torch.empty(4096, 64, dtype=dtype, device="meta"), capability)


def _extended_entry(name: str, x: Tensor, weight: Tensor, rank: int, b: Blocks, capability: int) -> Entry:
    bias = None if "dx" in name else x[0]
    arguments = _arguments(x, weight, x[:, :rank], weight[:, :rank], bias, x, bias is None, b)
    return entry(kernels.extended_kernel, name, arguments, capability=capability)


def _rank_entries(x: Tensor, low: Tensor, capability: int) -> Iterator[Entry]:
    """With dropout and several adapters."""
    index = torch.empty(16, dtype=torch.int64, device="meta")
    arguments: dict[str, Any] = {"x_ptr": x, "dropped_ptr": x.to(torch.uint8), "owner_ptr": index, "adapter_ptr": index}
    arguments |= {"factor_ptr": low, "low_ptr": low, "scale_ptr": low.float(), "T": 1, "split_rows": SPLIT_ROWS}
    arguments |= {"BLOCK_R": _rank_block(64, low.dtype), "BLOCK_K": _depth(low.dtype), "HALF": _mixed(x, low)}
    arguments |= dict.fromkeys(("K", "R", "x_stride", "low_stride", "factor_stride", "out_stride"), 64)
    arguments |= {"factor_depth": 1}
    low_rank_arguments = arguments | kernels.LOW_RANK | {"out_ptr": low}
    outer_arguments = arguments | kernels.OUTER | {"out_ptr": low.float()}
    for kernel, given in ((kernels.low_rank_kernel, low_rank_arguments), (kernels.outer_kernel, outer_arguments)):
        yield entry(kernel, f"{x.dtype} {low.dtype}", given, capability=capability)
