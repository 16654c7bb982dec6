"""swiglu and geglu, forward and backward, against plain PyTorch and torch.compile of it.

liger-kernel has both, but only for GPUs; it joins the table where one is.
"""

import pytest
import torch
from elementwise import compare, compiled, randn
from torch.nn import functional

from posttrain import ops

ROWS, WIDTH = 4096, 1024
TARGET = 2.0
PLAIN = {
    "swiglu": lambda gate, up: functional.silu(gate) * up,
    "geglu": lambda gate, up: functional.gelu(gate, approximate="tanh") * up,
}


def _liger(name: str):
    """liger-kernel's op, where it is installed and runs."""
    if not torch.cuda.is_available():
        return {}
    try:
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return {}
    return {"liger": {"swiglu": LigerSiLUMulFunction, "geglu": LigerGELUMulFunction}[name].apply}


@pytest.mark.parametrize("name", PLAIN)
def test_glu(name, publish) -> None:
    plain = PLAIN[name]
    functions = {
        "plain PyTorch": plain,
        "torch.compile": compiled(plain),
        **_liger(name),
        "posttrain": getattr(ops, name),
    }
    comparison = compare(functions, [randn(ROWS, WIDTH), randn(ROWS, WIDTH)], passes=8)
    publish(name, f"{name} [{ROWS}, {WIDTH}]", comparison, target=TARGET)
    assert comparison.speedup["posttrain"].median >= TARGET
