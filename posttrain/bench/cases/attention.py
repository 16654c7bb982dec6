"""packed_attention: one long sequence, many documents, and completions that share a prompt.

Operations are those of the pairs that are seen, 4 D for each pair and head (two products) in the forward and 10 D more
(five products) in the backward. Plain PyTorch is SDPA: a call for each sequence, and for a shared prompt one for all
completions, each with its own copy of the prompt.
"""

from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from posttrain import ops
from posttrain.bench import attention_peers as peers
from posttrain.bench.attention_peers import sdpa
from posttrain.bench.case import BOTH, FORWARD, Case, Function, Problem, Work, randn
from posttrain.bench.device import DEVICE, DTYPE, GPU, WIDER
from posttrain.bench.peers import Makers, compiled
from posttrain.bench.shapes import Suite
from posttrain.ops.layout import PackedLayout

PEERS: Makers = {
    "SDPA padded": peers.padded,
    "SDPA cuDNN": peers.cudnn,
    "FlexAttention": peers.flex,
    "torch varlen_attn": peers.torch_varlen,
    "flash-attn 2": peers.flash2,
    "flash-attn 3": peers.flash3,
    "flash-attn 4": peers.flash4,
}


def packed_attention(suite: Suite) -> list[Case]:
    """Over the heads of the models; a group of 8 completions shares a prompt of half of the tokens."""
    tokens, cases = suite.tokens, {}
    draw = torch.Generator().manual_seed(1)
    spread = torch.randint(tokens // 64, tokens // 8, (64,), generator=draw)
    count = int((spread.cumsum(0) < tokens).sum())
    forests = {
        "causal": ([tokens], [-1]),
        f"{count} documents": (spread[:count].tolist(), [-1] * count),
        "8 completions of a prompt": ([tokens // 2] + [tokens // 16] * 8, [-1] + [0] * 8),
    }
    named: Makers = {"torch.compile": compiled, **PEERS}
    for model in suite.models:
        for kind, (lengths, parents) in forests.items():
            title = f"{kind}, {sum(lengths)} tokens, {model.heads}/{model.key_heads} heads of {model.width}"
            size = 8.0 * sum(lengths) * model.heads * model.width * 3 * DTYPE.itemsize
            copies, longest = (8, lengths[0] + lengths[1]) if parents[-1] == 0 else (1, max(lengths))
            scores = 4.0 * GPU * copies * longest**2 * (model.heads // model.key_heads) * WIDER.itemsize  # of the truth
            cases[title] = Case(
                "packed_attention",
                title,
                6 * size + scores,
                partial(problem, (model.heads, model.key_heads), model.width, lengths, parents),
                work((model.heads, model.key_heads), model.width, lengths, parents),
                {**named, "prefix-grouper": peers.prefix_grouper} if parents[-1] == 0 else named,
            )
    return list(cases.values())


def work(heads: tuple[int, int], width: int, lengths: list[int], parents: list[int]) -> dict[str, Work]:
    """That of a forest, of which the arguments are those of `problem`."""
    before: list[int] = []  # tokens of each segment's ancestors
    for parent in parents:
        before.append(before[parent] + lengths[parent] if parent >= 0 else 0)
    pairs = sum(n * seen + n * (n + 1) / 2 for n, seen in zip(lengths, before, strict=True))
    product = 2 * pairs * heads[0] * width
    size = 2.0 * sum(lengths) * sum(heads) * width * DTYPE.itemsize  # of q, k, v and the output
    return {FORWARD: Work(2 * product, size), BOTH: Work(7 * product, 3 * size)}


def problem(heads: tuple[int, int], width: int, lengths: list[int], parents: list[int], grad: bool = True) -> Problem:
    """A forest of sequences, or, if the last has a parent, of a prompt and its completions of one length.

    Args:
        heads: Hq and Hkv.
        width: D, of a head.
        lengths, parents: as in `PackedLayout.from_forest`.
        grad: whether there is a backward.
    """
    layout = PackedLayout.from_forest(lengths, parents, DEVICE)
    tensors = tuple(randn(layout.num_tokens, h, width, grad=grad) for h in (*heads, heads[1]))
    plain = _unshared(lengths) if parents[-1] == 0 else _each(lengths)
    context = SimpleNamespace(layout=layout, lengths=lengths, shared=parents[-1] == 0)
    return Problem(tensors, lambda q, k, v: ops.packed_attention(q, k, v, layout), plain, context)


def _each(lengths: list[int]) -> Function:
    """A call of SDPA for each sequence."""
    bounds = list(pairwise(torch.tensor([0, *lengths]).cumsum(0).tolist()))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([_plain(*(x[None, a:b] for x in (q, k, v)))[0] for a, b in bounds])

    return call


def _unshared(lengths: list[int]) -> Function:
    """Each completion with its own copy of the prompt, and of the results each token's once."""
    prompt, length = lengths[:2]
    starts = range(prompt, sum(lengths), length)
    places = torch.tensor([[*range(prompt), *range(start, start + length)] for start in starts], device=DEVICE)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = _plain(*(x[places] for x in (q, k, v)))
        return torch.cat([out[0, :prompt], out[:, prompt:].flatten(0, 1)])

    return call


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA; in the wider dtype of a GPU, for which SDPA keeps all scores, one key head after the other."""
    if not GPU or q.dtype != WIDER:
        return sdpa(q, k, v)
    group = q.shape[2] // k.shape[2]
    parts = zip(q.split(group, 2), k.split(1, 2), v.split(1, 2), strict=True)
    return torch.cat([checkpoint(sdpa, *part, use_reentrant=False) for part in parts], 2)
