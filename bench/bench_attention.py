"""packed_attention against PyTorch: dense, many documents, and a prompt that completions share.

fp32 on the CPU, bfloat16 on a GPU. Every comparison is of the forward alone and of forward and backward, and is made
once outputs and gradients are right. FlexAttention has no backward on a CPU; it is compiled before it is timed. On a
GPU torch's varlen_attn and cuDNN join. A peer that fails or gives something else is left out and named with its error.
"""

import inspect
from collections.abc import Callable

import pytest
import torch
from elementwise import DEVICE, randn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from posttrain.bench.interleave import interleave
from posttrain.ops import packed_attention
from posttrain.ops.layout import PackedLayout

HEADS, KEY_HEADS, WIDTH = 8, 2, 64
ROUNDS = 9
Inputs = tuple[Tensor, ...]
Function = Callable[..., Tensor]


def inputs(tokens: int, heads: int = HEADS, key_heads: int = KEY_HEADS, width: int = WIDTH) -> Inputs:
    """q, k and v with gradients."""
    return tuple(randn(tokens, h, width).requires_grad_() for h in (heads, key_heads, key_heads))


def results(function: Function, tensors: Inputs, incoming: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, incoming.to(out.dtype))]


def assert_right(function: Function, peer: Function, tensors: Inputs) -> None:
    """`function` gives what `peer` gives in float64; in half precision with at most twice the errors of `peer`."""
    incoming = torch.randn_like(tensors[0])
    truth = results(peer, tuple(x.double() for x in tensors), incoming)
    ours = results(function, tensors, incoming)
    if ours[0].dtype == torch.float32:
        return torch.testing.assert_close(ours, [x.float() for x in truth])
    for mine, other, true in zip(ours, results(peer, tensors, incoming), truth, strict=True):
        rounding = ((true.to(mine.dtype) + 0.3 - 0.3).double() - true).abs().max()
        assert (mine - true).abs().max() <= 2 * (other - true).abs().max() + 2 * rounding


def passes(function: Function, tensors: Inputs) -> dict[str, Callable[[], object]]:
    """The forward without a gradient and, if the tensors have gradients, forward and backward."""

    def forward() -> None:
        with torch.no_grad():
            function(*tensors)

    if not tensors[0].requires_grad:
        return {"forward": forward}
    incoming = torch.randn_like(function(*tensors).detach())
    return {
        "forward": forward,
        "forward+backward": lambda: torch.autograd.grad(function(*tensors), tensors, incoming),
    }


def compare(
    publish: Callable[..., None],
    name: str,
    title: str,
    functions: dict[str, tuple[Function, Inputs]],
    baseline: str,
    target: float | None,
    **facts: object,
) -> None:
    """Publishes both kinds of pass and holds them to the target."""
    made = {key: passes(*value) for key, value in functions.items()}
    for kind in ("forward", "forward+backward"):
        timed = {key: value[kind] for key, value in made.items() if kind in value}
        without = {key: "has no backward here" for key in made.keys() - timed.keys()}
        result = interleave(timed, baseline, rounds=ROUNDS)
        publish(f"attention-{name}-{kind}", f"{title}, {kind}", result, target=target, **facts, **without)
        if target is not None and DEVICE == "cpu":
            assert result.speedup["posttrain"].median >= target


def ours(layout: PackedLayout) -> Function:
    return lambda q, k, v: packed_attention(q, k, v, layout)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of `[batch, L, heads, width]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def each_alone(lengths: list[int]) -> Function:
    """A loop of one call for each document."""

    def call(*tensors: Tensor) -> Tensor:
        parts = zip(*(x.split(lengths) for x in tensors), strict=True)
        return torch.cat([sdpa(*(x[None] for x in part))[0] for part in parts])

    return call


def padded(tensors: Inputs, lengths: list[int]) -> tuple[Function, Inputs]:
    """One call on a padded batch. Padding on the right needs no mask: causal queries don't see it."""
    return sdpa, tuple(pad_sequence(x.detach().split(lengths), batch_first=True).requires_grad_() for x in tensors)


_flex = torch.compile(flex_attention, dynamic=False)


def flex(tensors: Inputs, layout: PackedLayout) -> tuple[Function, Inputs]:
    """FlexAttention with the layout's mask, compiled; on a CPU with its fastest block size of 64, 128 and 256."""
    until = layout.visible_until

    def seen(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < until[k])

    size = layout.num_tokens
    mask = create_block_mask(seen, None, None, size, size, device=DEVICE, BLOCK_SIZE=64 if DEVICE == "cpu" else 128)

    def call(*tensors: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in tensors)
        return _flex(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return call, tuple(x.detach().requires_grad_(DEVICE == "cuda") for x in tensors)


def prefix_grouper(prompt: int, group: int, length: int) -> Function:
    """prefix-grouper over SDPA: one call for the prompt, one for the completions over copies of its keys and values."""
    from prefix_grouper import PrefixGrouper

    grouper = PrefixGrouper([[prompt] + [length] * group], device=DEVICE)
    late = torch.ones(length, prompt + length, dtype=torch.bool).tril(prompt)
    mask = late if DEVICE == "cpu" else causal_lower_right(length, prompt + length)

    def attend(q: Tensor, k: Tensor, v: Tensor, _padding: Tensor) -> Tensor:
        own = {"is_causal": True} if q.shape[2] == k.shape[2] else {"attn_mask": mask}
        return scaled_dot_product_attention(q, k, v, enable_gqa=True, **own).transpose(1, 2)

    return lambda *tensors: grouper.forward(attend, *(x.transpose(0, 1)[None] for x in tensors))[0]


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`sdpa` by cuDNN."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v)


def varlen(lengths: list[int]) -> Function:
    """torch's own packed attention."""
    from torch.nn.attention.varlen import varlen_attn

    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attn(q, k, v, bounds, bounds, max(lengths), max(lengths), window_size=(-1, 0), **grouped)

    return call


Peers = dict[str, tuple[Function, Inputs]]


def working(makers: dict[str, Callable[[], tuple[Function, Inputs]]], layout: PackedLayout) -> tuple[Peers, dict]:
    """The peers that can be made and give our output, on packed tensors, and the errors of the others."""
    peers, failing = {}, {}
    for name, make in makers.items():
        try:
            function, own = make()
            with torch.no_grad():
                out = function(*own)
                if own[0].ndim == 3:
                    close = {} if DEVICE == "cpu" else {"atol": 2e-2, "rtol": 0}
                    torch.testing.assert_close(out, ours(layout)(*own), **close)
            if own[0].requires_grad:
                torch.autograd.grad(function(*own), own, torch.zeros_like(out))
            peers[name] = (function, own)
        except Exception as error:  # whatever a peer does, the others are measured
            failing[name] = f"fails: {type(error).__name__} {' '.join(str(error).split())[:200]}"
    return peers, failing


def gpu_peers(tensors: Inputs, lengths: list[int]) -> dict[str, Callable[[], tuple[Function, Inputs]]]:
    """The peers that only a GPU has."""
    if DEVICE == "cpu":
        return {}
    return {
        "varlen_attn": lambda: (varlen(lengths), tensors),
        "cuDNN, padded": lambda: (cudnn, padded(tensors, lengths)[1]),
    }


def lengths_between(low: int, high: int, count: int) -> list[int]:
    return torch.randint(low, high + 1, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def test_dense(publish) -> None:
    tensors, layout = inputs(2048), PackedLayout.from_lengths([2048], DEVICE)
    assert_right(ours(layout), each_alone([2048]), tensors)
    functions = {
        "SDPA": (lambda *x: sdpa(*(t[None] for t in x))[0], tensors),
        "posttrain": (ours(layout), tensors),
    }
    makers = {"FlexAttention": lambda: flex(tensors, layout), **gpu_peers(tensors, [2048])}
    peers, failing = working(makers, layout)
    compare(publish, "dense", "dense causal 2048", functions | peers, "SDPA", target=1.0, **failing)


@pytest.mark.skipif(DEVICE == "cpu", reason="shapes and targets of an H100")
@pytest.mark.parametrize(
    ("name", "lengths", "parents"),
    [
        ("16k", [16384], [-1]),
        ("2k", [2048] * 40, [-1] * 40),
        ("40", [40] * 2000, [-1] * 2000),
        ("shared-16R", [4096] + [256] * 8, [-1] + [0] * 8),
        ("unshared-16R", [4352] * 8, [-1] * 8),
    ],
)
def test_rate(name, lengths, parents, report) -> None:
    """TFLOP/s of the pairs that are seen, heads of 128, and tokens/s: what the targets of a GPU are made of."""
    heads, width = 32, 128
    layout = PackedLayout.from_forest(lengths, parents, DEVICE)
    tensors = inputs(layout.num_tokens, heads, heads // 4, width)
    pairs = float((layout.positions.double() + 1).sum())
    facts = {}
    for kind, function in passes(ours(layout), tensors).items():
        seconds = interleave({kind: function}, kind, rounds=ROUNDS).seconds[kind].median
        products = 2 if kind == "forward" else 7  # the backward makes the scores again: five products of its own
        facts[f"{kind} TFLOP/s"] = products * 2 * pairs * heads * width / seconds / 1e12
        facts[f"{kind} tokens/s"] = layout.num_tokens / seconds
    report(f"attention-rate-{name}", [f"attention, {name}", *(f"  {k}: {v:.4g}" for k, v in facts.items())], **facts)


@pytest.mark.parametrize(
    ("name", "lengths", "shape", "target"),
    [
        ("documents", lengths_between(16, 1024, 32), (HEADS, KEY_HEADS, WIDTH), 2.0),
        ("short", lengths_between(20, 250, 24), (4, 2, 32), None),
    ],
)
def test_documents(name, lengths, shape, target, publish) -> None:
    tensors, layout = inputs(sum(lengths), *shape), PackedLayout.from_lengths(lengths, DEVICE)
    assert_right(ours(layout), each_alone(lengths), tensors)
    functions = {
        "SDPA, padded": padded(tensors, lengths),
        "SDPA, one by one": (each_alone(lengths), tensors),
        "posttrain": (ours(layout), tensors),
    }
    makers = {"FlexAttention": lambda: flex(tensors, layout), **gpu_peers(tensors, lengths)}
    peers, failing = working(makers, layout)
    title = f"{len(lengths)} documents of {min(lengths)} to {max(lengths)}"
    compare(publish, name, title, functions | peers, "SDPA, padded", target, tokens=sum(lengths), **failing)


def test_shared_prompt(publish) -> None:
    prompt, group, length = 1024, 8, 64
    layout = PackedLayout.from_forest([prompt] + [length] * group, [-1] + [0] * group, DEVICE)
    copies = [prompt + length] * group
    tensors, copied = inputs(layout.num_tokens), inputs(sum(copies))
    assert_right(ours(layout), unshared(prompt, group, length), tensors)
    functions = {
        "posttrain, unshared": (ours(PackedLayout.from_lengths(copies, DEVICE)), copied),
        "SDPA, unshared": (each_alone(copies), copied),
        "posttrain": (ours(layout), tensors),
    }
    makers = {
        "FlexAttention, shared": lambda: flex(tensors, layout),
        "prefix-grouper over SDPA": lambda: (prefix_grouper(prompt, group, length), tensors),
    }
    peers, failing = working(makers, layout)
    pairs = prompt**2 / 2 + group * (prompt * length + length**2 / 2)
    theory = group * (prompt + length) ** 2 / 2 / pairs
    title = f"{group} completions of {length} share a prompt of {prompt}"
    compare(publish, "shared", title, functions | peers, "posttrain, unshared", target=4.0, theory=theory, **failing)


def unshared(prompt: int, group: int, length: int) -> Function:
    """Each completion with its own copy of the prompt, and of the results each token's once."""
    starts = range(prompt, prompt + group * length, length)
    places = torch.tensor([[*range(prompt), *range(start, start + length)] for start in starts], device=DEVICE)

    def call(*tensors: Tensor) -> Tensor:
        out = sdpa(*(x[places] for x in tensors))
        return torch.cat([out[0, :prompt], out[:, prompt:].flatten(0, 1)])

    return call
