"""Sampling on a GPU (posttrain/ops/sample.py has the formulas).

A program owns a row. It finds the largest logit, then the sum of the weights, and draws the largest z + g of all
tokens. If that token doesn't stay, as the count and the weight of the tokens above it say, what stays lies above it,
and the next draw is among the tokens above: no sorting. Only a row with both top_k and top_p searches for a threshold,
bit by bit, since top_p is a share of the weight that top_k leaves.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from posttrain.kernels import sample_device as kernels
from posttrain.kernels.entry import Entry
from posttrain.ops.backend import cuda_device

BLOCK, WARPS = 1024, 8  # larger blocks spill a register on some architecture


def sample_rows(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    """(tokens, logprobs) as `posttrain.ops.sample` needs them."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    parameters = [x.contiguous() for x in (temperature, top_k, top_p, min_p, seeds, offsets)]
    tokens, logprobs = torch.empty_like(parameters[4]), logits.new_empty(len(logits), dtype=torch.float32)
    if len(logits):
        with cuda_device(logits):
            kernels.sample_kernel[(len(logits),)](
                logits, *parameters, tokens, logprobs, logits.stride(0), logits.shape[1], BLOCK=BLOCK, num_warps=WARPS
            )
    return tokens, logprobs


def ahead_of_time() -> Iterator[Entry]:
    """The kernel with its production block size, for tests/kernels/aot.py."""
    types = dict.fromkeys(("temperature", "top_p", "min_p", "logprobs"), "*fp32:16")
    types |= dict.fromkeys(("top_k", "seeds", "offsets", "tokens"), "*i64:16")
    for dtype in ("fp32", "bf16"):
        types |= {"logits": f"*{dtype}:16", "stride": "i32", "size": "i32"}
        signature = {name: types[name] for name in kernels.sample_kernel.arg_names if name != "BLOCK"}
        yield f"sample_kernel {dtype}", kernels.sample_kernel, signature, {"BLOCK": BLOCK}, {"num_warps": WARPS}
