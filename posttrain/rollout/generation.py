"""One call of the engine: step after step until every sequence is complete.

A step of the scheduler may hold prompts, copy pages and let sequences join and leave. When it held nothing but one
token of each running sequence, nothing changes until one of them is complete, and not even then if nobody waits for its
place: those steps run as a *burst* (burst.py, graphs.py), without a look at single sequences.
"""

import math
import time
from collections.abc import Sequence as Many
from typing import Any

import torch
from torch import Tensor

from posttrain.ops import sample
from posttrain.rollout.scheduler import Scheduler, Step
from posttrain.rollout.sequence import Sequence
from posttrain.rollout.stats import Stats
from posttrain.rollout.text import TextStream

_LONG, _SHORT = 256, 64  # steps of a burst at most; the short one while others wait for pages


class Generation:
    """Draws tokens for the sequences of `scheduler`, with the logits of `runner`.

    Args:
        tokenizer: for texts that are watched.
        ends: the end-of-sequence tokens.
        streaming: whether the text of every sequence is watched.
    """

    def __init__(
        self, scheduler: Scheduler, runner: Any, tokenizer: Any, ends: frozenset[int], stats: Stats, streaming: bool
    ) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._tokenizer = tokenizer
        self._ends = ends
        self._stats = stats
        self._streaming = streaming
        self._failure: ValueError | None = None  # of a sequence without a distribution, once the others' are taken

    @property
    def going_on(self) -> bool:
        """Whether a sequence is left."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def advance(self) -> list[Sequence]:
        """A step, or a burst of them; the sequences that drew a token. Those that are complete have left.

        Raises `ValueError` if in the call before a sequence had no distribution to draw from.
        """
        if self._failure is not None:
            raise self._failure
        began = time.perf_counter()
        step = self.scheduler.next_step()
        drawing = self._step(step)
        self._stats.add(step, self.scheduler, time.perf_counter() - began)
        if not self._leave(drawing) and self._steady(step, drawing):
            drawing = self._burst(drawing)
            self._leave(drawing)
        return drawing

    def _steady(self, step: Step, drawing: list[Sequence]) -> bool:
        """Whether the next step will be like this one: all drew, with pages of their own, and none can join."""
        same = [chunk.sequence for chunk in step.chunks] == drawing == self.scheduler.running
        return same and self._runner.bursts and (not self.scheduler.waiting or step.decodes)

    def _step(self, step: Step) -> list[Sequence]:
        logits = self._runner.run(step)
        drawing: list[Sequence] = []
        rows: list[int] = []
        for chunk in step.chunks:
            chunk.sequence.computed = chunk.end
            if chunk.draws:
                row = rows[-1] + 1 if rows else 0
                twins = chunk.sequence.split()
                self.scheduler.split(chunk.sequence, twins)
                self._runner.split(chunk.sequence, twins)
                drawing += [chunk.sequence, *twins]
                rows += [row] * (1 + len(twins))
        if drawing:
            if len(rows) > len(logits):
                logits = logits[torch.tensor(rows, device=logits.device)]
            return self._draw(drawing, logits)
        return drawing

    def _leave(self, drawing: list[Sequence]) -> bool:
        """Let those that are complete leave; whether there were any."""
        complete = [sequence for sequence in drawing if sequence.finish_reason]
        for sequence in complete:
            self.scheduler.remove(sequence)
            self._runner.drop(sequence)
            if not self._runner.shares:  # its cache is gone, so all of it is computed again if it goes on
                self.scheduler.drop(sequence)
        return bool(complete)

    def _draw(self, sequences: list[Sequence], logits: Tensor) -> list[Sequence]:
        """A token for each of `sequences`; those that had a distribution."""
        device = logits.device
        tokens, logprobs = sample(
            logits.float() if logits.dtype == torch.float64 else logits,  # as a burst draws
            **_filters(sequences, device),
            seeds=torch.tensor([s.seed for s in sequences], device=device),
            offsets=torch.tensor([s.drawn for s in sequences], device=device),
        )
        asking = [row for row, sequence in enumerate(sequences) if sequence.params.logprobs]
        for row in asking:
            sequences[row].top_logprobs.append(_likeliest(logits[row], sequences[row]))
        drawn = zip(sequences, tokens.tolist(), logprobs.tolist(), strict=True)
        return [sequence for sequence, token, logprob in drawn if self._accept(sequence, token, logprob)]

    def _accept(self, sequence: Sequence, token: int, logprob: float) -> bool:
        """Append a token, and see whether the sequence ends there; False if it has no log-probability."""
        if math.isnan(logprob):
            self._fail(sequence)
            return False
        sequence.tokens.append(token)
        sequence.logprobs.append(logprob)
        if sequence.stream is None and (self._streaming or sequence.params.stop):
            sequence.stream = TextStream(self._tokenizer, sequence.params.stop)
        ended = token in self._ends and not sequence.params.ignore_eos
        if sequence.stream is not None:
            sequence.stream.add(token)
            ended = ended or sequence.stream.stopped
        if ended:
            sequence.finish_reason = "stop"
        elif len(sequence.tokens) >= sequence.limit:
            sequence.finish_reason = "length"
        return True

    def _burst(self, sequences: list[Sequence]) -> list[Sequence]:
        """Draw for all of `sequences`, which are all that run: until one is complete, if others wait for its place.

        Returns the sequences as they got done.
        """
        if any(s.stream is not None or s.params.logprobs for s in sequences):
            return sequences
        waiting = bool(self.scheduler.waiting)
        steps = self.scheduler.reserve_ahead(sequences, _SHORT if waiting else _LONG)
        if steps == 0:
            return sequences
        began = time.perf_counter()
        burst = self._runner.burst(sequences, steps, self._ends, until_one=waiting)
        if burst is None:
            return sequences
        while burst.advance() and not burst.some_complete:
            pass
        drawn, logprobs = burst.results()
        self._stats.add_burst([len(tokens) for tokens in drawn], self.scheduler, time.perf_counter() - began)
        for sequence, tokens, own in zip(sequences, drawn, logprobs, strict=True):
            count = next((place for place, logprob in enumerate(own) if math.isnan(logprob)), len(own))
            sequence.computed += count
            sequence.tokens += tokens[:count]
            sequence.logprobs += own[:count]
            if count < len(own):
                self._fail(sequence)
            elif tokens[-1] in self._ends and not sequence.params.ignore_eos:
                sequence.finish_reason = "stop"
            elif len(sequence.tokens) >= sequence.limit:
                sequence.finish_reason = "length"
        order = sorted(range(len(sequences)), key=lambda i: len(drawn[i]))
        return [sequences[i] for i in order]

    def _fail(self, sequence: Sequence) -> None:
        self._failure = self._failure or ValueError(
            f"the model gives no distribution (NaN or infinity among the logits) for prompt {sequence.prompt} "
            f"after {len(sequence.tokens)} tokens"
        )


def _filters(sequences: Many[Sequence], device: torch.device) -> dict[str, Any]:
    """temperature, top_k, top_p and min_p as `sample` takes them: numbers where all sequences agree."""
    result: dict[str, Any] = {}
    for name, kind in (("temperature", float), ("top_k", int), ("top_p", float), ("min_p", float)):
        values = [kind(getattr(sequence.params, name)) for sequence in sequences]
        same = all(value == values[0] for value in values)
        result[name] = values[0] if same else torch.tensor(values, device=device)
    return result


def _likeliest(logits: Tensor, sequence: Sequence) -> list[tuple[int, float]]:
    """The likeliest tokens of a row, with their log-probabilities."""
    params = sequence.params
    logprobs = (logits.double() / (params.temperature or 1.0)).log_softmax(-1)
    values, tokens = logprobs.topk(min(params.logprobs, len(logprobs)))
    return list(zip(tokens.tolist(), values.tolist(), strict=True))
