"""Log-probabilities of given completions, by the packed forward that training uses.

Completions of a prompt, and whatever else begins alike, share it.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from posttrain.data import Example, PackedBatch
from posttrain.data.share import keep_apart, share_prefixes
from posttrain.models import token_logprobs
from posttrain.models.causal_lm import causal_lm
from posttrain.rollout.evaluating import evaluating

Pair = tuple[list[int], list[int]]  # tokens of a prompt and of a completion


def score(model: nn.Module, pairs: list[Pair], temperature: float, max_tokens: int) -> list[list[float]]:
    """Of each pair, the log-probability of every token of the completion, in forwards of up to `max_tokens` tokens.

    A pair that is longer has a forward of its own.
    """
    causal: Any = causal_lm(model)
    with evaluating(causal):
        if getattr(causal, "_posttrain_head_obstacle", None):
            return [_alone(causal, prompt, completion, temperature) for prompt, completion in pairs]
        return _packed(model, pairs, temperature, max_tokens, causal.config._attn_implementation == "posttrain")


def _packed(
    model: nn.Module, pairs: list[Pair], temperature: float, max_tokens: int, shared: bool
) -> list[list[float]]:
    examples = [
        Example(np.array(prompt + completion, np.int32), np.arange(len(prompt) + len(completion)) >= len(prompt))
        for prompt, completion in pairs
    ]
    sequences = [example.input_ids for example in examples]
    forest = share_prefixes(sequences) if shared else keep_apart(sequences)
    capacity = max([max_tokens, *map(len, sequences)])
    device = next(model.parameters()).device
    scores: list[list[float]] = [[] for _ in pairs]
    for members in forest.divide(capacity):
        batch = PackedBatch.lay_out([examples[i] for i in members], forest.select(members)).to(device)
        logprobs = token_logprobs(model, batch, temperature=temperature).logprob
        lengths = [len(pairs[i][1]) for i in members]
        for i, part in zip(members, logprobs.split(lengths), strict=True):
            scores[i] = part.tolist()
    return scores


def _alone(causal: Any, prompt: list[int], completion: list[int], temperature: float) -> list[float]:
    """Through the whole model, for a head that isn't known."""
    if not completion:
        return []
    device = causal.get_input_embeddings().weight.device
    logits = causal(input_ids=torch.tensor([prompt + completion], device=device), use_cache=False).logits[0]
    logprobs = (logits[len(prompt) - 1 : -1].float() / temperature).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(completion, device=device)[:, None])[:, 0].tolist()
