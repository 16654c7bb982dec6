"""The linear layers of the C++ step: right, and each row by itself."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_true_to

from posttrain import _C
from posttrain.rollout.row_by_row import RowByRow


def linear(x, weight, bias=None):
    """x W^T + bias by the C++ kernel, into NaN."""
    y = torch.full((len(x), len(weight)), torch.nan, dtype=x.dtype)
    address = 0 if bias is None else bias.data_ptr()
    _C.linear(x.itemsize, x.data_ptr(), len(x), x.shape[1], weight.data_ptr(), address, y.data_ptr(), len(weight))
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 7, 100, 300])
@pytest.mark.parametrize(("width", "height"), [(3, 5), (64, 97), (130, 200), (300, 16)])
def test_every_row_by_itself(dtype, rows, width, height):
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (
        torch.randn(s, generator=generator, dtype=dtype) for s in ((rows, width), (height, width), (height,))
    )
    weight /= width**0.5
    y = linear(x, weight, bias)
    assert_true_to(y, torch.nn.functional.linear(x.double(), weight.double(), bias.double()))
    assert_true_to(linear(x, weight), x.double() @ weight.double().T)
    for i in range(0, rows, 13):
        assert torch.equal(linear(x[i : i + 1].clone(), weight, bias)[0], y[i])
        assert torch.equal(linear(x[i : i + 9].clone(), weight, bias), y[i : i + 9])


def test_arguments_by_name():
    """Calls of a model's own modules may name them; what the kernel can't take is PyTorch's."""
    x, weight, bias = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5)
    named = {"weight": weight, "bias": bias}
    with torch.no_grad(), RowByRow():
        by_name = [F.linear(x, **named), F.linear(input=x, **named), F.linear(x, weight, bias=bias)]
        with pytest.raises(RuntimeError, match="dtype"):
            F.linear(input=x, weight=weight, bias=bias.double())
    assert all(torch.equal(y, linear(x, weight, bias)) for y in by_name)
