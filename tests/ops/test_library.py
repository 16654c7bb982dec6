"""An op's two doors, the direct call and the registered operator, lead to the same implementation."""

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain import ops
from posttrain.ops.rms_norm import _rms_norm


class _Names(TorchDispatchMode):
    """Records the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def _operands() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=generator, requires_grad=True) for s in ((6, 20), (20,)))


def test_both_doors_give_the_same_bits_and_gradients() -> None:
    x, weight = _operands()
    direct = ops.rms_norm(x, weight)
    registered, _, _ = torch.ops.posttrain.rms_norm(x, weight, 1e-6, None, "cpu")
    assert torch.equal(direct, registered)
    grads = [torch.autograd.grad(y.square().sum(), (x, weight)) for y in (direct, registered)]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_an_eager_call_takes_the_direct_door() -> None:
    x, weight = _operands()
    assert type(ops.rms_norm(x, weight).grad_fn).__name__ == "rms_normBackward"
    assert _rms_norm(x, weight, 1e-6, None, "cpu")[0].grad_fn is not None


def test_no_graph_is_kept_without_a_gradient() -> None:
    x, weight = _operands()
    with torch.no_grad():
        assert ops.rms_norm(x, weight).grad_fn is None
    assert ops.rms_norm(x.detach(), weight.detach()).grad_fn is None


def test_dispatch_modes_see_the_registered_operator_forward_and_backward() -> None:
    x, weight = _operands()
    with _Names() as seen:
        ops.rms_norm(x, weight).sum().backward()
    assert "posttrain::rms_norm" in seen.names
    assert "posttrain::rms_norm_backward" in seen.names


def test_meta_tensors_get_shapes_without_computing() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y, total = ops.rms_norm(torch.ones(6, 20), torch.ones(20), 1e-6, torch.ones(6, 20))
        q, k = ops.rope(torch.ones(1, 4, 6, 8), torch.ones(1, 2, 6, 8), torch.ones(1, 6, 8), torch.ones(1, 6, 8))
        assert [t.shape for t in (y, total, q, k)] == [(6, 20), (6, 20), (1, 4, 6, 8), (1, 2, 6, 8)]
        assert ops.swiglu(torch.ones(3, 5), torch.ones(3, 5)).shape == (3, 5)


def test_tensors_without_memory_of_their_own_are_refused() -> None:
    x, weight = _operands()
    two = TwoTensor(weight.detach(), weight.detach())
    for arguments in ((x, two), (two[None], weight)):
        with pytest.raises(ValueError, match=r"rms_norm: got a TwoTensor \[.*ops take plain tensors"):
            ops.rms_norm(*arguments, 1e-6)
