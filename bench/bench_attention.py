"""packed_attention: the part of the suite that `posttrain bench packed_attention` runs, and its rates on a GPU.

The rates are what the targets of an H100 are made of: TFLOP/s of the pairs that are seen, and tokens per second.
"""

import pytest
import torch

from posttrain.bench.case import randn
from posttrain.bench.device import DEVICE, GPU
from posttrain.bench.interleave import interleave
from posttrain.bench.suite import pytest_generate_tests, test_case
from posttrain.ops import packed_attention
from posttrain.ops.layout import PackedLayout

__all__ = ["pytest_generate_tests", "test_case"]
OPS = ("packed_attention",)
HEADS, KEY_HEADS, WIDTH = 32, 8, 128


@pytest.mark.skipif(not GPU, reason="shapes and targets of an H100")
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
    layout = PackedLayout.from_forest(lengths, parents, DEVICE)
    tensors = [randn(layout.num_tokens, heads, WIDTH, grad=True) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    incoming = torch.randn_like(tensors[0])

    def forward() -> None:
        with torch.no_grad():
            packed_attention(*tensors, layout)

    def both() -> None:
        torch.autograd.grad(packed_attention(*tensors, layout), tensors, incoming)

    pairs = float((layout.positions.double() + 1).sum())
    facts = {}
    for kind, function, products in (("forward", forward, 2), ("forward+backward", both, 7)):
        seconds = interleave({kind: function}, kind, rounds=9).seconds[kind].median
        facts[f"{kind} TFLOP/s"] = products * 2 * pairs * HEADS * WIDTH / seconds / 1e12
        facts[f"{kind} tokens/s"] = layout.num_tokens / seconds
    report(f"attention-rate-{name}", [f"attention, {name}", *(f"  {k}: {v:.4g}" for k, v in facts.items())], **facts)
