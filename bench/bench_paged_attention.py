"""Decoding with paged attention, against SDPA on caches that are already contiguous and padded to the longest."""

import pytest
import torch
from elementwise import DEVICE
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from posttrain import ops
from posttrain.bench.interleave import interleave

PAGE = 16
CASES = {  # sequences, prompt, whether it is shared, own tokens, heads, key heads, width
    "own": (32, 0, False, 300, 8, 8, 32),
    "shared": (32, 256, True, 32, 8, 8, 32),
    "grouped": (32, 256, True, 32, 16, 4, 64),
    "one": (1, 0, False, 2048, 16, 4, 64),
}


def decode(sequences: int, prompt: int, own: int, heads: tuple[int, int], width: int) -> tuple[Tensor, ...]:
    """One step's arguments; the sequences' tables begin with the pages of the prompt."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    shared, each = prompt // PAGE, -(-own // PAGE)
    first = shared + torch.arange(sequences, dtype=torch.int32)[:, None] * each
    pages = torch.cat([torch.arange(shared).expand(sequences, -1), first + torch.arange(each)], 1).int()
    caches = [
        torch.randn(shared + sequences * each, PAGE, heads[1], width, device=DEVICE, dtype=dtype) for _ in range(2)
    ]
    q = torch.randn(sequences, heads[0], width, device=DEVICE, dtype=dtype)
    lens = torch.full((sequences,), prompt + own, dtype=torch.int32, device=DEVICE)
    return q, *caches, pages.to(DEVICE), lens


@pytest.mark.parametrize("name", CASES)
def test_decode(name, publish) -> None:
    sequences, prompt, share, own, heads, key_heads, width = CASES[name]
    q, k, v, table, lens = decode(sequences, prompt, own, (heads, key_heads), width)
    keys, values = (x[table.long()].flatten(1, 2)[:, : prompt + own].transpose(1, 2).contiguous() for x in (k, v))

    def sdpa() -> Tensor:
        return scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)[:, :, 0]

    def paged() -> Tensor:
        return ops.paged_attention(q, k, v, table, lens)

    with torch.inference_mode():
        torch.testing.assert_close(paged(), sdpa(), **({} if DEVICE == "cpu" else {"atol": 2e-2, "rtol": 0}))
        result = interleave({"SDPA, contiguous": sdpa, "posttrain": paged}, "SDPA, contiguous", rounds=25)
    sharing = f", {prompt} of them shared" if share else ""
    title = f"decode {sequences} x {prompt + own} keys{sharing}, {heads} heads over {key_heads} of {width}"
    publish(f"paged-attention-{name}", title, result)
