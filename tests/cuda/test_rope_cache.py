"""rope_cache with the CUDA kernel: queries rotated, keys rotated into their pages, values beside them."""

import pytest
import torch
from tolerance import HALF, assert_as_good_as, assert_true_to
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from posttrain import ops
from posttrain.ops import reference

pytestmark = pytest.mark.usefixtures("poison", "cuda")

SLOTS = [3, 23, 0, 9, 10, 31, 16]
# D and how much of it is rotated: by vectors, and one element at a time.
WIDTHS = [(64, 64), (128, 64), (10, 6), (96, 80)]


def step(
    device: str, dtype: torch.dtype, width: int, rotated: int, heads: tuple[int, int] = (6, 2)
) -> dict[str, Tensor]:
    """Queries in the layout of a model, `[1, Hq, T, D]` seen as `[T, Hq, D]`, and caches of NaN."""
    generator = torch.Generator().manual_seed(0)
    tokens = len(SLOTS)
    shapes = {"q": (heads[0], tokens, width), "k": (heads[1], tokens, width), "v": (heads[1], tokens, width)}
    x = {name: torch.randn(s, generator=generator).to(device, dtype).transpose(0, 1) for name, s in shapes.items()}
    angles = torch.randn(tokens, rotated // 2, generator=generator).repeat(1, 2)
    x |= {"cos": angles.cos().to(device, dtype), "sin": angles.sin().to(device, dtype)}
    for name in ("key_cache", "value_cache"):
        x[name] = torch.full((4, 8, heads[1], width), torch.nan, device=device, dtype=dtype)
    return x | {"slots": torch.tensor(SLOTS, device=device)}


def outcome(x: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(q, what is in the slots of keys and of values), after a look at the other slots."""
    q = ops.rope_cache(**x)
    caches = [x[name].flatten(0, 1) for name in ("key_cache", "value_cache")]
    others = [slot for slot in range(32) if slot not in SLOTS]
    assert all(cache[others].isnan().all() for cache in caches)
    return q.cpu(), *(cache[SLOTS].cpu() for cache in caches)


@pytest.mark.parametrize(("width", "rotated"), WIDTHS)
def test_agrees_with_the_reference(width, rotated, device) -> None:
    x = step(device, torch.float32, width, rotated)
    q, keys, values = outcome(x)
    wide = [x[name].cpu().double() for name in ("q", "k", "cos", "sin")]
    for ours, true in zip((q, keys), reference.rope(*wide, 1), strict=True):
        assert_true_to(ours, true)
    assert torch.equal(values, x["v"].cpu())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("wide_angles", [False, True])
def test_half_precision_is_as_good_as_transformers(wide_angles, dtype, device) -> None:
    x = step(device, dtype, 64, 64)
    if wide_angles:
        x |= {name: x[name].float() for name in ("cos", "sin")}
    q, keys, values = outcome(x)
    same = [x[name].cpu() for name in ("q", "k", "cos", "sin")]
    peers = apply_rotary_pos_emb(*(t.to(dtype) for t in same), unsqueeze_dim=1)
    truths = reference.rope(*(t.float() for t in same), 1)
    for ours, peer, true in zip((q, keys), peers, truths, strict=True):
        assert_as_good_as(ours, peer, true)
    assert torch.equal(values, x["v"].cpu())


def test_any_memory_order_and_a_token_alone(device) -> None:
    x = step(device, torch.float32, 64, 48)
    q, keys, values = outcome(x)
    other = step(device, torch.float32, 64, 48)
    other |= {name: torch.stack([x[name], x[name]], 3)[..., 0] for name in ("q", "k", "v")}
    other["cos"] = x["cos"].T.contiguous().T
    for moved, first in zip(outcome(other), (q, keys, values), strict=True):
        assert torch.equal(moved, first)
    alone = {name: t[2:3] if len(t) == len(SLOTS) else t.clone().fill_(torch.nan) for name, t in x.items()}
    assert torch.equal(ops.rope_cache(**alone).cpu(), q[2:3])
    assert torch.equal(alone["key_cache"].flatten(0, 1)[SLOTS[2]].cpu(), keys[2])


def test_opcheck_no_tokens_and_one_head(device) -> None:
    x = step(device, torch.float32, 8, 8, heads=(1, 1))
    torch.library.opcheck(torch.ops.posttrain.rope_cache, (*(t.nan_to_num() for t in x.values()), "cuda"))
    none = {name: t[:0] if len(t) == len(SLOTS) else t for name, t in x.items()}
    assert ops.rope_cache(**none).shape == (0, 1, 8)


def test_caches_of_another_dtype(device) -> None:
    x = step(device, torch.float32, 8, 8)
    x |= {name: x[name].bfloat16() for name in ("key_cache", "value_cache")}
    with pytest.raises(ValueError, match=r"must have the dtype of q, torch.float32; got torch.bfloat16"):
        ops.rope_cache(**x)
