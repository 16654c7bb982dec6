"""Drawing tokens from logits, each row with a seed of its own.

With z_i = (logit_i - largest logit) / temperature and w_i = e^z_i, the tokens that stay are, filter after filter,

    top_k   those with fewer than top_k tokens above them
    top_p   those above which lies less than the share top_p of the weight that top_k left: the token that crosses stays
    min_p   those with w_i >= min_p (the largest w is 1)

the order and the meaning of transformers and vLLM; tokens of equal logits stay or go together. Of what stays, token i
is drawn with a probability in proportion to w_i, as the largest of z_i + g_i with independent g_i = -log(-log u_i)
(Gumbel's distribution; Maddison et al., "A* Sampling", 2014). u_i comes from Philox 4x32-10 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", 2011), a function of its key, the row's seed, and its counter, the row's offset
and i:

    word (i / 16) mod 4 of the output at counter (16 (i / 64) + i mod 16, 0, offset's low half, offset's high half)
    u_i = (the word's upper 23 bits + 1/2) / 2^23

So a draw depends on nothing but its own row, seed and offset, all backends use the same u, and they draw the same token
but where rounding decides between two.
"""

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from posttrain import _C
from posttrain.ops import reference
from posttrain.ops.backend import CUDA_DTYPES, backend_for, cuda_device, cuda_kernels, cuda_stream
from posttrain.ops.library import define


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    seeds: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draw one token from each row of logits, and say how probable it was before any filter.

    Args:
        logits: `[S, V]`, floating, before the temperature.
        temperature: a number or `[S]`; 0 takes the largest logit (the first of equal ones), whatever the filters say;
            others are at least 1e-6, far from where 1 / temperature overflows in float32.
        top_k: a number or `[S]`, integer; 0 for all.
        top_p: a number or `[S]`, above 0; 1 for all.
        min_p: a number or `[S]`; 0 for all.
        seeds: int64 `[S]`.
        offsets: int64 `[S]`, the number of the token within its sequence: another offset is another draw.

    Returns:
        (tokens int64 `[S]`, logprobs float32 `[S]`): logprobs are log_softmax(logits / temperature) over the whole
        vocabulary, whatever was filtered, at temperature 0 log_softmax(logits). A row depends only on its own logits
        and numbers. A row without a distribution (NaN or infinity among its logits, or all of them minus infinity)
        gives token 0 with the logprob NaN.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, with the numbers; logits that need a gradient;
            temperature, top_k, top_p or min_p out of range, where they are numbers or on the CPU.
    """
    _check(logits, seeds, offsets)
    backend = backend_for("sample", logits)
    rows = logits.shape[0], logits.device
    parameters = (
        _per_row("temperature", temperature, *rows),
        _per_row("top_k", top_k, *rows),
        _per_row("top_p", top_p, *rows),
        _per_row("min_p", min_p, *rows),
    )
    if backend == "reference":
        return reference.sample(logits, *parameters, seeds, offsets)
    return _sample(logits, *parameters, seeds, offsets, backend)


def _check(logits: Tensor, seeds: Tensor, offsets: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(f"sample: logits must be floating [S, V], got {logits.dtype} {list(logits.shape)}")
    if torch.is_grad_enabled() and logits.requires_grad:
        raise ValueError("sample: has no gradient; call it under torch.no_grad()")
    for name, x in (("seeds", seeds), ("offsets", offsets)):
        if x.shape != logits.shape[:1] or x.dtype != torch.int64 or x.device != logits.device:
            raise ValueError(
                f"sample: {name} must be int64 [{len(logits)}] on {logits.device}, "
                f"got {x.dtype} {list(x.shape)} on {x.device}"
            )


LEAST_TEMPERATURE = 1e-6  # besides 0

# What each parameter may be: in words, its lower bound and whether that belongs to it, its upper bound.
_RANGES = {
    "temperature": (f"0, or finite and at least {LEAST_TEMPERATURE}", 0.0, True, torch.finfo(torch.float32).max),
    "top_k": ("an integer of at least 0, below 2^63", 0, True, 2**63 - 1),
    "top_p": ("above 0 and at most 1", 0.0, False, 1.0),
    "min_p": ("0 to 1", 0.0, True, 1.0),
}


def _per_row(name: str, value: float | Tensor, rows: int, device: torch.device) -> Tensor:
    """`value` for each row, `[S]`: float32, top_k int64."""
    words = _RANGES[name][0]
    whole = name == "top_k"
    if isinstance(value, Tensor):
        if value.shape != (rows,) or value.device != device or whole == value.is_floating_point():
            raise ValueError(
                f"sample: {name} must be a number or [{rows}] on {device}, {words}; "
                f"got {value.dtype} {list(value.shape)} on {value.device}"
            )
        if value.is_cpu and not _in_range(name, value).all():
            raise ValueError(f"sample: {name} must be {words}, got {value.tolist()}")
        return value.to(torch.int64 if whole else torch.float32)
    fits = isinstance(value, int) if whole else isinstance(value, Real)
    if not fits or isinstance(value, bool) or not _in_range(name, value):
        raise ValueError(f"sample: {name} must be {words}, got {value!r}")
    return torch.full((rows,), value, dtype=torch.int64 if whole else torch.float32, device=device)


def _in_range(name: str, value: Any) -> Any:
    """Whether a number, or each of a tensor's, may be what `name` says."""
    _, low, with_low, high = _RANGES[name]
    fits = (value >= low if with_low else value > low) & (value <= high)
    return fits & ((value == 0) | (value >= LEAST_TEMPERATURE)) if name == "temperature" else fits


def _forward(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from posttrain.kernels.sample import sample_rows

        return sample_rows(logits, temperature, top_k, top_p, min_p, seeds, offsets)
    logits = logits if backend == "cuda" else logits.float()
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    parameters = [x.contiguous() for x in (temperature, top_k, top_p, min_p, seeds, offsets)]
    if backend == "cuda":
        return _cuda_forward(logits, parameters)
    tokens, logprobs = torch.empty_like(seeds), logits.new_empty(len(logits))
    _C.sample(
        logits.data_ptr(),
        logits.stride(0),
        *logits.shape,
        tuple(x.data_ptr() for x in parameters),
        tokens.data_ptr(),
        logprobs.data_ptr(),
        torch.get_num_threads(),
    )
    return tokens, logprobs


def _cuda_forward(logits: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    kernels = cuda_kernels(logits)
    tokens, logprobs = torch.empty_like(parameters[-1]), logits.new_empty(len(logits), dtype=torch.float32)
    workspace = logits.new_empty(kernels.cuda_sample_workspace(*logits.shape) // 4, dtype=torch.float32)
    with cuda_device(logits):
        kernels.cuda_sample(
            cuda_stream(logits),
            CUDA_DTYPES[logits.dtype],
            logits.data_ptr(),
            logits.stride(0),
            *logits.shape,
            tuple(x.data_ptr() for x in parameters),
            workspace.data_ptr(),
            tokens.data_ptr(),
            logprobs.data_ptr(),
        )
    return tokens, logprobs


def _fake(logits, temperature, top_k, top_p, min_p, seeds, offsets, backend):
    return torch.empty_like(seeds), logits.new_empty(len(logits), dtype=torch.float32)


_sample = define(
    "sample",
    "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, Tensor offsets, "
    "str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
)
