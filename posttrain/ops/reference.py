"""Every op as plain PyTorch: the definition that the kernels are held to.

Written to be read, not to be fast. All functions take any floating dtype, are differentiable by autograd, and compute
in the precision of their inputs, but at least float32.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain.ops.layout import PackedLayout
from posttrain.ops.nf4_weight import NF4Weight, code_table

if TYPE_CHECKING:
    from posttrain.ops.lora_layer import LoraLayer


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`posttrain.ops.rms_norm`."""
    total = x if residual is None else x + residual
    wide = _wide(total)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = (wide * scale * weight.to(wide.dtype)).to(x.dtype)
    return y if residual is None else (y, total)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """`posttrain.ops.rope`."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _turn(q, cos, sin), _turn(k, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = _wide(x)
    turned, rest = wide.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    a, b = turned.chunk(2, dim=-1)
    turned = turned * cos.to(wide.dtype) + torch.cat([-b, a], dim=-1) * sin.to(wide.dtype)
    return torch.cat([turned, rest], dim=-1).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`posttrain.ops.swiglu`."""
    return (torch.nn.functional.silu(_wide(gate)) * up).to(gate.dtype)


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """`posttrain.ops.geglu`."""
    return (torch.nn.functional.gelu(_wide(gate), approximate=approximate) * up).to(gate.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`posttrain.ops.linear_logprob`: (logprob, entropy, lse, is_top1), each `[M]`, through all `[M, V]` logits."""
    x = _wide(hidden if rows is None else hidden[rows])
    logits = x @ weight.to(x.dtype).T
    if lora is not None:
        lora_a, lora_b, scaling = lora
        logits = logits + scaling * (x @ lora_a.to(x.dtype).T) @ lora_b.to(x.dtype).T
    if bias is not None:
        logits = logits + bias.to(x.dtype)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    valid = targets != -100
    y = torch.where(valid, targets, 0).unsqueeze(-1)
    lse = logits.logsumexp(-1)
    log_p = logits.log_softmax(-1)
    entropy = lse - (log_p.exp() * logits).sum(-1)
    is_top1 = logits.gather(-1, y).squeeze(-1) >= logits.amax(-1)
    logprob = log_p.gather(-1, y).squeeze(-1)
    return torch.where(valid, logprob, 0), torch.where(valid, entropy, 0), torch.where(valid, lse, 0), is_top1 & valid


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`posttrain.ops.packed_attention`, through the whole `[Hq, T, T]` scores."""
    index = torch.arange(len(q), device=q.device)
    visible = (index <= index[:, None]) & (index[:, None] < layout.visible_until)
    if window is not None:
        visible &= layout.positions[:, None] - layout.positions < window
    return _attend(q, k, v, visible, scale, softcap, sinks)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of `[Tq, Hq, D]` over `[Tk, Hkv, D]`, where `visible` `[Tq, Tk]`."""
    group = q.shape[1] // k.shape[1]
    keys, values = (_wide(x).repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", _wide(q), keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : len(k)]
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_lens: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`posttrain.ops.paged_attention`, one sequence at a time."""
    lengths = [1] * len(q) if query_lens is None else query_lens.tolist()
    page_size = key_cache.shape[1]
    out = torch.empty_like(q)
    for rows, pages, context in zip(
        torch.arange(len(q)).split(lengths), block_table.long(), context_lens.tolist(), strict=True
    ):
        used = pages[: -(-context // page_size)]
        k, v = (cache[used].flatten(0, 1)[:context] for cache in (key_cache, value_cache))
        position = torch.arange(context, device=q.device)
        own = position[context - len(rows) :, None]
        visible = position <= own
        if window is not None:
            visible &= own - position < window
        out[rows] = _attend(q[rows], k, v, visible, scale, softcap, sinks)
    return out


def nf4_dequantize(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """`posttrain.ops.nf4_dequantize`."""
    nested = weight.nested
    absmax = weight.absmax
    if nested is not None:
        own = torch.arange(len(absmax), device=absmax.device) // nested.blocksize
        absmax = nested.code[absmax.long()] * nested.absmax[own] + nested.offset
    bytes_ = weight.packed.flatten()
    index = torch.stack([bytes_ >> 4, bytes_ & 15], -1).flatten()[: weight.shape[0] * weight.shape[1]]
    wide = torch.promote_types(dtype, torch.float32)
    own = torch.arange(len(index), device=index.device) // weight.blocksize
    values = code_table(index.device).to(wide)[index.long()] * absmax.to(wide)[own]
    return values.view(weight.shape).to(dtype)


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """`posttrain.ops.nf4_linear`."""
    wide = _wide(x)
    y = wide @ nf4_dequantize(weight, x.dtype).to(wide.dtype).T
    return (y if bias is None else y + bias.to(wide.dtype)).to(x.dtype)


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float | Sequence[float] = 1.0,
    bias: Tensor | None = None,
    *,
    magnitude: Tensor | None = None,
    adapter: Tensor | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """`posttrain.ops.lora_linear`."""
    wide = _wide(x)
    dense = (nf4_dequantize(weight, x.dtype) if isinstance(weight, NF4Weight) else weight).to(wide.dtype)
    y = wide @ dense.T
    offset = 0 if bias is None else bias.to(wide.dtype)
    if lora_a is None or lora_b is None:
        return (y + offset).to(x.dtype)
    kept = wide if dropout == 0 else wide.masked_fill(dropped(x, dropout, seed), 0) / (1 - dropout)
    one = adapter is None
    factors = [scaling] * (1 if one else len(lora_a)) if isinstance(scaling, int | float) else scaling
    pairs = zip(lora_a[None] if one else lora_a, lora_b[None] if one else lora_b, factors, strict=True)
    for index, (a, b, factor) in enumerate(pairs):
        delta = factor * (kept @ a.to(wide.dtype).T) @ b.to(wide.dtype).T
        y = y + (delta if adapter is None else delta.masked_fill((adapter != index)[..., None], 0))
    if magnitude is not None:
        adapted = dense + factors[0] * lora_b.to(wide.dtype) @ lora_a.to(wide.dtype)
        y = y * (magnitude.to(wide.dtype) / adapted.norm(dim=1).detach())
    return (y + offset).to(x.dtype)


def dropped(x: Tensor, share: float, seed: int) -> Tensor:
    """Which elements of `x` dropout takes out: bool, the same for the same shape, device and seed."""
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(share, generator=generator)


def _normed(x: Tensor, norm: tuple[Tensor, float] | None) -> Tensor:
    if norm is None:
        return x
    y = rms_norm(x, *norm)
    assert isinstance(y, Tensor)
    return y


def lora_qkv(
    x: Tensor,
    q: "LoraLayer",
    k: "LoraLayer",
    v: "LoraLayer",
    *,
    norm: tuple[Tensor, float] | None = None,
    adapter: Tensor | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`posttrain.ops.lora_qkv`."""
    x = _normed(x, norm)
    return (
        lora_linear(x, *q, adapter=adapter, dropout=dropout, seed=seed),
        lora_linear(x, *k, adapter=adapter, dropout=dropout, seed=seed + 1),
        lora_linear(x, *v, adapter=adapter, dropout=dropout, seed=seed + 2),
    )


def lora_mlp(
    x: Tensor,
    gate: "LoraLayer",
    up: "LoraLayer",
    down: "LoraLayer",
    activation: str = "silu",
    *,
    norm: tuple[Tensor, float] | None = None,
    adapter: Tensor | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """`posttrain.ops.lora_mlp`."""
    x = _normed(x, norm)
    left = lora_linear(x, *gate, adapter=adapter, dropout=dropout, seed=seed)
    right = lora_linear(x, *up, adapter=adapter, dropout=dropout, seed=seed + 1)
    if activation == "silu":
        hidden = swiglu(left, right)
    else:
        hidden = geglu(left, right, "tanh" if activation == "gelu_tanh" else "none")
    return lora_linear(hidden, *down, adapter=adapter, dropout=dropout, seed=seed + 2)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    """`posttrain.ops.sample`, by sorting; all parameters are `[S]`."""
    wide = _wide(logits)
    greedy = temperature == 0
    z = (wide - wide.amax(-1, keepdim=True)) / torch.where(greedy, 1, temperature)[:, None].to(wide.dtype)
    ordered = z.sort(-1, descending=True).values
    size = z.shape[1]
    last = torch.where(top_k == 0, size, top_k).clamp(max=size) - 1
    kept = z >= ordered.gather(-1, last[:, None])
    ordered = ordered.masked_fill(ordered < ordered.gather(-1, last[:, None]), -torch.inf)
    share = ordered.softmax(-1)
    crossed = (share.cumsum(-1) - share >= top_p[:, None]) & (top_p < 1)[:, None]
    crossed[:, 0] = False
    lowest = ordered.masked_fill(crossed, torch.inf).amin(-1)
    kept &= z >= lowest[:, None]
    kept &= z >= min_p.to(z.dtype).log()[:, None]
    drawn = (z + gumbel(seeds, offsets, size, z.dtype)).masked_fill(~kept, -torch.inf).argmax(-1)
    tokens = torch.where(greedy, z.argmax(-1), drawn)
    logprobs = z.log_softmax(-1).gather(-1, tokens[:, None])[:, 0].float()
    return tokens.masked_fill(logprobs.isnan(), 0), logprobs


def gumbel(seeds: Tensor, offsets: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """The random part of `sample`, `[S, size]`."""
    i = torch.arange(size, device=seeds.device)
    counter = 16 * (i // 64) + i % 16
    words = torch.stack(_philox(counter, seeds[:, None], offsets[:, None]), -1)  # [S, size, 4]
    word = words.gather(-1, (i // 16 % 4)[None, :, None].expand(len(seeds), size, 1)).squeeze(-1)
    u = ((word >> 9).to(dtype) + 0.5) / 2**23
    return -torch.log(-torch.log(u))


def _philox(counter: Tensor, key: Tensor, offset: Tensor) -> list[Tensor]:
    """The four words of Philox 4x32-10 at (counter, 0, offset): int64 tensors of what 32 bits hold."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter, torch.zeros_like(counter), offset & low, (offset >> 32) & low
    k0, k1 = key & low, (key >> 32) & low
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64
        c0, c1 = ((second >> 32) & low) ^ c1 ^ k0, second & low
        c2, c3 = ((first >> 32) & low) ^ c3 ^ k1, first & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [c0, c1, c2, c3]
