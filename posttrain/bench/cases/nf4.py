"""nf4_dequantize and nf4_linear over the matrices of an MLP: 4 bits and a float32 for 64 weights."""

from functools import partial

from torch import Tensor
from torch.nn import functional

from posttrain import ops
from posttrain.bench import lora_peers as peers
from posttrain.bench.case import BOTH, FORWARD, Case, Problem, Work, randn
from posttrain.bench.device import DTYPE, WIDER
from posttrain.bench.peers import Makers
from posttrain.bench.shapes import Suite
from posttrain.ops import NF4Weight, reference


def nf4_dequantize(suite: Suite) -> list[Case]:
    """The whole matrix."""
    cases = []
    for n, k in _matrices(suite):
        work = {FORWARD: Work(0, _bytes(n, k) + n * k * DTYPE.itemsize)}
        make = partial(_dequantize, n, k)
        cases.append(Case("nf4_dequantize", f"[{n}, {k}]", _need(n, k), make, work, _peers(False)))
    return cases


def nf4_linear(suite: Suite) -> list[Case]:
    """A few rows, as in generation, and a batch of training."""
    cases = []
    for n, k in _matrices(suite):
        for rows in (1, 8, suite.tokens):
            product, moved = 2.0 * rows * n * k, _bytes(n, k) + rows * (n + k) * DTYPE.itemsize
            work = {FORWARD: Work(product, moved)}
            work |= {BOTH: Work(2 * product, 2 * moved)} if rows == suite.tokens else {}
            need = _need(n, k) + 8.0 * rows * (n + k) * WIDER.itemsize
            title, sizes = f"[{rows}, {k}] x [{n}, {k}]", (rows, n, k)
            make = partial(_linear, *sizes, grad=BOTH in work)
            cases.append(Case("nf4_linear", title, need, make, work, _peers(True)))
    return cases


def _matrices(suite: Suite) -> list[tuple[int, int]]:
    return list(dict.fromkeys((model.inner, model.hidden) for model in suite.models))


def _need(n: int, k: int) -> float:
    """The reference has up to three integers of 64 bits for each weight, besides the numbers."""
    return n * k * (24.0 + 2 * DTYPE.itemsize + 2 * WIDER.itemsize)


def _bytes(n: int, k: int) -> float:
    """Of a matrix in 4 bits."""
    return n * k * (0.5 + 4 / 64)


def _peers(product: bool) -> Makers:
    if product:
        return {"torch.compile": peers.compiled_nf4_linear, "bitsandbytes": peers.bitsandbytes_linear}
    return {"torch.compile": peers.compiled_dequantize, "bitsandbytes": peers.bitsandbytes_dequantize}


def _weight(n: int, k: int) -> NF4Weight:
    return ops.quantize_nf4(randn(n, k, scale=k**-0.5))


def _dequantize(n: int, k: int) -> Problem:
    weight = _weight(n, k)

    def plain(weight: NF4Weight) -> Tensor:
        return reference.nf4_dequantize(weight, DTYPE)

    def truth() -> list[Tensor]:
        return [reference.nf4_dequantize(weight, WIDER)]

    return Problem((weight,), ops.nf4_dequantize, plain, truth=truth)


def _linear(rows: int, n: int, k: int, grad: bool = False) -> Problem:
    return Problem((randn(rows, k, grad=grad), _weight(n, k)), ops.nf4_linear, _plain)


def _plain(x: Tensor, weight: NF4Weight) -> Tensor:
    """The matrix in full, then the product."""
    return functional.linear(x, reference.nf4_dequantize(weight, x.dtype))
