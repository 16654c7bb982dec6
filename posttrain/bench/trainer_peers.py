"""Adapters to the training steps of others, as in peers.py.

The context has transformers' model, the padded batch with its labels and lengths, `logprobs`, which computes those of
the targets with a model, and `step`, which makes the whole step of a function of the log-probabilities.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from posttrain.bench.case import Function, Problem
from posttrain.bench.device import DEVICE, GPU
from posttrain.bench.model import twin


def compiled(problem: Problem) -> Function:
    """torch.compile of transformers' model."""
    context = problem.context
    torch._dynamo.reset()  # what was compiled for other shapes
    fast = torch.compile(context.model, dynamic=False)
    return context.step(lambda: context.logprobs(fast))


def trl(problem: Problem) -> Function:
    """TRL's fused head, from which its trainers have their log-probabilities, on the padded batch.

    Its faster settings: no activation checkpointing, nothing else asked of the head (the trainers also want entropies
    or hits), and no mask, since causal attention doesn't see padding on the right.
    """
    context = problem.context
    ones = torch.ones_like(context.rows)
    return _fused(problem, context.labels, input_ids=context.rows, attention_mask=ones)


def trl_padding_free(problem: Problem) -> Function:
    """The same with all sequences in one row, TRL's `padding_free`; by flash-attn 2, where a GPU has it."""
    context = problem.context
    ids, labels = (
        torch.cat([row[:length] for row, length in zip(padded, context.lengths, strict=True)])[None]
        for padded in (context.rows, context.labels)
    )
    positions = torch.cat([torch.arange(length, device=DEVICE) for length in context.lengths])[None]
    return _fused(problem, labels, input_ids=ids, position_ids=positions)


def _fused(problem: Problem, labels: Tensor, **inputs: Tensor) -> Function:
    from trl.trainer.utils import add_fused_lm_head

    model: Any = twin(problem.context.model)
    add_fused_lm_head(model)
    if GPU and "position_ids" in inputs and find_spec("flash_attn"):
        model.set_attn_implementation("flash_attention_2")
    wanted = labels[:, 1:] != -100
    return problem.context.step(lambda: model(**inputs, labels=labels, fused_lm_head=True).log_probs[wanted])
