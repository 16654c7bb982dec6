"""The exact divergence of two policies over the whole vocabulary.

With p and q what two heads say at the same places,

    KL(p || q) = sum over v of p_v (log p_v - log q_v)

The logits of a few rows at a time are in memory; the backward pass makes them again.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from posttrain.models.head import Head

_BYTES = 32 << 20  # of the logits of one head


def kl_divergence(head_p: Head, hidden_p: Tensor, head_q: Head, hidden_q: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) at M places, exact.

    Args:
        head_p: the policy's language head.
        hidden_p: `[M, H]`, what it is given.
        head_q: the head of another policy with the same vocabulary.
        hidden_q: `[M, H']`, what that is given.
        temperature: divides the logits of both.

    Returns:
        float32 `[M]`, differentiable with respect to all of it.

    Raises:
        ValueError: numbers of places or vocabularies that differ.
    """
    if len(hidden_p) != len(hidden_q) or len(head_p.weight) != len(head_q.weight):
        raise ValueError(
            f"kl_divergence: {len(hidden_p)} places and {len(head_p.weight)} tokens of p, "
            f"but {len(hidden_q)} and {len(head_q.weight)} of q"
        )

    def of(p: Tensor, q: Tensor) -> Tensor:
        log_p, log_q = (
            (head.logits(hidden).float() / temperature).log_softmax(-1) for head, hidden in ((head_p, p), (head_q, q))
        )
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    rows = max(1, _BYTES // (4 * len(head_p.weight)))
    bounds = pairwise([*range(0, len(hidden_p), rows), len(hidden_p)])
    parts = [
        checkpoint(of, hidden_p[a:b], hidden_q[a:b], use_reentrant=False, preserve_rng_state=False) for a, b in bounds
    ]
    return torch.cat([hidden_p.new_zeros(0, dtype=torch.float32), *parts])
