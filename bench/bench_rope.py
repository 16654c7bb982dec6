"""rope, forward and backward, against transformers' apply_rotary_pos_emb and torch.compile of it."""

import torch
from elementwise import compare, compiled, randn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from posttrain import ops

HEADS, TOKENS, WIDTH = 16, 2048, 64
TARGET = 2.0


def test_rope(publish) -> None:
    q, k = (randn(1, TOKENS, HEADS, WIDTH).transpose(1, 2) for _ in range(2))
    angle = torch.randn(1, TOKENS, WIDTH // 2, device=q.device).repeat(1, 1, 2)
    cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)
    plain = compiled(apply_rotary_pos_emb)
    functions = {
        "plain PyTorch": lambda q, k: apply_rotary_pos_emb(q, k, cos, sin),
        "torch.compile": lambda q, k: plain(q, k, cos, sin),
        "posttrain": lambda q, k: ops.rope(q, k, cos, sin),
    }
    comparison = compare(functions, [q, k], passes=8 + 4 / HEADS)
    publish("rope", f"rope, 2 x {HEADS} heads, [{TOKENS}, {WIDTH}]", comparison, target=TARGET)
    assert comparison.speedup["posttrain"].median >= TARGET
