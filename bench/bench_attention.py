"""packed_attention against PyTorch: dense, many documents, and a prompt that completions share.

fp32 on the CPU, bfloat16 on a GPU. Every comparison is of the forward alone and of forward and backward.
"""

from collections.abc import Callable

import pytest
import torch
from elementwise import DEVICE, randn
from interleave import interleave
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from posttrain.ops import packed_attention
from posttrain.ops.layout import PackedLayout

HEADS, KEY_HEADS, WIDTH = 8, 2, 64
ROUNDS = 9
Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(tokens: int, heads: int = HEADS, key_heads: int = KEY_HEADS, width: int = WIDTH) -> Inputs:
    """q, k and v with gradients."""
    return tuple(randn(tokens, h, width).requires_grad_() for h in (heads, key_heads, key_heads))


def passes(function: Callable[..., Tensor], tensors: Inputs) -> dict[str, Callable[[], object]]:
    """The forward without a gradient, and forward and backward."""
    incoming = torch.randn_like(function(*tensors).detach())

    def forward() -> None:
        with torch.no_grad():
            function(*tensors)

    def both() -> None:
        torch.autograd.grad(function(*tensors), tensors, incoming)

    return {"forward": forward, "forward+backward": both}


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of `[batch, L, heads, width]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def each_alone(lengths: list[int]) -> Callable[..., Tensor]:
    """A loop of one call for each document."""

    def call(*tensors: Tensor) -> Tensor:
        parts = zip(*(x.split(lengths) for x in tensors), strict=True)
        return torch.cat([sdpa(*(x[None] for x in part))[0] for part in parts])

    return call


def padded(lengths: list[int]) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
    """One call on a padded batch, and what pads. Padding on the right needs no mask: causal queries don't see it."""
    return sdpa, lambda x: pad_sequence(x.detach().split(lengths), batch_first=True).requires_grad_()


def compare(publish, name: str, title: str, functions: dict, baseline: str, target: float | None, **facts) -> None:
    """`functions` maps names to (function, tensors); publishes both kinds of pass and holds them to the target."""
    made = {key: passes(*value) for key, value in functions.items()}
    for kind in ("forward", "forward+backward"):
        result = interleave({key: value[kind] for key, value in made.items()}, baseline, rounds=ROUNDS)
        publish(f"attention-{name}-{kind}", f"{title}, {kind}", result, target=target, **facts)
        if target is not None and DEVICE == "cpu":
            assert result.speedup["posttrain"].median >= target


def ours(layout: PackedLayout) -> Callable[..., Tensor]:
    return lambda q, k, v: packed_attention(q, k, v, layout)


def lengths_between(low: int, high: int, count: int) -> list[int]:
    return torch.randint(low, high + 1, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def test_dense(publish) -> None:
    tensors = inputs(2048)
    functions = {
        "SDPA": (lambda *x: sdpa(*(t[None] for t in x))[0], tensors),
        "posttrain": (ours(PackedLayout.from_lengths([2048], DEVICE)), tensors),
    }
    compare(publish, "dense", "dense causal 2048", functions, "SDPA", target=1.0)


@pytest.mark.parametrize(
    ("name", "lengths", "shape", "target"),
    [
        ("documents", lengths_between(16, 1024, 32), (HEADS, KEY_HEADS, WIDTH), 2.0),
        ("short", lengths_between(20, 250, 24), (4, 2, 32), None),
    ],
)
def test_documents(name, lengths, shape, target, publish) -> None:
    tensors = inputs(sum(lengths), *shape)
    function, pad = padded(lengths)
    functions = {
        "SDPA, padded": (function, tuple(map(pad, tensors))),
        "SDPA, one by one": (each_alone(lengths), tensors),
        "posttrain": (ours(PackedLayout.from_lengths(lengths, DEVICE)), tensors),
    }
    title = f"{len(lengths)} documents of {min(lengths)} to {max(lengths)}"
    compare(publish, name, title, functions, "SDPA, padded", target, tokens=sum(lengths))


def test_shared_prompt(publish) -> None:
    prompt, group, length = 1024, 8, 64
    shared = PackedLayout.from_forest([prompt] + [length] * group, [-1] + [0] * group, DEVICE)
    copies = [prompt + length] * group
    tensors, copied = inputs(shared.num_tokens), inputs(sum(copies))
    functions = {
        "posttrain, unshared": (ours(PackedLayout.from_lengths(copies, DEVICE)), copied),
        "SDPA, unshared": (each_alone(copies), copied),
        "posttrain": (ours(shared), tensors),
    }
    pairs = prompt**2 / 2 + group * (prompt * length + length**2 / 2)
    theory = group * (prompt + length) ** 2 / 2 / pairs
    title = f"{group} completions of {length} share a prompt of {prompt}"
    compare(publish, "shared", title, functions, "posttrain, unshared", target=4.0, theory=theory)
