"""Adapters to what others offer: each makes, of a problem, their function of our arguments.

Everything is imported where it is used, so that a peer that is missing, or that can't be imported on this machine, is
named with its reason while the others are measured. Signatures are those of the versions in requirements.txt and, of
what isn't there, of their documentation.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import torch
from torch.nn import functional

from posttrain.bench.case import Function, Problem, Unavailable, Way, copied
from posttrain.bench.device import GPU

Makers = Mapping[str, Callable[[Problem], Way | Function]]


def compiled(problem: Problem) -> Function:
    """torch.compile of plain PyTorch."""
    torch._dynamo.reset()  # what was compiled for other shapes
    return torch.compile(problem.plain, dynamic=False)


def on_a_gpu() -> None:
    """Raise for a peer that has no code for the CPU."""
    if not GPU:
        raise Unavailable("runs on GPUs only")


def torch_rms_norm(problem: Problem) -> Function:
    """torch's own."""
    return lambda x, weight: functional.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def liger_rms_norm(problem: Problem) -> Function:
    """Liger's, out of place, since its arguments are used again."""
    on_a_gpu()
    from liger_kernel.transformers.functional import liger_rms_norm as function

    return lambda x, weight: function(x, weight, 1e-6, in_place=False)


def liger_add_rms_norm(problem: Problem) -> Function:
    """Liger's, with the residual added."""
    on_a_gpu()
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm as function

    return lambda x, weight, residual: function(x, residual, weight, 1e-6, in_place=False)


def quack_rms_norm(problem: Problem) -> Function:
    """quack's."""
    on_a_gpu()
    from quack import rmsnorm

    return lambda x, weight: rmsnorm(x, weight, eps=1e-6)


def quack_add_rms_norm(problem: Problem) -> Function:
    """quack's, with the residual added and given back."""
    on_a_gpu()
    from quack import rmsnorm

    return lambda x, weight, residual: rmsnorm(x, weight, residual=residual, eps=1e-6, prenorm=True)


def unsloth_rms_norm(problem: Problem) -> Function:
    """Unsloth's, which is for frozen norms: it has no gradient of the weight."""
    from unsloth.kernels import fast_rms_layernorm

    return lambda x, weight: fast_rms_layernorm(SimpleNamespace(weight=weight, variance_epsilon=1e-6), x)


def liger_rope(problem: Problem) -> Way:
    """Liger's."""
    on_a_gpu()
    from liger_kernel.transformers.functional import liger_rope as function

    return Way(function, prepare=copied)


def unsloth_rope(problem: Problem) -> Way:
    """Unsloth's."""
    from unsloth.kernels import fast_rope_embedding

    return Way(fast_rope_embedding, prepare=copied)


def liger_swiglu(problem: Problem) -> Way:
    """Liger's; its backward overwrites its arguments, so it has its own."""
    on_a_gpu()
    from liger_kernel.transformers.functional import liger_swiglu as function

    return Way(function, prepare=copied)


def liger_geglu(problem: Problem) -> Way:
    """Liger's; its backward overwrites its arguments, so it has its own."""
    on_a_gpu()
    from liger_kernel.transformers.functional import liger_geglu as function

    return Way(function, prepare=copied)


def torch_linear_cross_entropy(problem: Problem) -> Function:
    """torch's own, chunked."""
    if not hasattr(functional, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has none")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, weight, y: functional.linear_cross_entropy(x, weight, y, reduction="sum", options=options)


def liger_linear_cross_entropy(problem: Problem) -> Function:
    """Liger's fused one."""
    on_a_gpu()
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as function

    return lambda x, weight, y: function(x, weight, y, reduction="sum")


def cut_cross_entropy(problem: Problem) -> Function:
    """Apple's, by Triton on a GPU and by torch.compile on a CPU."""
    from cut_cross_entropy import linear_cross_entropy

    torch._dynamo.reset()
    impl = "cce" if GPU else "torch_compile"
    return lambda x, weight, y: linear_cross_entropy(x, weight, y, reduction="sum", impl=impl)


def trl_logprob(problem: Problem) -> Function:
    """TRL's chunked op with its own chunk size, and only the log-probabilities asked for."""
    from trl.kernels import ChunkedLogProbFunction

    return lambda x, weight, y: -ChunkedLogProbFunction.apply(x, weight, None, y, 1.0, 32768, None, 1.0, ())[0].sum()


def unsloth_cross_entropy(problem: Problem) -> Function:
    """Unsloth's, of the whole logits."""
    from unsloth.kernels import fast_cross_entropy_loss

    return lambda x, weight, y: fast_cross_entropy_loss(functional.linear(x, weight)[None], y[None], n_items=1)


def quack_linear_cross_entropy(problem: Problem) -> Function:
    """quack's chunked one."""
    on_a_gpu()
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x, weight, y: chunked_linear_cross_entropy(x, weight, y, reduction="sum")
