"""The engine: generation with the modules that are being trained."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.models.causal_lm import causal_lm
from posttrain.ops import sample
from posttrain.rollout.cache import KVCache, free_memory, page_bytes
from posttrain.rollout.paged import PagedRunner, layer_shapes
from posttrain.rollout.pages import PagePool
from posttrain.rollout.params import Completion, SamplingParams
from posttrain.rollout.plain import PlainRunner
from posttrain.rollout.prompts import encode_all
from posttrain.rollout.scheduler import Scheduler
from posttrain.rollout.sequence import Sequence as Sample
from posttrain.rollout.sequence import sample_seed
from posttrain.rollout.text import TextStream, decode

OnFinish = Callable[[int, list[Completion]], None]


class Engine:
    """Generates with `model` as it is: its weights, its adapters, its device, nothing copied.

    Args:
        model: a causal LM of transformers, or one wrapped by PEFT; prepared ones are fast.
        tokenizer: the model's.
        memory: for keys and values, in bytes, or as a share of what is free at the start.
        page_size: tokens of a page, a power of two of at least 8.
        max_sequences: most sequences in a step.
        max_tokens_per_step: most tokens in a step; prompts are read in pieces that fit.
        context_length: most tokens of a sequence; by default the model's `max_position_embeddings`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        memory: int | float = 0.5,
        page_size: int = 16,
        max_sequences: int = 256,
        max_tokens_per_step: int = 2048,
        context_length: int | None = None,
    ) -> None:
        causal = causal_lm(model)
        config = causal.config.get_text_config()
        self.model = model
        self.tokenizer = tokenizer
        self.context_length = context_length or getattr(config, "max_position_embeddings", None)
        self._page_size = page_size
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens_per_step
        self._eos = _eos_tokens(causal, tokenizer)
        self._runner: Any = PlainRunner(model)
        self._cache: KVCache | None = None
        num_pages = 1 << 40
        obstacle = getattr(causal, "_posttrain_head_obstacle", None)
        if config._attn_implementation == "posttrain" and obstacle is None:
            weight = causal.get_input_embeddings().weight
            with _evaluating(causal):
                shapes = layer_shapes(model)
            num_bytes = int(memory * free_memory(weight.device)) if isinstance(memory, float) else memory
            num_pages = num_bytes // page_bytes(shapes, page_size, weight.dtype)
            if self.context_length is not None:
                num_pages = min(num_pages, max_sequences * -(-self.context_length // page_size))
            self._cache = KVCache(shapes, num_pages, page_size, weight.dtype, weight.device)
            self._runner = PagedRunner(model, self._cache)
        self._pool = PagePool(num_pages, page_size)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give all memory back; the next `generate` takes it again."""
        self._pool.forget()
        if self._cache is not None:
            self._cache.release()

    def generate(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | None = None,
        *,
        on_finish: OnFinish | None = None,
    ) -> list[list[Completion]]:
        """`params.n` completions of every prompt, in the order of the prompts.

        Args:
            prompts: texts, lists of token ids or lists of chat messages.
            params: how tokens are drawn.
            on_finish: called with the index of each prompt that is done and its completions, as they get done.

        Raises:
            ValueError: a prompt that can't be used, by its number, before anything is generated.
        """
        params = params or SamplingParams()
        samples = self._samples(encode_all(self.tokenizer, prompts), params)
        results: list[list[Completion | None]] = [[None] * params.n for _ in prompts]
        for finished in self._run(samples):
            completions: Any = results[finished.prompt]
            completions[finished.sample] = self._completion(finished)
            if on_finish is not None and None not in completions:
                on_finish(finished.prompt, completions)
        return results  # type: ignore[return-value]

    def _samples(self, prompts: list[list[int]], params: SamplingParams) -> list[Sample]:
        """The first sample of every prompt, from which the others will split off."""
        drawn = torch.randint(2**62, (len(prompts),)).tolist() if params.seed is None else [params.seed] * len(prompts)
        samples = []
        for index, (tokens, seed) in enumerate(zip(prompts, drawn, strict=True)):
            room = self._room(len(tokens), f"prompt {index}")
            limit = len(tokens) + min(params.max_tokens, room)
            samples.append(Sample(index, 0, tokens, len(tokens), limit, params, seed, copies=params.n - 1))
        return samples if params.n else []

    def _room(self, length: int, name: str) -> int:
        """How many tokens may follow `length` tokens."""
        if self.context_length is not None and length > self.context_length:
            raise ValueError(f"{name} has {length} tokens; the context has {self.context_length}")
        pages = self._pool.num_pages * self._page_size
        if length >= pages:
            raise ValueError(f"{name} has {length} tokens; the cache holds {pages}: give the engine more memory")
        return min(self.context_length or pages, pages) - length

    def _run(self, samples: list[Sample]) -> Iterator[Sample]:
        """Generate; yields every sample once it is complete."""
        scheduler = Scheduler(self._pool, self._max_sequences, self._max_tokens, self._runner.shares)
        for first in samples:
            if first.limit == first.start:
                yield from self._nothing(first)
            else:
                scheduler.waiting.append(first)
        try:
            self._runner.begin()
            while scheduler.waiting or scheduler.running:
                yield from self._step(scheduler)
        finally:
            scheduler.clear()
            self._pool.forget()

    def _nothing(self, first: Sample) -> Iterator[Sample]:
        """Samples that may have no token."""
        for sample_ in (first, *self._twins(first)):
            sample_.finish_reason = "length"
            yield sample_

    def _twins(self, first: Sample) -> list[Sample]:
        twins = []
        for number in range(1, first.copies + 1):
            twin = Sample(first.prompt, number, first.tokens.copy(), first.start, first.limit, first.params, first.seed)
            twin.computed = first.computed
            twins.append(twin)
        first.copies = 0
        return twins

    def _step(self, scheduler: Scheduler) -> list[Sample]:
        """One step; the samples it completed."""
        step = scheduler.next_step()
        with _evaluating(causal_lm(self.model)):
            logits = self._runner.run(step)
            for chunk in step.chunks:
                chunk.sequence.computed = chunk.end
            drawing = []
            rows = []
            for row, chunk in enumerate(chunk for chunk in step.chunks if chunk.draws):
                twins = self._twins(chunk.sequence)
                scheduler.split(chunk.sequence, twins)
                self._runner.split(chunk.sequence, twins)
                drawing += [chunk.sequence, *twins]
                rows += [row] * (1 + len(twins))
            if not drawing:
                return []
            logits = logits if len(rows) == len(logits) else logits[torch.tensor(rows, device=logits.device)]
            self._draw(drawing, logits)
        finished = [one for one in drawing if one.finish_reason]
        for one in finished:
            scheduler.remove(one)
            self._runner.drop(one)
        return finished

    def _draw(self, samples: list[Sample], logits: Tensor) -> None:
        params = samples[0].params
        device = logits.device
        tokens, logprobs = sample(
            logits,
            temperature=float(params.temperature),
            top_k=int(params.top_k),
            top_p=float(params.top_p),
            min_p=float(params.min_p),
            seeds=torch.tensor([sample_seed(s.seed, s.tokens[: s.start], s.sample) for s in samples], device=device),
            offsets=torch.tensor([s.drawn for s in samples], device=device),
        )
        for one, token, logprob in zip(samples, tokens.tolist(), logprobs.tolist(), strict=True):
            if logprob != logprob:
                raise ValueError(f"the model gives no distribution (NaN or infinity) for prompt {one.prompt}")
            self._accept(one, token, logprob)

    def _accept(self, one: Sample, token: int, logprob: float) -> None:
        """Append a token to a sample, and see whether it ends there."""
        one.tokens.append(token)
        one.logprobs.append(logprob)
        if one.params.stop and one.stream is None:
            one.stream = TextStream(self.tokenizer, one.params.stop)
        if one.stream is not None:
            one.stream.add(token)
        if (token in self._eos and not one.params.ignore_eos) or (one.stream is not None and one.stream.stopped):
            one.finish_reason = "stop"
        elif len(one.tokens) >= one.limit:
            one.finish_reason = "length"

    def _completion(self, one: Sample) -> Completion:
        tokens = one.tokens[one.start :]
        text = one.stream.text if one.stream is not None else decode(self.tokenizer, tokens)
        return Completion(tokens, text, one.logprobs, one.finish_reason or "length")


def _eos_tokens(causal: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a completion: of the model's generation config and of the tokenizer."""
    of_model = getattr(causal.generation_config, "eos_token_id", None)
    every = [*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id]
    return frozenset(token for token in every if token is not None)


@contextmanager
def _evaluating(causal: Any) -> Iterator[None]:
    """No gradient and no dropout, and afterwards every module in the mode it was in."""
    training = [module for module in causal.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
