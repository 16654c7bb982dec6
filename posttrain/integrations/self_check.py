"""What our ops give on the first real batch against what they stand in for.

Looked at are layers (layer_check.py) and the language head: log-probabilities and entropies of the first 8 targets and
the gradient of their hidden states, by our op, by the original, and in a wider dtype, which is the truth. The head's
is computed a slab of the vocabulary at a time.

Ours may be as far from the truth as `torch.testing.assert_close` allows in float32, or

    2 max|original - truth| + 2 max|(truth + 0.3 - 0.3) - truth|        with the second rounded to the dtype

A check lasts for a caller, a shape and a dtype.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.integrations.counting import count
from posttrain.models.head import Head

_ROWS, _SLAB = 8, 4096

_heads: set[tuple[Any, ...]] = set()


class Compared(NamedTuple):
    """One result by our ops, by the original, and in a wider dtype."""

    what: str
    ours: Tensor
    original: Tensor
    truth: Tensor


def forget_heads() -> None:
    """Check language heads anew."""
    _heads.clear()


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Autocast's dtype, or that of the tensor."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def check_head(
    caller: str,
    found: Head,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    ours: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    original: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Compare (log p, entropy) of a few hidden states `[N, H]` and targets `[N]`, once for a caller and such a head.

    Raises `ValueError` for a mismatch, with both distances from the truth.
    """
    rank = None if found.lora is None else len(found.lora[0])
    cap = (found.softcap, found.logit_scale)
    key = (caller, hidden.device, hidden.dtype, tuple(found.weight.shape), found.bias is None, rank, *cap)
    if torch.compiler.is_compiling() or key in _heads or not targets.numel():
        return
    valid = (targets != -100).nonzero()[:_ROWS, 0]
    if not len(valid):
        return
    names = ("log-probabilities", "entropies", "gradients of hidden states")
    with torch.inference_mode(False):
        rows, wanted = hidden[valid].detach().clone(), targets[valid].clone()
        by_us, by_them = (_head_results(function, rows, wanted) for function in (ours, original))
        truth = _head_truth(found, rows, wanted, temperature)
    judge("the language head", map(Compared, names, by_us, by_them, truth), hidden.dtype)
    count("self-check of the language head passed")
    _heads.add(key)


def _head_results(function: Callable[..., tuple[Tensor, Tensor]], rows: Tensor, targets: Tensor) -> list[Tensor]:
    leaf = rows.clone().requires_grad_()
    with torch.enable_grad():
        logprob, entropy = function(leaf, targets)
    return [logprob.detach(), entropy.detach(), *torch.autograd.grad(logprob.sum(), leaf)]


def _head_truth(found: Head, rows: Tensor, targets: Tensor, temperature: float) -> list[Tensor]:
    wide = wider(rows.dtype)
    x = rows.to(wide)
    with torch.autocast(rows.device.type, enabled=False):
        z = torch.cat([x @ slab.to(wide).T for slab in found.weight.split(_SLAB)], -1)  # [N, V]
        lora = None if found.lora is None else (found.lora[0].to(wide), found.lora[1].to(wide), found.lora[2])
        if lora is not None:
            z += lora[2] * (x @ lora[0].T) @ lora[1].T
        z.requires_grad_()
        with torch.enable_grad():
            logits = (z if found.bias is None else z + found.bias.to(wide)) * found.logit_scale
            logits = logits if found.softcap is None else found.softcap * torch.tanh(logits / found.softcap)
            log_p = (logits / temperature).log_softmax(-1)
            logprob = log_p.gather(-1, targets[:, None])[:, 0]
        (dz,) = torch.autograd.grad(logprob.sum(), z)
        slabs = zip(dz.split(_SLAB, -1), found.weight.split(_SLAB), strict=True)
        dx = torch.stack([part @ slab.to(wide) for part, slab in slabs]).sum(0)
        if lora is not None:
            dx += lora[2] * (dz @ lora[1]) @ lora[0]
    log_p = log_p.detach()
    return [logprob.detach(), -(log_p.exp() * log_p).sum(-1), dx]


def wider(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, else float64."""
    return torch.float32 if dtype.itemsize < 4 else torch.float64


def judge(where: str, results: Iterable[Compared], dtype: torch.dtype, part: str = "") -> None:
    """Raises `ValueError` for the first of the results that is off, with both distances from the truth."""
    for result in results:
        problem = _mismatch(result, dtype)
        if problem is not None:
            count(f"self-check of {where} failed")
            raise ValueError(
                f"posttrain's self-check of {where} in {dtype} failed on the first batch: {part}{problem}; nothing was "
                "computed with it. posttrain.disable() gives every model its own modules back; please report this"
            )


def _mismatch(result: Compared, dtype: torch.dtype) -> str | None:
    """How far ours is off, if it is farther than allowed."""
    ours, original, truth = (x.double() for x in result[1:])
    error = (ours - truth).abs()
    if dtype.itemsize >= 4 and bool((error <= 1e-5 + 1.3e-6 * truth.abs()).all()):
        return None
    rounded = truth.to(dtype)
    allowed = 2 * (original - truth).abs().max() + 2 * (rounded + 0.3 - 0.3 - rounded).double().abs().max()
    if bool(error.max() <= allowed):  # not where it is NaN
        return None
    return f"{result.what} are up to {error.max().item():.3g} from the truth, and {allowed.item():.3g} are allowed"
