"""The engine: generation with the modules that are being trained."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from posttrain.models.causal_lm import causal_lm
from posttrain.rollout.cache import KVCache, free_memory, page_bytes
from posttrain.rollout.generation import Generation
from posttrain.rollout.paged import PagedRunner, layer_shapes
from posttrain.rollout.pages import PagePool
from posttrain.rollout.params import Completion, Piece, SamplingParams
from posttrain.rollout.plain import PlainRunner
from posttrain.rollout.progress import show
from posttrain.rollout.prompts import check_tokens, encode, encode_all, encode_text
from posttrain.rollout.scheduler import Scheduler
from posttrain.rollout.scoring import score
from posttrain.rollout.sequence import Sequence as Branch
from posttrain.rollout.sequence import sample_seed
from posttrain.rollout.stats import Stats
from posttrain.rollout.text import decode

OnFinish = Callable[[int, list[Completion]], None]
Params = SamplingParams | Sequence[SamplingParams]


class Engine:
    """Generates with `model` as it is: its weights, its adapters, its device. Only linear layers of up to 64 MiB in
    all are copied, for the time of a call, as the processor reads them fastest.

    Use it as a context, or call `release`, to give the memory for keys and values back.

    Args:
        model: a causal LM of transformers, or one wrapped by PEFT; prepared ones are fast.
        tokenizer: the model's.
        memory: for keys and values, in bytes, or as a share of what is free at the start.
        page_size: tokens of a page, a power of two of at least 8.
        max_sequences: most sequences in a step.
        max_tokens_per_step: most tokens in a step; prompts are read in pieces that fit.
        context_length: most tokens of a sequence; by default the model's `max_position_embeddings`.
        keep_prefixes: whether later calls find what earlier ones computed. Only for weights that don't change.

    Attributes:
        end_tokens: the tokens that end a completion, of the model's generation config and of the tokenizer.
        stats: what the last call did, in numbers.
        finished: of the last call of `generate`, the completions of each prompt that is done, also after an error.

    Raises:
        ValueError: numbers that make no sense.
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
        keep_prefixes: bool = False,
    ) -> None:
        _check(memory, page_size, max_sequences, max_tokens_per_step, context_length)
        causal = causal_lm(model)
        config = causal.config.get_text_config()
        self.model = model
        self.tokenizer = tokenizer
        self.context_length = context_length or getattr(config, "max_position_embeddings", None)
        self.stats = Stats()
        self.finished: dict[int, list[Completion]] = {}
        self._size = len(causal.get_input_embeddings().weight)  # tokens that the model embeds
        self._page_size = page_size
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens_per_step
        self._keep_prefixes = keep_prefixes
        self.end_tokens = _end_tokens(causal, tokenizer)
        self._branches: list[Branch] = []
        self._running = 0
        obstacle = getattr(causal, "_posttrain_head_obstacle", None)
        paged = config._attn_implementation == "posttrain" and obstacle is None
        self._cache = self._new_cache(memory) if paged else None
        self._runner: Any = PagedRunner(model, self._cache) if self._cache is not None else PlainRunner(model)
        self._pool = PagePool(1 << 40 if self._cache is None else self._cache.num_pages, page_size)

    def _new_cache(self, memory: int | float) -> KVCache:
        weight = causal_lm(self.model).get_input_embeddings().weight
        shapes = layer_shapes(self.model)
        num_bytes = int(memory * free_memory(weight.device)) if isinstance(memory, float) else memory
        num_pages = num_bytes // page_bytes(shapes, self._page_size, weight.dtype)
        num_pages -= weight.device.type == "cuda"  # for the spare page, which on a CPU nobody touches
        if self.context_length is not None:
            num_pages = min(num_pages, self._max_sequences * -(-self.context_length // self._page_size))
        return KVCache(shapes, num_pages, self._page_size, weight.dtype, weight.device)

    @property
    def cache_tokens(self) -> int:
        """Most tokens whose keys and values there is room for."""
        return self._pool.num_pages * self._page_size

    @property
    def pages_held(self) -> int:
        """Pages that sequences hold: between calls, those of open sequences."""
        return self._pool.held

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give all memory back; the next call takes it again, and computes again what branches need.

        Raises `ValueError` while a stream is open.
        """
        if self._running:
            raise ValueError("the engine is generating: close its stream first")
        for branch in self._branches:
            self._forget(branch)
        self._pool.forget()
        self._runner.release()
        if self._cache is not None:
            self._cache.release()

    def generate(
        self,
        prompts: Sequence[Any],
        params: Params | None = None,
        *,
        on_finish: OnFinish | None = None,
        progress: bool = False,
    ) -> list[list[Completion]]:
        """`params.n` completions of every prompt, in the order of the prompts.

        Args:
            prompts: texts, lists of token ids or lists of chat messages.
            params: how tokens are drawn, or one for each prompt.
            on_finish: called with the index of each prompt that is done and its completions, as they get done.
            progress: show on a terminal how many prompts are done, and how fast tokens are drawn.

        Raises:
            ValueError: a prompt that can't be used, by its number, before anything is generated. Whatever ends a call
                early (an error of `on_finish`, Ctrl-C), what is done is in `finished`, and no page stays held.
        """
        tokens = encode_all(self.tokenizer, prompts, self._size)
        every = _each(params, len(tokens))
        firsts = self._firsts(tokens, every)
        self.finished = finished = {}  # `on_finish` may generate, too
        with show(len(tokens)) if progress else nullcontext() as bar:
            for index, completions in self._prompts_done(firsts, every):
                finished[index] = completions
                if on_finish is not None:
                    try:
                        on_finish(index, completions)
                    finally:
                        self.finished = finished
                if bar is not None:
                    bar.report(len(finished), self.stats)
        return [finished[index] for index in range(len(tokens))]

    def _prompts_done(
        self, firsts: list[Branch], every: list[SamplingParams]
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Index and completions of every prompt, as they get done."""
        yield from ((index, []) for index, params in enumerate(every) if params.n == 0)
        parts: list[dict[int, Completion]] = [{} for _ in every]
        for branch in self._draws(firsts, streaming=False):
            if branch.finish_reason:
                part = parts[branch.prompt]
                part[branch.sample] = self._completion(branch)
                if len(part) == every[branch.prompt].n:
                    yield branch.prompt, [part[sample] for sample in range(len(part))]

    def stream(self, prompts: Sequence[Any], params: Params | None = None) -> Iterator[Piece]:
        """The same, as it is drawn: a `Piece` for every token, of all completions as they come.

        The last piece of a completion holds it whole. Closing the iterator ends the generation. Arguments and errors
        are as of `generate`.
        """
        tokens = encode_all(self.tokenizer, prompts, self._size)
        firsts = self._firsts(tokens, _each(params, len(tokens)))
        return self._pieces(firsts)

    def _pieces(self, firsts: list[Branch]) -> Iterator[Piece]:
        for branch in self._draws(firsts, streaming=True):
            new = slice(len(branch.tokens) - 1, None) if branch.drawn else slice(0, 0)
            stream, last = branch.stream, branch.finish_reason is not None
            if stream is not None and last:
                stream.close()
            text = "" if stream is None else stream.rest() if last else stream.take()
            whole = self._completion(branch) if last else None
            logprobs = branch.logprobs[-1:]
            yield Piece(branch.prompt, branch.sample, text, branch.tokens[new], logprobs, whole)

    def score(
        self, prompts: Sequence[Any], completions: Sequence[Sequence[Any]], *, temperature: float = 1.0
    ) -> list[list[list[float]]]:
        """Log-probabilities of the tokens of given completions, as training computes them.

        Args:
            prompts: as of `generate`.
            completions: for each prompt a list of `Completion`s, lists of token ids or texts.
            temperature: divides the logits; 0 leaves them as they are.

        Returns:
            For each prompt, for each of its completions, the log-probability of every token under
            softmax(logits / temperature).
        """
        if len(completions) != len(prompts):
            raise ValueError(f"score: {len(prompts)} prompts need a list of completions each, got {len(completions)}")
        pairs, counts = [], []
        encoded = encode_all(self.tokenizer, prompts, self._size)
        for index, (prompt, own) in enumerate(zip(encoded, completions, strict=True)):
            if isinstance(own, str | Completion):
                raise ValueError(f"score: the completions of prompt {index} must be a list, got {type(own).__name__}")
            counts.append(len(own))
            pairs += [(prompt, self._tokens(completion, f"a completion of prompt {index}")) for completion in own]
        scores = iter(score(self.model, pairs, temperature or 1.0, self._max_tokens))
        return [[next(scores) for _ in range(count)] for count in counts]

    def logprob_difference(
        self, prompts: Sequence[Any], results: Sequence[Sequence[Completion]], *, temperature: float = 1.0
    ) -> dict[str, float]:
        """How far the log-probabilities of what `generate` gave are from those of training, by metric name."""
        scores = self.score(prompts, results, temperature=temperature)
        pairs = zip(chain.from_iterable(results), chain.from_iterable(scores), strict=True)
        differences = [abs(a - b) for one, scored in pairs for a, b in zip(one.logprobs, scored, strict=True)]
        name = "sampling/sampling_logp_difference"
        mean = sum(differences) / max(len(differences), 1)
        return {f"{name}/mean": mean, f"{name}/max": max(differences, default=0.0)}

    def _tokens(self, completion: Any, name: str) -> list[int]:
        if isinstance(completion, Completion):
            tokens = completion.token_ids
        elif isinstance(completion, str):
            tokens = encode_text(self.tokenizer, completion, name, add_special_tokens=False)
        else:
            return encode(self.tokenizer, completion, name, self._size) if len(completion) else []
        check_tokens(tokens, name, self._size)
        return tokens

    def open(self, prompt: Any) -> Branch:
        """A sequence to draw from again and again with `grow`; it keeps its pages until `close`.

        Its keys and values are those of the weights they were computed with: call `release` when weights change.
        """
        tokens = encode(self.tokenizer, prompt, "the prompt", self._size)
        self._room(len(tokens), "the prompt")
        branch = Branch(len(self._branches), 0, tokens, len(tokens), len(tokens), SamplingParams(), 0, kept=True)
        self._branches.append(branch)
        return branch

    def fork(self, sequence: Branch) -> Branch:
        """Another sequence that goes on from where an open one is; what is computed is shared, not copied."""
        self._check_open([sequence])
        [twin] = replace(sequence, copies=1).split()
        twin.kept, twin.finish_reason = True, sequence.finish_reason
        twin.pages, twin.digests = sequence.pages.copy(), sequence.digests.copy()
        for page in twin.pages:
            self._pool.hold(page)
        self._branches.append(twin)
        return twin

    def append(self, sequence: Branch, tokens: Sequence[int] | str) -> None:
        """Put tokens, or a text, behind an open sequence: what a tool or a user says next."""
        self._check_open([sequence])
        new = self._tokens(tokens, "what is appended")
        self._room(len(sequence.tokens) + len(new), "the sequence")
        sequence.tokens += new

    def grow(self, sequences: Sequence[Branch], params: SamplingParams | None = None) -> list[Completion]:
        """Draw up to `params.max_tokens` more tokens for each of the open `sequences`; what each of them drew.

        With `params.seed`, the seed, a sequence's tokens and its place in the list decide. Raises `ValueError` for
        sequences that aren't open or given twice, and `params.n` other than 1; after any error the sequences are as
        they were.
        """
        params = params or SamplingParams()
        self._check_open(sequences)
        if params.n != 1 or len({id(one) for one in sequences}) < len(sequences):
            raise ValueError(f"grow takes each sequence once and n=1 (fork them for more), got n={params.n}")
        drawn = torch.randint(2**62, (len(sequences),)).tolist()
        for place, (one, other) in enumerate(zip(sequences, drawn, strict=True)):
            length = len(one.tokens)
            one.prompt, one.start, one.params, one.finish_reason, one.stream = place, length, params, None, None
            one.limit = length + min(params.max_tokens, self._room(length, f"sequence {place}"))
            one.logprobs, one.top_logprobs = [], []
            one.seed = sample_seed(other if params.seed is None else int(params.seed), one.tokens, place)
        try:
            for _ in self._draws(list(sequences), streaming=False):
                pass
        except BaseException:
            for one in sequences:
                self._forget(one)
                del one.tokens[one.start :]
                del one.digests[one.start // self._page_size :]
            raise
        return [self._completion(one) for one in sequences]

    def close(self, sequence: Branch) -> None:
        """Give up an open sequence."""
        self._check_open([sequence])
        self._forget(sequence)
        self._branches.remove(sequence)

    def _forget(self, branch: Branch) -> None:
        self._pool.drop(branch.pages)
        branch.pages, branch.computed = [], 0

    def _check_open(self, sequences: Sequence[Branch]) -> None:
        if not all(any(one is branch for branch in self._branches) for one in sequences):
            raise ValueError("the sequence isn't open: it comes from engine.open or engine.fork and isn't closed yet")

    def _firsts(self, prompts: list[list[int]], every: list[SamplingParams]) -> list[Branch]:
        """The first sample of every prompt, from which the others split off."""
        drawn = torch.randint(2**62, (len(prompts),)).tolist()
        firsts = []
        for index, (tokens, params, other) in enumerate(zip(prompts, every, drawn, strict=True)):
            room = self._room(len(tokens), f"prompt {index}")
            if params.n:
                limit = len(tokens) + min(params.max_tokens, room)
                seed = other if params.seed is None else int(params.seed)
                own = sample_seed(seed, tokens, 0)
                firsts.append(Branch(index, 0, tokens, len(tokens), limit, params, own, seed, copies=params.n - 1))
        return firsts

    def _room(self, length: int, name: str) -> int:
        """How many tokens may follow `length` tokens."""
        if self.context_length is not None and length > self.context_length:
            raise ValueError(f"{name} has {length} tokens, more than the {self.context_length} of the context")
        most = self.cache_tokens
        if length >= most:
            raise ValueError(f"{name} has {length} tokens, and the cache holds {most}: give the engine more memory")
        return min(self.context_length or most, most) - length

    def _draws(self, branches: list[Branch], streaming: bool) -> Iterator[Branch]:
        """Generate; sequences whenever they drew tokens, with those that may have none first."""
        waiting = []
        for branch in branches:
            if branch.limit > len(branch.tokens):
                waiting.append(branch)
                continue
            for one in (branch, *branch.split()):
                one.finish_reason = "length"
                yield one
        if waiting:
            yield from self._run(waiting, streaming)

    def _run(self, branches: list[Branch], streaming: bool) -> Iterator[Branch]:
        self.stats = Stats(num_pages=self._pool.num_pages)
        idle = [branch for branch in self._branches if branch not in branches]
        shares = self._runner.shares
        scheduler = Scheduler(self._pool, self._max_sequences, self._max_tokens, shares, idle)
        scheduler.waiting.extend(branches)
        generation = Generation(scheduler, self._runner, self.tokenizer, self.end_tokens, self.stats, streaming)
        keep, interrupted = self._keep_prefixes and shares, False
        self._running += 1
        try:
            self._runner.begin()
            while generation.going_on:
                yield from generation.advance()
        except BaseException as error:
            keep = False  # pages may be filed whose content was never computed
            interrupted = not isinstance(error, GeneratorExit)
            raise
        finally:
            self._running -= 1
            try:
                for sequence in (*scheduler.running, *scheduler.waiting):
                    self._runner.drop(sequence)
                scheduler.clear()
                if not keep:
                    self._pool.forget()
            except BaseException:
                interrupted = True
                raise
            finally:
                if interrupted and not self._running:
                    self._start_anew()

    def _start_anew(self) -> None:
        """Count pages from the beginning: Ctrl-C may have come in the middle of counting."""
        for branch in self._branches:
            branch.pages, branch.computed = [], 0
        self._pool = PagePool(self._pool.num_pages, self._page_size)

    def _completion(self, branch: Branch) -> Completion:
        tokens = branch.tokens[branch.start :]
        if branch.stream is not None:
            branch.stream.close()
        text = branch.stream.text if branch.stream is not None else decode(self.tokenizer, tokens)
        top = branch.top_logprobs if branch.params.logprobs else None
        return Completion(tokens, text, branch.logprobs, branch.finish_reason or "length", top)


def _each(params: Params | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ValueError(f"params must be one for all or one for each of the {count} prompts, got {len(params)}")
    return list(params)


def _check(
    memory: int | float, page_size: int, max_sequences: int, max_tokens_per_step: int, context_length: int | None
) -> None:
    if memory <= 0 or (isinstance(memory, float) and memory > 1):
        raise ValueError(f"memory must be bytes, or a share between 0.0 and 1.0 of what is free; got {memory!r}")
    if page_size < 8 or page_size & (page_size - 1):
        raise ValueError(f"page_size must be a power of two of at least 8, got {page_size}")
    for name, value in (("max_sequences", max_sequences), ("max_tokens_per_step", max_tokens_per_step)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if context_length is not None and context_length < 1:
        raise ValueError(f"context_length must be at least 1, got {context_length}")


def _end_tokens(causal: Any, tokenizer: Any) -> frozenset[int]:
    of_model = getattr(causal.generation_config, "eos_token_id", None)
    every = [*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id]
    return frozenset(token for token in every if token is not None)
