"""Run any other causal LM: every sequence by itself, with a cache of transformers' own.

Slow, but right for every architecture, and what a sequence gives can't depend on the others. Models that give no such
cache (Mamba) compute the whole sequence for every token.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.models.causal_lm import causal_lm
from posttrain.rollout.evaluating import evaluating
from posttrain.rollout.scheduler import Step
from posttrain.rollout.sequence import Sequence


class PlainRunner:
    """Logits of a step, for any causal LM."""

    shares = False
    bursts = False

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._caches: dict[Sequence, Any] = {}

    def begin(self) -> None:
        """Nothing: a call of the model reads its weights."""

    def release(self) -> None:
        """Forget all caches."""
        self._caches.clear()

    def run(self, step: Step) -> Tensor:
        """Logits `[n, V]` behind the n chunks after which a token is drawn."""
        causal = causal_lm(self._model)
        with evaluating(causal):
            return self._run(causal, step)

    def _run(self, causal: Any, step: Step) -> Tensor:
        device = causal.get_input_embeddings().weight.device
        rows = []
        for sequence, start, end in step.chunks:
            if start == 0:  # new, or started again
                self._caches.pop(sequence, None)
            cache = self._caches.get(sequence)
            known = {} if cache is None else {"past_key_values": cache}
            tokens = sequence.tokens[start if known else 0 : end]
            output = causal(input_ids=torch.tensor([tokens], device=device), use_cache=True, logits_to_keep=1, **known)
            self._caches[sequence] = getattr(output, "past_key_values", None)
            if end == len(sequence.tokens):
                rows.append(output.logits[0, -1])
        return torch.stack(rows) if rows else torch.empty(0, 1, device=device)

    def split(self, sequence: Sequence, twins: list[Sequence]) -> None:
        """`twins` go on from copies of the cache of `sequence`."""
        for twin in twins:
            self._caches[twin] = copy.deepcopy(self._caches[sequence])

    def drop(self, sequence: Sequence) -> None:
        """Forget the cache of `sequence`."""
        self._caches.pop(sequence, None)
