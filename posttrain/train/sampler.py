"""Sampler: completions of prompts, in one turn or, with an environment, in several.

Token in, token out: a later turn continues the very tokens of the turns before it. Draws depend on the seed, the prompt
and the number of the draw alone, so that what else is drawn changes nothing.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np

from posttrain.data import Example
from posttrain.data.prompts import Prompt
from posttrain.rollout import Completion, Engine, SamplingParams
from posttrain.train.environment import Environment


@dataclass
class Sample:
    """A completion of a prompt as it grows.

    Attributes:
        prompt: what it continues.
        token_ids: of all turns.
        drawn: for each token, whether the policy drew it; the environment's are not.
        logprobs: of the drawn tokens, as the sampler gave them.
        content: the same as a text or, for a chat, as messages.
        truncated: whether it has no end.
    """

    prompt: Prompt
    token_ids: list[int]
    drawn: list[bool]
    logprobs: list[float]
    content: Any
    truncated: bool = False

    @staticmethod
    def begin(prompt: Prompt) -> "Sample":
        """Nothing yet."""
        return Sample(prompt, [], [], [], [] if prompt.chat else "")

    def add_turn(self, completion: Completion, room: int) -> None:
        """What the policy said, at most `room` tokens of it."""
        tokens = completion.token_ids[:room]
        self.token_ids += tokens
        self.drawn += [True] * len(tokens)
        self.logprobs += completion.logprobs[:room]
        self.content += [{"role": "assistant", "content": completion.text}] if self.prompt.chat else completion.text
        self.truncated = completion.finish_reason == "length" or len(tokens) < len(completion.token_ids)

    def add_answer(self, tokens: Sequence[int], content: Any, room: int) -> None:
        """What the environment said; it takes a token at least to go on."""
        self.token_ids += tokens[:room]
        self.drawn += [False] * min(len(tokens), room)
        if self.prompt.chat and isinstance(content, str):
            content = [{"role": "user", "content": content}]
        elif not self.prompt.chat and not isinstance(content, str):
            content = "".join(message["content"] for message in content)
        self.content += content
        self.truncated = len(tokens) >= room

    def example(self, group: int, left_out: bool) -> Example:
        """Prompt and completion; the tokens that the policy drew are in the loss, unless it is left out."""
        ids = np.array(self.prompt.token_ids + self.token_ids, np.int32)
        mask = np.zeros(len(ids), np.bool_)
        if not left_out:
            mask[len(self.prompt.token_ids) :] = self.drawn
        return Example(ids, mask, group=group, origin=self.prompt.origin)


class Sampler:
    """Draws completions with the model that is being trained; all memory of it is given back in between.

    Args:
        model, tokenizer: of the policy.
        params: how tokens are drawn; `max_tokens` bounds a completion with all its turns.
        environment: what answers completions, or None.
        context: most tokens of a prompt with its completion, or None.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        params: SamplingParams,
        environment: Environment | None,
        context: int | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._params = params
        self._environment = environment
        self._context = context
        self._engine: Engine | None = None

    def __call__(self, prompts: Sequence[Prompt], count: int, seed: str) -> list[Sample]:
        """`count` completions of each prompt, in a row. The same `seed` and weights give the same ones."""
        if self._engine is None:
            self._engine = Engine(self._model, self._tokenizer)
        samples = [Sample.begin(prompt) for prompt in prompts for _ in range(count)]
        with self._engine:
            drawn = self._draw([prompt.token_ids for prompt in prompts], count, self._params.max_tokens, f"{seed} 0")
            completions = [completion for of_prompt in drawn for completion in of_prompt]
            for sample, completion in zip(samples, completions, strict=True):
                sample.add_turn(completion, self._params.max_tokens)
            if self._environment is not None:
                self._go_on(self._environment, samples, seed)
        return samples

    def _go_on(self, environment: Environment, samples: list[Sample], seed: str) -> None:
        """Let the environment answer and the policy go on, until nothing is left to say or no room to say it."""
        turn = 1
        while going := [sample for sample in samples if self._answered(environment, sample)]:
            longest = max(self._room(sample) for sample in going)
            drawn = self._draw([s.prompt.token_ids + s.token_ids for s in going], 1, longest, f"{seed} {turn}")
            for sample, (completion,) in zip(going, drawn, strict=True):
                sample.add_turn(completion, self._room(sample))
            samples = going
            turn += 1

    def _answered(self, environment: Environment, sample: Sample) -> bool:
        """Whether the environment has answered, and the policy may go on."""
        if sample.truncated:
            return False
        answer = environment.answer(sample.prompt.given, sample.content, sample.prompt.columns)
        if answer is None:
            return False
        sample.add_answer(*answer, self._room(sample))
        return not sample.truncated

    def _room(self, sample: Sample) -> int:
        """How many tokens may follow."""
        room = self._params.max_tokens
        if self._context is not None:
            room = min(room, self._context - len(sample.prompt.token_ids))
        return room - len(sample.token_ids)

    def _draw(self, prompts: list[list[int]], count: int, max_tokens: int, seed: str) -> list[list[Completion]]:
        """`count` completions of each of `prompts`; equal ones are drawn apart, since equal seeds give equal draws."""
        assert self._engine is not None
        seen: Counter[tuple[int, ...]] = Counter()
        rounds: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            rounds.setdefault(seen[tuple(prompt)], []).append(index)
            seen[tuple(prompt)] += 1
        found: list[list[Completion]] = [[] for _ in prompts]
        for number, members in rounds.items():
            digest = blake2b(f"{seed} {number}".encode(), digest_size=7).digest()
            params = replace(self._params, n=count, max_tokens=max_tokens, seed=int.from_bytes(digest, "little"))
            drawn = self._engine.generate([prompts[i] for i in members], params)
            for index, completions in zip(members, drawn, strict=True):
                found[index] = completions
        return found
