"""nf4_linear for a few rows, against dequantising and multiplying, and against bitsandbytes where it is installed.

bitsandbytes on a CPU computes in bfloat16 whatever x is, where the machine has AVX-512 with bfloat16.
"""

import pytest
import torch
from elementwise import DEVICE, DTYPE, copies, randn
from interleave import interleave
from torch.nn import functional

from posttrain import ops
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
    return (
        lambda: bnb.dequantize_4bit(weight.packed, state),
        lambda x: bnb.gemv_4bit(x, weight.packed, state=state),
    )


@pytest.mark.parametrize("rows", [1, 4, 8, 16])
def test_nf4_linear(rows, publish) -> None:
    weight, x = _weight(), randn(rows, WIDTH)
    functions = {
        "dequantise, multiply": lambda: functional.linear(x, ops.nf4_dequantize(weight)),
        "posttrain": lambda: ops.nf4_linear(x, weight),
    }
    peers = _bitsandbytes(weight)
    if peers is not None:
        functions["bitsandbytes"] = lambda: peers[1](x)
    comparison = interleave(functions, baseline="dequantise, multiply", rounds=21)
    publish(f"nf4_linear-{rows}", f"nf4_linear [{rows}, {WIDTH}] x [{HEIGHT}, {WIDTH}]", comparison, target=TARGET)
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
