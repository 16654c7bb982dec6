"""linear_logprob against the bare GEMM of its logits and against its peers: time and memory.

On a CPU float32 with N=4096, H=1024, V=65536; on a GPU bfloat16 with N=8192, H=4096, V=151936. Peers with their best
settings:

    posttrain     linear_logprob as it comes; "cached" with a memory budget that holds the logits
    plain         log_softmax of the whole logits, gathered
    torch lce     torch.nn.functional.linear_cross_entropy, as is and chunked (LinearCrossEntropyOptions())
    trl           TRL's ChunkedLogProbFunction with its own chunk size and only the log-probabilities asked for
    cce torch     cut-cross-entropy's path without Triton, impl="torch_compile"
    cce, liger    on a GPU: cut-cross-entropy's Triton kernel, and Liger's fused linear cross entropy
"""

import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from posttrain.bench.interleave import interleave
from posttrain.bench.memory import peak_bytes
from posttrain.ops import linear_logprob

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
N, H, V = (8192, 4096, 151936) if GPU else (4096, 1024, 65536)
LIMITS = (
    {"forward": 1.10, "frozen": 2.35, "trainable": 4.7} if GPU else {"forward": 1.10, "frozen": 2.2, "trainable": 4.3}
)
EXTRA_MEGABYTES = {"forward": 64, "frozen": 500, "trainable": 1600} if GPU else dict.fromkeys(LIMITS, 64)
MEGABYTE = 1 << 20


def plain(x, weight, y):
    """-mean log-probability through the whole logits."""
    return -F.linear(x, weight).log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean()


def posttrain(x, weight, y):
    """The same through linear_logprob."""
    return -linear_logprob(x, weight, y).logprob.mean()


def posttrain_cached(x, weight, y):
    """The same with room to keep the logits for the backward, as the peers do that are not chunked."""
    return -linear_logprob(x, weight, y, memory_budget=2 << 30).logprob.mean()


def torch_lce(x, weight, y):
    """The same through PyTorch's own fused op, which by default computes the whole logits."""
    return F.linear_cross_entropy(x, weight, y)


def torch_lce_chunked(x, weight, y):
    """The same, chunked as PyTorch finds best."""
    return F.linear_cross_entropy(x, weight, y, options=torch.nn.LinearCrossEntropyOptions())


def trl(x, weight, y):
    """The same through TRL."""
    from trl.kernels import ChunkedLogProbFunction

    return -ChunkedLogProbFunction.apply(x, weight, None, y, 1.0, 32768, None, 1.0, ())[0].mean()


def cce_torch(x, weight, y):
    """The same through cut-cross-entropy without Triton."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, y, impl="torch_compile")


def cce(x, weight, y):
    """The same through cut-cross-entropy's Triton kernel."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, y)


def liger(x, weight, y):
    """The same through Liger."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, weight, y)


LOSSES = {
    "posttrain": posttrain,
    "posttrain cached": posttrain_cached,
    "plain": plain,
    "torch lce": torch_lce,
    "torch lce chunked": torch_lce_chunked,
    "trl": trl,
    "cce torch": cce_torch,
}
if GPU:
    LOSSES |= {"cce": cce, "liger": liger}
MISSING = {
    "torch lce": not hasattr(F, "linear_cross_entropy"),
    "torch lce chunked": not hasattr(torch.nn, "LinearCrossEntropyOptions"),
    "trl": find_spec("trl") is None,
    "cce torch": find_spec("cut_cross_entropy") is None,
    "cce": find_spec("cut_cross_entropy") is None,
    "liger": find_spec("liger_kernel") is None,
}
LOSSES = {name: loss for name, loss in LOSSES.items() if not MISSING.get(name)}


def problem(n=N, h=H, v=V, mode="forward"):
    """(x, weight, targets): weights as large as a trained head's, gradients where `mode` trains."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, h, generator=generator).to(DEVICE, DTYPE)
    weight = (torch.randn(v, h, generator=generator) / h**0.5).to(DEVICE, DTYPE)
    y = torch.randint(0, v, (n,), generator=generator).to(DEVICE)
    return x.requires_grad_(mode != "forward"), weight.requires_grad_(mode == "trainable"), y


def step(loss, x, weight, y):
    """One forward, and the backward if anything wants a gradient."""
    x.grad = weight.grad = None
    value = loss(x, weight, y)
    if value.requires_grad:
        value.backward()
    return value


@pytest.mark.parametrize("mode", LIMITS)
def test_time(mode, publish):
    x, weight, y = problem(mode=mode)
    truth = step(plain, *problem(256, H, V, mode))
    for name, loss in LOSSES.items():
        torch.testing.assert_close(step(loss, *problem(256, H, V, mode)).to(DTYPE), truth, msg=f"{name} is wrong")
    logits = torch.empty(N, V, device=DEVICE, dtype=DTYPE)
    functions = {"bare GEMM": lambda: torch.mm(x.detach(), weight.detach().T, out=logits)}
    functions |= {name: lambda loss=loss: step(loss, x, weight, y) for name, loss in LOSSES.items()}
    comparison = interleave(functions, "bare GEMM", rounds=5)
    times = 1 / comparison.speedup["posttrain"].median
    publish(f"logprob-{mode}", f"linear_logprob {mode}", comparison, gemm_times=times, limit=LIMITS[mode])
    assert times <= LIMITS[mode]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mode", LIMITS)
def test_memory(mode, report):
    lines = [f"linear_logprob {mode}: peak memory beyond inputs, outputs and gradients (MB)"]
    gradients = {"forward": 0, "frozen": N * H, "trainable": (N + V) * H}[mode] * DTYPE.itemsize
    extra = {}
    for name, loss in LOSSES.items():
        extra[name] = (_peak(loss, mode) - gradients) / MEGABYTE
        lines.append(f"  {name:<20} {extra[name]:>9.1f}")
    report(f"logprob-memory-{mode}", lines, extra_megabytes=extra)
    assert extra["posttrain"] <= EXTRA_MEGABYTES[mode]


def _peak(loss, mode):
    """Bytes that a step takes at most beyond its inputs."""
    if not GPU:
        setup = f"import bench_logprob as b\nb.step(b.{loss.__name__}, *b.problem(256, 64, 512, {mode!r}))\n"
        return peak_bytes(f"{setup}inputs = b.problem(mode={mode!r})", f"b.step(b.{loss.__name__}, *inputs)")
    inputs = problem(mode=mode)
    step(loss, *inputs)
    inputs[0].grad = inputs[1].grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(loss, *inputs)
    return torch.cuda.max_memory_allocated() - before
