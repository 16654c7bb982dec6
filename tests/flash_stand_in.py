"""flash_attn.flash_attn_interface's functions for variable lengths in plain PyTorch, for tests without flash-attn.

Signatures, shapes and refusals are those of flash-attn 2.7 and 2.8 with their CUDA extension; every dtype and device is
taken.
"""

from itertools import pairwise

import torch
from torch import Tensor


def _flash_attn_varlen_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
    block_table=None,
    leftpad_k=None,
    seqused_k=None,
):
    """(out, lse `[Hq, total]`, empty, random state); a query without keys has out 0 and lse +inf."""
    assert not dropout_p and alibi_slopes is block_table is leftpad_k is seqused_k is None and not return_softmax
    _refuse(q, k, v, cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q > 1, "asks for the path for decoding, where every sequence must have one query"
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    lse = torch.full((q.shape[1], len(q)), torch.nan, dtype=torch.promote_types(q.dtype, torch.float32))
    for queries, keys in _sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        window = (window_size_left, 0 if causal else window_size_right)
        scores = _scores(q[queries], k[keys], softmax_scale, window, softcap)[0]
        own = scores.logsumexp(-1)
        lse[:, queries] = own.masked_fill(own == -torch.inf, torch.inf)
        p = (scores - lse[:, queries, None]).exp()
        out[queries] = torch.einsum("hqk,khd->qhd", p, _repeated(v[keys], q)).to(q.dtype)
    return out, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)


def _flash_attn_varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
):
    """Writes dq, dk and dv, from the probabilities and row sums that `softmax_lse` and `out` imply."""
    assert not dropout_p and alibi_slopes is None and deterministic
    _refuse(q, k, v, cu_seqlens_q, cu_seqlens_k)
    assert out.dtype == dout.dtype == q.dtype and out.shape == dout.shape == q.shape
    for grad, x in ((dq, q), (dk, k), (dv, v)):
        assert grad.shape == x.shape and grad.stride(-1) == 1
        grad.fill_(torch.nan)
    delta = (dout.to(softmax_lse.dtype) * out).sum(-1).T  # [Hq, total]
    for queries, keys in _sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        window = (window_size_left, 0 if causal else window_size_right)
        scores, slope = _scores(q[queries], k[keys], softmax_scale, window, softcap)
        p = (scores - softmax_lse[:, queries, None]).exp()
        grad_out = dout[queries].to(p.dtype)
        grad_p = torch.einsum("qhd,khd->hqk", grad_out, _repeated(v[keys], q))
        grad_scores = p * (grad_p - delta[:, queries, None]) * slope * softmax_scale
        dq[queries] = torch.einsum("hqk,khd->qhd", grad_scores, _repeated(k[keys], q)).to(q.dtype)
        dk[keys] = _summed(torch.einsum("hqk,qhd->khd", grad_scores, q[queries].to(p.dtype)), k)
        dv[keys] = _summed(torch.einsum("hqk,qhd->khd", p, grad_out), v)
    return delta


def _refuse(q: Tensor, k: Tensor, v: Tensor, *bounds: Tensor) -> None:
    for bound in bounds:
        assert bound.dtype == torch.int32 and bound.is_contiguous() and bound.shape == bounds[0].shape
        assert len(bound) > 1, "batch size must be positive"
    assert k.shape == v.shape and q.shape[1] % k.shape[1] == 0
    assert q.shape[2] == k.shape[2] <= 256 and q.shape[2] % 8 == 0


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int):
    """Slices of queries and keys; what lies beyond the longest length that was told is not computed."""
    for (q, q_end), (k, k_end) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        assert 0 <= q_end - q <= max_seqlen_q and 0 <= k_end - k <= max_seqlen_k
        yield slice(q, q_end), slice(k, k_end)


def _scores(q: Tensor, k: Tensor, scale: float, window: tuple[int, int], softcap: float) -> tuple[Tensor, Tensor]:
    """Scores `[Hq, queries, keys]`, -inf where not seen, and the slope of the cap."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), _repeated(k, q)) * scale
    slope = torch.ones_like(scores)
    if softcap > 0:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped**2
    aligned = torch.arange(len(q))[:, None] + len(k) - len(q)  # the last query beside the last key
    distance = aligned - torch.arange(len(k))
    left, right = window
    hidden = (distance > left) & (left >= 0) | (-distance > right) & (right >= 0)
    return scores.masked_fill(hidden, -torch.inf), slope


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).repeat_interleave(q.shape[1] // x.shape[1], 1)


def _summed(grad: Tensor, x: Tensor) -> Tensor:
    return grad.unflatten(1, (x.shape[1], -1)).sum(2).to(x.dtype)
