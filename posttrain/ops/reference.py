"""Every op as plain PyTorch: the definition that the kernels are held to.

Written to be read, not to be fast. All functions take any floating dtype, are differentiable by autograd, and compute
in the precision of their inputs, but at least float32.
"""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`posttrain.ops.rms_norm`."""
    total = x if residual is None else x + residual
    wide = _wide(total)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = (wide * scale * weight.to(wide.dtype)).to(x.dtype)
    return y if residual is None else (y, total)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`posttrain.ops.linear_logprob`: (logprob, entropy, lse, is_top1), each `[M]`, through the whole `[M, V]` logits."""
    x = _wide(hidden if rows is None else hidden[rows])
    logits = x @ weight.to(x.dtype).T
    if lora is not None:
        lora_a, lora_b, scaling = lora
        logits = logits + scaling * (x @ lora_a.to(x.dtype).T) @ lora_b.to(x.dtype).T
    if bias is not None:
        logits = logits + bias.to(x.dtype)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    valid = targets != -100
    y = torch.where(valid, targets, 0).unsqueeze(-1)
    lse = logits.logsumexp(-1)
    log_p = logits.log_softmax(-1)
    entropy = -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1)
    is_top1 = logits.gather(-1, y).squeeze(-1) >= logits.amax(-1)
    logprob = log_p.gather(-1, y).squeeze(-1)
    return torch.where(valid, logprob, 0), torch.where(valid, entropy, 0), torch.where(valid, lse, 0), is_top1 & valid
