"""The only tolerances of the tests.

Truth is the reference in float64. float32 and float64 results agree with it to `torch.testing.assert_close`'s
defaults. A bfloat16 or float16 result may be twice as far from the float32 reference as PyTorch in the same dtype is,
plus the rounding of the dtype. Over many seeds, errors must not lean to one side.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def assert_true_to(ours: Tensor, truth: Tensor) -> None:
    """`ours`, float32 or float64, equals `truth`, computed in float64."""
    assert truth.dtype == torch.float64 and ours.dtype not in HALF
    torch.testing.assert_close(ours, truth.to(ours.dtype))


def assert_as_good_as(ours: Tensor, peer: Tensor, reference: Tensor) -> None:
    """`ours`, in half precision, is about as near to the float32 `reference` as `peer`, PyTorch in the same dtype."""
    assert ours.dtype in HALF and peer.dtype == ours.dtype and reference.dtype == torch.float32
    assert ours.shape == reference.shape
    rounded = reference.to(ours.dtype)
    allowed = 2 * _distance(peer, reference) + 2 * _distance(rounded + 0.3 - 0.3, rounded)
    assert _distance(ours, reference) <= allowed


def assert_unbiased(
    ours: Callable[[int], Tensor], peer: Callable[[int], Tensor], truth: Callable[[int], Tensor], seeds: int = 64
) -> None:
    """The mean signed error over seeds is within 3 standard errors of 0, or no larger than that of `peer`.

    Each function takes a seed and gives one result; `truth` gives it in float64.
    """
    errors = torch.stack([_mean_error(ours(seed), truth(seed)) for seed in range(seeds)])
    peers = torch.stack([_mean_error(peer(seed), truth(seed)) for seed in range(seeds)])
    bound = max(3 * errors.std().item() / seeds**0.5, abs(peers.mean().item()))
    assert abs(errors.mean().item()) <= bound, f"mean signed error {errors.mean().item():.3g}, allowed {bound:.3g}"


def gradients(
    function: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs and gradients of `function(*inputs)`, for output gradients that are the same numbers in every dtype."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves)
    outputs = (result,) if isinstance(result, Tensor) else tuple(result)
    generator = torch.Generator().manual_seed(len(outputs))
    incoming = [torch.randint(-32, 33, y.shape, generator=generator).to(y.device, y.dtype) / 16 for y in outputs]
    return tuple(y.detach() for y in outputs), torch.autograd.grad(outputs, leaves, incoming)


def check(
    op: Callable[..., Tensor | Sequence[Tensor]],
    reference: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor],
    peer: Callable[..., Tensor | Sequence[Tensor]] | None = None,
) -> None:
    """Outputs and gradients of `op` are true to `reference`; for half precision, `peer` is plain PyTorch's way."""
    ours = [x for part in gradients(op, inputs) for x in part]
    wide = torch.float32 if inputs[0].dtype in HALF else torch.float64
    truths = [x for part in gradients(reference, [x.to(wide) for x in inputs]) for x in part]
    if wide == torch.float64:
        for result, truth in zip(ours, truths, strict=True):
            assert_true_to(result, truth)
        return
    assert peer is not None
    peers = [x for part in gradients(peer, inputs) for x in part]
    for result, theirs, truth in zip(ours, peers, truths, strict=True):
        if result.dtype in HALF:
            assert_as_good_as(result, theirs, truth)
        else:
            assert_true_to(result, truth.double())


def _distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def _mean_error(result: Tensor, truth: Tensor) -> Tensor:
    return (result.double() - truth.double()).mean()
