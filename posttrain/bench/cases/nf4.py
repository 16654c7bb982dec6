"""nf4_dequantize and nf4_linear over the matrices of an MLP: 4 bits and a float32 for 64 weights."""

from functools import partial

from torch import Tensor
from torch.nn import functional

from posttrain import ops
from posttrain.bench import lora_peers as peers
from posttrain.bench.case import BOTH, FORWARD, Case, Problem, Work, randn
from posttrain.bench.device import DTYPE, WIDER
from posttrain.bench.shapes import Suite
from posttrain.ops import NF4Weight, reference


def nf4_dequantize(suite: Suite) -> list[Case]:
    """The whole matrix."""
    return [
        Case("nf4_dequantize", f"[{n}, {k}]", _need(n, k), partial(_dequantize, n, k), (FORWARD,), _peers(False))
        for n, k in _matrices(suite)
    ]


def nf4_linear(suite: Suite) -> list[Case]:
    """A few rows, as in generation, and a batch of training."""
    cases = []
    for n, k in _matrices(suite):
        for rows in (1, 8, suite.tokens):
            passes = (FORWARD, BOTH) if rows == suite.tokens else (FORWARD,)
            need = _need(n, k) + 8.0 * rows * (n + k) * WIDER.itemsize
            title, sizes = f"[{rows}, {k}] x [{n}, {k}]", (rows, n, k)
            cases.append(Case("nf4_linear", title, need, partial(_linear, *sizes), passes, _peers(True)))
    return cases


def _matrices(suite: Suite) -> list[tuple[int, int]]:
    return list(dict.fromkeys((model.inner, model.hidden) for model in suite.models))


def _need(n: int, k: int) -> float:
    return n * k * (1.0 + 2 * DTYPE.itemsize + 2 * WIDER.itemsize)


def _peers(product: bool) -> peers.Makers:
    return {"bitsandbytes": peers.bitsandbytes_linear if product else peers.bitsandbytes_dequantize}


def _weight(n: int, k: int) -> NF4Weight:
    return ops.quantize_nf4(randn(n, k, scale=k**-0.5))


def _dequantize(n: int, k: int) -> Problem:
    weight = _weight(n, k)
    moved = weight.packed.nbytes + weight.absmax.nbytes + n * k * DTYPE.itemsize

    def plain(weight: NF4Weight) -> Tensor:
        return reference.nf4_dequantize(weight, DTYPE)

    def truth() -> list[Tensor]:
        return [reference.nf4_dequantize(weight, WIDER)]

    return Problem((weight,), ops.nf4_dequantize, plain, {FORWARD: Work(0, moved)}, truth=truth)


def _linear(rows: int, n: int, k: int) -> Problem:
    weight, x = _weight(n, k), randn(rows, k, grad=True)
    product = 2.0 * rows * n * k
    moved = weight.packed.nbytes + weight.absmax.nbytes + rows * (n + k) * DTYPE.itemsize
    work = {FORWARD: Work(product, moved), BOTH: Work(2 * product, 2 * moved)}
    if rows <= 16:
        del work[BOTH]
        x = x.detach()
    return Problem((x, weight), ops.nf4_linear, _plain, work)


def _plain(x: Tensor, weight: NF4Weight) -> Tensor:
    """The matrix in full, then the product."""
    return functional.linear(x, reference.nf4_dequantize(weight, x.dtype))
