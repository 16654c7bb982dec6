"""Each CUDA kernel on a GPU against its Triton sibling, plain PyTorch, and its floor: copying as many bytes, or a GEMM.

What can be captured in a graph is timed so, sixteen calls a replay: the device's time without the host's, as in a
decoding loop. So no call may wait for the device or allocate outside the graph's memory, and none may fit in caches:
`Race.sets` are as many copies of the inputs as sixteen calls need. The winners go into posttrain/ops/cuda_choice.py.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from elementwise import DEVICE, copies, randn
from torch import Tensor

from posttrain import _C, ops
from posttrain.bench.interleave import interleave
from posttrain.ops import NF4Weight, layout_cuda, use_backend
from posttrain.ops.backend import CUDA_DTYPES, cuda_kernels, cuda_stream
from posttrain.ops.layout import PackedLayout, torch_schedule

CALLS = 16

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing to time"),
    pytest.mark.skipif(not _C.with_cuda(), reason="this build has no CUDA kernels"),
]


class Race(NamedTuple):
    """What competes.

    Attributes:
        title: the op and its shape.
        call: our op, of one of `sets`.
        plain: the same in plain PyTorch, or None.
        moved: bytes that one call must read and write at least.
        sets: arguments that calls take in turn.
        op: the name that `use_backend` takes; None where `call` is a CUDA kernel that has no sibling.
        captured: whether calls can be captured in a graph.
        floor: what no way to compute it can beat, where that isn't copying `moved` bytes.
        operations: floating-point operations of one call, where they and not the bytes bound it.
    """

    title: str
    call: Callable[..., Any]
    plain: Callable[..., Any] | None
    moved: float
    sets: list[tuple]
    op: str | None
    captured: bool = True
    floor: Callable[..., Any] | None = None
    operations: float | None = None


def linear_logprob() -> Race:
    """The head of an 8B model without gradients; not captured, since the tiled driver looks for skipped targets."""
    rows, width, vocabulary = 8192, 4096, 151936
    hidden, weight = randn(rows, width), 0.02 * randn(vocabulary, width)
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)

    def plain(hidden: Tensor, weight: Tensor) -> None:
        for part, wanted in zip(hidden.split(1024), targets.split(1024), strict=True):
            torch.nn.functional.cross_entropy((part @ weight.T).float(), wanted, reduction="none")

    return Race(
        f"linear_logprob [{rows}, {width}] x [{vocabulary}, {width}]",
        lambda hidden, weight: ops.linear_logprob(hidden, weight, targets),
        plain,
        hidden.nbytes + weight.nbytes,
        [(hidden, weight)],
        "linear_logprob",
        captured=False,
        floor=lambda hidden, weight: [hidden @ part.T for part in weight.split(16384)],
        operations=2 * rows * width * vocabulary,
    )


def logprob_fold() -> Race:
    """A tile of logits into statistics and, as bfloat16, into e^(z-m); tiles that lie in the second-level cache."""
    rows, columns, width = 4096, 2048, 4096
    state, unit = torch.zeros(5, rows, device=DEVICE), torch.zeros(rows, width, device=DEVICE)
    targets = torch.randint(columns, (rows,), device=DEVICE)
    tile = torch.randn(rows, columns, device=DEVICE)

    def call(tile: Tensor) -> None:
        m, top, s, _, z = (x.data_ptr() for x in state)
        cuda_kernels(tile).cuda_logprob_fold(
            cuda_stream(tile),
            CUDA_DTYPES[torch.bfloat16],
            tile.data_ptr(),
            columns,
            rows,
            columns,
            0,
            targets.data_ptr(),
            0,
            *(1.0, 0.0, 1.0),
            *(m, top, s, 0, z),
            unit.data_ptr(),
            width,
        )

    return Race(f"logprob_fold [{rows}, {columns}]", call, None, 1.5 * tile.nbytes, [(tile,)], None)


def paged_attention() -> Race:
    """A token for each of 64 sequences of 4096 keys of their own."""
    return _decoding("64 x 4096 keys", shared=0, own=4096)


def paged_attention_shared() -> Race:
    """The same for 8 prompts with 8 completions each; the bytes are those of every page once."""
    return _decoding("8 x 3840 keys with 8 x 256 each", shared=3840, own=256)


def _decoding(title: str, shared: int, own: int) -> Race:
    sequences, group, page, heads, key_heads, width = 64, 8, 16, 32, 8, 128
    prompts, pages, each = sequences // group, shared // page, own // page
    q = randn(sequences, heads, width)
    caches = [randn(prompts * pages + sequences * each, page, key_heads, width) for _ in range(2)]
    prompt = torch.arange(prompts * pages).view(prompts, 1, pages).expand(-1, group, -1).reshape(sequences, pages)
    completion = prompts * pages + torch.arange(sequences * each).view(sequences, each)
    table = torch.cat([prompt, completion], 1).int().to(DEVICE)
    lens = torch.full((sequences,), shared + own, dtype=torch.int32, device=DEVICE)

    def call(q: Tensor, *caches: Tensor) -> Tensor:
        return ops.paged_attention(q, *caches, table, lens)

    def plain(q: Tensor, *caches: Tensor) -> Tensor:
        keys, values = (cache[table].flatten(1, 2).transpose(1, 2) for cache in caches)
        return torch.nn.functional.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)

    moved = 2 * q.nbytes + sum(cache.nbytes for cache in caches)
    return Race(f"paged_attention, {title}", call, plain, moved, [(q, *caches)], "paged_attention")


def packed_schedule() -> Race:
    """The blocks of a pack of 131072 tokens: prompts with completions."""
    parents = [-1 if i % 8 == 0 else i // 8 * 8 for i in range(256)]
    layout = PackedLayout.from_forest([512] * 256, parents, DEVICE)
    arguments = layout.visible_until, layout.positions
    moved = sum(x.nbytes for x in arguments) + layout.schedule.nbytes
    return Race(
        f"packed_schedule [{layout.num_tokens}]", layout_cuda.schedule, torch_schedule, moved, [arguments], None
    )


def sample() -> Race:
    """A token for each of 32 sequences from the vocabulary of Qwen3, unfiltered."""
    return _drawing("all", top_k=0, top_p=1.0)


def sample_filtered() -> Race:
    """The same with top_k 20 and top_p 0.95."""
    return _drawing("top_k 20, top_p 0.95", top_k=20, top_p=0.95)


def _drawing(title: str, top_k: int, top_p: float) -> Race:
    rows, vocabulary = 32, 151936
    seeds = torch.arange(rows, device=DEVICE)
    numbers = {"temperature": 1.0, "top_k": top_k, "top_p": top_p, "min_p": 0.0}
    parameters: dict[str, Any] = {name: torch.full((rows,), x, device=DEVICE) for name, x in numbers.items()}

    def call(logits: Tensor) -> tuple[Tensor, Tensor]:
        return ops.sample(logits, **parameters, seeds=seeds, offsets=seeds)

    def plain(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_p = logits.float().log_softmax(-1)
        tokens = torch.multinomial(log_p.exp(), 1)
        return tokens, log_p.gather(-1, tokens)

    sets = [(3 * randn(rows, vocabulary),) for _ in range(8)]
    return Race(
        f"sample {title} [{rows}, {vocabulary}]", call, None if top_k else plain, sets[0][0].nbytes, sets, "sample"
    )


def rms_norm() -> Race:
    """The residual added and normed for 64 tokens of a decoding step."""
    rows, width = 64, 4096
    weight = randn(width)

    def plain(x: Tensor, residual: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x + residual, (width,), weight, 1e-6)

    sets = [(randn(rows, width), randn(rows, width)) for _ in range(CALLS)]
    moved = 4 * sets[0][0].nbytes + weight.nbytes
    return Race(
        f"rms_norm with a residual [{rows}, {width}]",
        lambda x, residual: ops.rms_norm(x, weight, 1e-6, residual),
        plain,
        moved,
        sets,
        "rms_norm",
    )


def rope_cache() -> Race:
    """Queries, keys and values of 64 tokens of a decoding step; the sibling is `rope` in Triton and two copies."""
    tokens, heads, key_heads, width = 64, 32, 8, 128
    caches = [randn(tokens, 16, key_heads, width) for _ in range(2)]
    cos, sin = randn(tokens, width), randn(tokens, width)
    slots = 16 * torch.randperm(tokens, device=DEVICE) + 5

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.rope_cache(q, k, v, cos, sin, *caches, slots)

    sets = [tuple(randn(tokens, h, width) for h in (heads, key_heads, key_heads)) for _ in range(CALLS)]
    moved = 2 * sum(x.nbytes for x in sets[0]) + cos.nbytes + sin.nbytes
    return Race(f"rope_cache {tokens} tokens of {heads} and {key_heads} heads", call, None, moved, sets, "rope_cache")


def nf4_dequantize() -> Race:
    """A matrix of an 8B model into bfloat16."""
    sets = [(_quantized(14336, 4096),) for _ in range(4)]
    moved = sum(x.nbytes for x in (sets[0][0].packed, sets[0][0].absmax)) + 2 * 14336 * 4096
    return Race("nf4_dequantize [14336, 4096]", ops.nf4_dequantize, None, moved, sets, "nf4_dequantize")


def nf4_linear() -> Race:
    """One row, as when one sequence is decoded."""
    return _few_rows("nf4_linear", 1, 0)


def nf4_linear_16() -> Race:
    """16 rows."""
    return _few_rows("nf4_linear", 16, 0)


def nf4_lora() -> Race:
    """One row, with an adapter."""
    return _few_rows("lora_linear", 1, 64)


def nf4_lora_16() -> Race:
    """16 rows, with an adapter."""
    return _few_rows("lora_linear", 16, 64)


def _few_rows(op: str, rows: int, rank: int) -> Race:
    """Layers of [4096, 4096], more than the second-level cache holds."""
    x, a, b = randn(rows, 4096), randn(rank, 4096), randn(4096, rank)
    sets = [(_quantized(4096, 4096),) for _ in range(16)]
    moved = sum(t.nbytes for t in (sets[0][0].packed, sets[0][0].absmax, x, x, a, b))

    def call(weight: NF4Weight) -> Tensor:
        return ops.lora_linear(x, weight, a, b, 0.5) if rank else ops.nf4_linear(x, weight)

    def plain(weight: NF4Weight) -> Tensor:
        y = x @ ops.nf4_dequantize(weight).T
        return y + x @ a.T @ b.T * 0.5 if rank else y

    return Race(f"{op} of {rows} rows, rank {rank}, NF4 [4096, 4096]", call, plain, moved, sets, op)


def _quantized(height: int, width: int) -> NF4Weight:
    return ops.quantize_nf4(0.02 * randn(height, width), nested=True)


def lora_by_row() -> Race:
    """64 rows that name one of four adapters, with the product of the frozen layer."""
    rows, width, rank, adapters = 64, 4096, 16, 4
    scaling = [0.5] * adapters
    adapter = torch.arange(rows, device=DEVICE) % adapters
    sets = [
        (randn(rows, width), randn(width, width), randn(adapters, rank, width), randn(adapters, width, rank))
        for _ in range(4)
    ]

    def call(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ops.lora_linear(x, weight, a, b, scaling, adapter=adapter)

    moved = sum(t.nbytes for t in sets[0]) + sets[0][0].nbytes
    return Race(f"lora_linear of {rows} rows and {adapters} adapters", call, None, moved, sets, "lora_linear")


RACES = {
    race.__name__: race
    for race in (
        linear_logprob,
        logprob_fold,
        paged_attention,
        paged_attention_shared,
        packed_schedule,
        sample,
        sample_filtered,
        rms_norm,
        rope_cache,
        nf4_dequantize,
        nf4_linear,
        nf4_linear_16,
        nf4_lora,
        nf4_lora_16,
        lora_by_row,
    )
}


@pytest.mark.parametrize("name", RACES)
def test_cuda(name: str, publish) -> None:
    race = RACES[name]()
    ways: dict[str, tuple[Callable[..., Any] | None, str | None]] = {"cuda": (race.call, "cuda")}
    if race.op:
        ways["triton"] = race.call, "triton"
    ways["plain PyTorch"] = race.plain, None
    functions = {way: _repeated(call, backend, race) for way, (call, backend) in ways.items() if call}
    copy = copies(race.moved, torch.empty(1, dtype=torch.uint8, device=DEVICE))
    functions["floor"] = _repeated(race.floor or (lambda *_: copy()), None, race)
    baseline = "triton" if race.op else "plain PyTorch" if race.plain else "floor"
    comparison = interleave(functions, baseline=baseline, rounds=21)
    calls = CALLS if race.captured else 1
    unit, work = ("GB/s", race.moved / 1e9) if race.operations is None else ("TFLOP/s", race.operations / 1e12)
    rates = {f"{unit}, {way}": calls * work / time.median for way, time in comparison.seconds.items()}
    publish(f"cuda-{name}", f"{race.title}, {calls} calls", comparison, **rates)


def _repeated(call: Callable[..., Any], backend: str | None, race: Race) -> Callable[[], object]:
    """`call` with `backend` on one set after the other, captured if it can be."""
    turns = itertools.cycle(race.sets)

    def once() -> None:
        with torch.no_grad():
            if backend and race.op:
                with use_backend(backend, race.op):
                    call(*next(turns))
            else:
                call(*next(turns))

    return _captured(once) if race.captured else once


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """CALLS calls in one replay of a graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph.replay
