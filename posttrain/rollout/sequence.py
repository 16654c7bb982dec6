"""A sequence being generated: its tokens, its pages, and how far they are computed."""

from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from posttrain.rollout.pages import Digest
from posttrain.rollout.params import SamplingParams
from posttrain.rollout.text import TextStream


@dataclass(eq=False)
class Sequence:
    """One sample of one prompt.

    Attributes:
        prompt: index of its prompt in the call.
        sample: which of the prompt's completions.
        tokens: prompt and completion.
        start: tokens of the prompt.
        limit: most tokens, prompt included.
        params: how tokens are drawn.
        seed: of this sample, from `sample_seed`; with the number of a token it decides the draw.
        params_seed: what `seed` was made from.
        copies: samples that are still to be split off when the prompt is computed.
        kept: whether it keeps its pages when it is complete.
        pages: pages of the cache that hold its first tokens.
        computed: how many tokens have keys and values in them; the newest token has none yet.
        digests: of its full pages, as far as they were needed.
        logprobs: of the tokens drawn.
        top_logprobs: of the likeliest tokens at each place, if asked for.
        stream: its text so far, where that is watched.
        finish_reason: once it is complete.
    """

    prompt: int
    sample: int
    tokens: list[int]
    start: int
    limit: int
    params: SamplingParams
    seed: int
    params_seed: int = 0
    copies: int = 0
    kept: bool = False
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    digests: list[Digest] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    stream: TextStream | None = None
    finish_reason: str | None = None

    @property
    def drawn(self) -> int:
        """How many tokens were drawn."""
        return len(self.tokens) - self.start

    def split(self) -> list["Sequence"]:
        """The samples that are still to be split off; they go on from what is computed."""
        twins = []
        for number in range(self.sample + 1, self.sample + 1 + self.copies):
            seed = sample_seed(self.params_seed, self.tokens[: self.start], number)
            twin = Sequence(
                self.prompt, number, self.tokens.copy(), self.start, self.limit, self.params, seed, self.params_seed
            )
            twin.computed = self.computed
            twins.append(twin)
        self.copies = 0
        return twins


def sample_seed(seed: int, prompt: list[int], sample: int) -> int:
    """The seed of a sample: nothing else in the batch is part of it."""
    content = np.array([seed, sample, *prompt], np.int64).tobytes()
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little") >> 1
