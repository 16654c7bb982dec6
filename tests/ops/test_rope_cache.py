"""rope_cache on the CPU: what rope and write_cache do, one after the other."""

import pytest
import torch

from posttrain import ops

SLOTS = torch.tensor([3, 23, 0])
THREE_PIECES = torch.tensor([3, 23, 0, *range(5, 19)])  # 17 tokens; the kernel takes pieces of 8


def step(
    dtype: torch.dtype = torch.float32,
    width: int = 12,
    rotated: int = 8,
    heads: tuple[int, int] = (4, 2),
    slots: torch.Tensor = SLOTS,
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = len(slots)
    q, k, v = (torch.randn(tokens, n, width, generator=generator).to(dtype) for n in (heads[0], heads[1], heads[1]))
    angles = torch.randn(tokens, rotated // 2, generator=generator).repeat(1, 2).to(dtype)
    caches = {
        name: torch.full((3, 8, heads[1], width), torch.nan, dtype=dtype) for name in ("key_cache", "value_cache")
    }
    return {"q": q, "k": k, "v": v, "cos": angles.cos(), "sin": angles.sin(), **caches, "slots": slots}


@pytest.mark.parametrize(
    ("backend", "dtype"), [("cpu", torch.float32), ("cpu", torch.float64), ("reference", torch.float32)]
)
@pytest.mark.parametrize(
    ("width", "rotated", "heads", "slots"),
    [
        (12, 8, (4, 2), SLOTS),
        (64, 64, (3, 1), THREE_PIECES),
        (512, 512, (6, 3), THREE_PIECES),
    ],
)
@pytest.mark.usefixtures("poison")
def test_agrees_with_rope_and_write_cache(backend, dtype, width, rotated, heads, slots) -> None:
    x = step(dtype, width, rotated, heads, slots)
    with ops.use_backend(backend):
        out = ops.rope_cache(**x)
        q, k = ops.rope(x["q"], x["k"], x["cos"], x["sin"])
    assert torch.equal(out, q)
    for name, new in (("key_cache", k), ("value_cache", x["v"])):
        assert torch.equal(x[name].flatten(0, 1)[slots], new)
        assert x[name].isnan().sum() == x[name].numel() - new.numel()


def test_any_memory_order_and_wider_angles() -> None:
    first, other = step(), step()
    other |= {name: other[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("q", "k")}
    other["v"] = torch.stack([other["v"], other["v"]], 3)[..., 0]
    other |= {name: other[name].double().T.contiguous().T for name in ("cos", "sin")}
    other["slots"] = torch.stack([SLOTS, SLOTS], 1)[:, 0]
    assert torch.equal(ops.rope_cache(**other), ops.rope_cache(**first))
    assert all(torch.equal(other[name].nan_to_num(), first[name].nan_to_num()) for name in ("key_cache", "value_cache"))


def test_caches_of_another_dtype() -> None:
    x = step()
    x |= {name: x[name].bfloat16() for name in ("key_cache", "value_cache")}
    q, k = ops.rope(x["q"], x["k"], x["cos"], x["sin"])
    assert torch.equal(ops.rope_cache(**x), q)
    assert torch.equal(x["key_cache"].flatten(0, 1)[SLOTS], k.bfloat16())


def test_opcheck_and_no_tokens() -> None:
    x = step()
    torch.library.opcheck(torch.ops.posttrain.rope_cache, (*(t.nan_to_num() for t in x.values()), "cpu"))
    none = {name: t[:0] if len(t) == len(SLOTS) and "cache" not in name else t for name, t in x.items()}
    assert ops.rope_cache(**none).shape == (0, 4, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(3, 2, 12).double()}, "q is torch.float32 on cpu, k torch.float64"),
        ({"v": torch.zeros(3, 1, 12)}, r"needs k and v \[T, Hkv, D\] .* v \[3, 1, 12\]"),
        ({"cos": torch.zeros(3, 14), "sin": torch.zeros(3, 14)}, "width of cos must be even and at most 12, got 14"),
        ({"slots": torch.zeros(2).long()}, r"slots must be int64 \[3\], got torch.int64 \[2\]"),
        ({"slots": torch.tensor([3, 24, 0])}, r"slots\[1\] is 24; the cache has the slots 0 to 23"),
        ({"q": torch.zeros(3, 4, 12, requires_grad=True)}, r"no gradient; call it under torch.no_grad\(\)"),
    ],
)
def test_wrong_arguments(change, message) -> None:
    with pytest.raises(ValueError, match=f"rope_cache: .*{message}"):
        ops.rope_cache(**step() | change)


def test_one_row_of_sequences_only() -> None:
    x = step()
    x |= {name: x[name][None] for name in ("q", "cos", "sin")} | {"k": x["k"][None].expand(1, 3, 2, 12)}
    with pytest.raises(ValueError, match=r"\[1, 3"):
        ops.rope_cache(**x)
