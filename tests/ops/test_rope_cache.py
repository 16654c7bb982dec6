"""rope_cache on the CPU: rope and write_cache, one after the other."""

import pytest
import torch

from posttrain import ops

SLOTS = torch.tensor([3, 23, 0])


def step(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, 12, generator=generator).to(dtype) for heads in (4, 2, 2))
    angles = torch.randn(3, 4, generator=generator).repeat(1, 2).to(dtype)
    caches = {name: torch.full((3, 8, 2, 12), torch.nan, dtype=dtype) for name in ("key_cache", "value_cache")}
    return {"q": q, "k": k, "v": v, "cos": angles.cos(), "sin": angles.sin(), **caches, "slots": SLOTS}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_is_rope_and_write_cache(backend) -> None:
    x = step()
    with ops.use_backend(backend):
        out = ops.rope_cache(**x)
        q, k = ops.rope(x["q"], x["k"], x["cos"], x["sin"])
    assert torch.equal(out, q)
    for name, new in (("key_cache", k), ("value_cache", x["v"])):
        assert torch.equal(x[name].flatten(0, 1)[SLOTS], new)
        assert x[name].isnan().sum() == x[name].numel() - new.numel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(3, 2, 12).double()}, "q is torch.float32 on cpu, k torch.float64"),
        ({"v": torch.zeros(3, 1, 12)}, r"needs k and v \[T, Hkv, D\] .* v \[3, 1, 12\]"),
        ({"cos": torch.zeros(3, 14), "sin": torch.zeros(3, 14)}, "width of cos must be even and at most 12, got 14"),
        ({"slots": torch.zeros(2).long()}, r"slots must be int64 \[3\], got torch.int64 \[2\]"),
        ({"slots": torch.tensor([3, 24, 0])}, "24"),
    ],
)
def test_wrong_arguments(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        ops.rope_cache(**step() | change)


def test_one_row_of_sequences_only() -> None:
    x = step()
    x |= {name: x[name][None] for name in ("q", "cos", "sin")} | {"k": x["k"][None].expand(1, 3, 2, 12)}
    with pytest.raises(ValueError, match=r"\[1, 3"):
        ops.rope_cache(**x)
