"""nf4_linear for a few rows, against dequantising and multiplying, and against bitsandbytes where it is installed.

bitsandbytes on a CPU with AVX-512 and its bfloat16 computes in bfloat16 whatever x is, and reorders the weights for it
beforehand, as its `Linear4bit` does at the first inference.
"""

from copy import copy

import pytest
import torch
from elementwise import DEVICE, DTYPE, copies, randn
from torch.nn import functional

from posttrain import ops
from posttrain.bench.interleave import interleave
from posttrain.ops import NF4Weight

HEIGHT, WIDTH = (14336 if DEVICE == "cuda" else 4096), 4096  # on a GPU larger than its caches
TARGET = 2.0  # for at most 8 rows
BANDWIDTH = 0.8  # of a copy's, on a GPU


def _weight() -> NF4Weight:
    return ops.quantize_nf4(0.02 * randn(HEIGHT, WIDTH))


def _bitsandbytes(weight: NF4Weight):
    """(dequantise, multiply) of bitsandbytes, or None."""
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        return None
    state = bnb.QuantState(
        weight.absmax,
        torch.Size(weight.shape),
        bnb.get_4bit_type("nf4", device=DEVICE),
        weight.blocksize,
        "nf4",
        weight.dtype,
    )
    packed, packed_state = weight.packed, state
    if DEVICE == "cpu" and bnb.has_avx512bf16():
        packed, packed_state = bnb._convert_weight_packed_for_cpu(weight.packed.clone(), copy(state))
    return (
        lambda: bnb.dequantize_4bit(weight.packed, state),
        lambda x: bnb.gemv_4bit(x, packed, state=packed_state),
    )


@pytest.mark.parametrize("dtype", sorted({DTYPE, torch.bfloat16}, key=str), ids=str)
@pytest.mark.parametrize("rows", [1, 4, 8, 16])
def test_nf4_linear(rows, dtype, publish) -> None:
    weight, x = _weight(), randn(rows, WIDTH).to(dtype)
    functions = {
        "dequantise, multiply": lambda: functional.linear(x, ops.nf4_dequantize(weight, dtype)),
        "posttrain": lambda: ops.nf4_linear(x, weight),
    }
    peers = _bitsandbytes(weight)
    if peers is not None:
        functions["bitsandbytes"] = lambda: peers[1](x)
        truth = ops.nf4_linear(x, weight)
        assert (peers[1](x) - truth).abs().max() < 0.02 * truth.abs().max()
    comparison = interleave(functions, baseline="dequantise, multiply", rounds=21)
    name = f"nf4_linear-{rows}" if dtype == DTYPE else f"nf4_linear-{rows}-bfloat16"
    publish(name, f"nf4_linear [{rows}, {WIDTH}] x [{HEIGHT}, {WIDTH}] {dtype}", comparison, target=TARGET)
    assert rows > 8 or comparison.speedup["posttrain"].median >= TARGET


def test_nf4_dequantize(publish) -> None:
    weight, dense = _weight(), randn(HEIGHT, WIDTH)
    out = torch.empty_like(dense)
    moved = weight.packed.nbytes + weight.absmax.nbytes + dense.nbytes
    functions = {
        "copying the result": lambda: out.copy_(dense),
        "copying as many bytes": copies(moved / dense.nbytes, dense),
        "posttrain": lambda: ops.nf4_dequantize(weight),
    }
    peers = _bitsandbytes(weight)
    if peers is not None:
        functions["bitsandbytes"] = peers[0]
    comparison = interleave(functions, baseline="copying the result", rounds=21)
    seconds = {name: comparison.seconds[name].median for name in ("copying as many bytes", "posttrain")}
    rates = {f"GB/s, {name}": moved / time / 1e9 for name, time in seconds.items()}
    publish("nf4_dequantize", f"nf4_dequantize [{HEIGHT}, {WIDTH}] {DTYPE}", comparison, **rates)
    assert DEVICE == "cpu" or seconds["copying as many bytes"] / seconds["posttrain"] >= BANDWIDTH
