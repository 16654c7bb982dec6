"""linear_logprob against the bare GEMM of its logits and against its peers: time and memory, with targets.

On a CPU float32 with N=4096, H=1024, V=65536; on a GPU bfloat16 with N=8192, H=4096, V=151936. The peers are those of
`posttrain bench linear_logprob`, whose cases this file runs as well, and

    posttrain cached    with a memory budget that holds the logits
    plain               log_softmax of the whole logits, gathered
    torch whole         torch.nn.functional.linear_cross_entropy as it comes, which computes the whole logits
"""

import sys

import pytest
import torch
import torch.nn.functional as F

from posttrain.bench import peers
from posttrain.bench.case import Unavailable
from posttrain.bench.cases.logprob import ours
from posttrain.bench.interleave import interleave
from posttrain.bench.memory import peak_bytes, peak_of
from posttrain.bench.suite import pytest_generate_tests, test_case
from posttrain.ops import linear_logprob

__all__ = ["pytest_generate_tests", "test_case"]
OPS = ("linear_logprob",)
GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
N, H, V = (8192, 4096, 151936) if GPU else (4096, 1024, 65536)
LIMITS = (
    {"forward": 1.10, "frozen": 2.35, "trainable": 4.7} if GPU else {"forward": 1.10, "frozen": 2.2, "trainable": 4.3}
)
EXTRA_MEGABYTES = {"forward": 64, "frozen": 500, "trainable": 1600} if GPU else dict.fromkeys(LIMITS, 64)
MEGABYTE = 1 << 20


def cached(x, weight, y):
    """With room to keep the logits for the backward, as the peers do that are not chunked."""
    return -linear_logprob(x, weight, y, memory_budget=2 << 30).logprob.sum()


def plain(x, weight, y):
    """Through the whole logits and all their log-probabilities."""
    return -F.linear(x, weight).log_softmax(-1).gather(-1, y.unsqueeze(-1)).sum()


def torch_whole(x, weight, y):
    """PyTorch's own fused op."""
    return F.linear_cross_entropy(x, weight, y, reduction="sum")


LOSSES = {"posttrain": ours, "posttrain cached": cached, "plain": plain}
if hasattr(F, "linear_cross_entropy"):
    LOSSES["torch whole"] = torch_whole
for _name, _maker in {
    "torch chunked": peers.torch_linear_cross_entropy,
    "trl": peers.trl_logprob,
    "cce": peers.cut_cross_entropy,
    "liger": peers.liger_linear_cross_entropy,
}.items():
    try:
        LOSSES[_name] = _maker(None)
    except (ImportError, Unavailable) as _error:
        print(f"{_name}: {_error}")


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
        found = step(loss, *problem(256, H, V, mode)).to(DTYPE)
        torch.testing.assert_close(found, truth, msg=f"{name} is wrong")
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
    for name in LOSSES:
        extra[name] = (_peak(name, mode) - gradients) / MEGABYTE
        lines.append(f"  {name:<20} {extra[name]:>9.1f}")
    report(f"logprob-memory-{mode}", lines, extra_megabytes=extra)
    assert extra["posttrain"] <= EXTRA_MEGABYTES[mode]


def _peak(name, mode):
    """Bytes that a step takes at most beyond its inputs; on a CPU in a process of its own."""
    if not GPU:
        call = f"b.step(b.LOSSES[{name!r}], "
        setup = f"import bench_logprob as b\n{call}*b.problem(256, 64, 512, {mode!r}))\n"
        return peak_bytes(f"{setup}inputs = b.problem(mode={mode!r})", f"{call}*inputs)")
    inputs = problem(mode=mode)
    step(LOSSES[name], *inputs)
    inputs[0].grad = inputs[1].grad = None
    return peak_of(lambda: step(LOSSES[name], *inputs))
