"""What is asked of the engine, and what comes back."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from posttrain.ops.sample import LEAST_TEMPERATURE


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn.

    Attributes:
        n: completions of each prompt.
        temperature: divides the logits; 0 takes the most likely token. Others are at least 1e-6.
        top_k: only the k most likely tokens; 0 for all.
        top_p: only the most likely tokens that together have this probability.
        min_p: only tokens at least this share as likely as the most likely one.
        max_tokens: most tokens of a completion.
        stop: texts at which a completion ends; they are not part of its text.
        seed: -2^63 to 2^63 - 1; the same seed gives a prompt the same completions, whatever else is generated (by the
            models of which docs/rollout.md says so under "Exactness"); None draws one from PyTorch's generator.
        ignore_eos: go on after an end-of-sequence token.
        logprobs: how many of the likeliest tokens to report at each place, besides the one drawn.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 256
    stop: str | Sequence[str] = ()
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: int = 0

    def __post_init__(self) -> None:
        one = isinstance(self.stop, str) or not isinstance(self.stop, Iterable)
        object.__setattr__(self, "stop", (self.stop,) if one else tuple(self.stop))
        for name in ("n", "top_k", "max_tokens", "logprobs"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or not 0 <= int(value) < 2**63:
                raise ValueError(f"{name} must be an integer of at least 0, below 2^63, got {value!r}")
        for name in ("temperature", "top_p", "min_p"):
            if not isinstance(getattr(self, name), Real):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")
        large_enough = self.temperature == 0 or self.temperature >= LEAST_TEMPERATURE
        if not (large_enough and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature must be 0, or finite and at least {LEAST_TEMPERATURE}, got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise ValueError(f"stop must be texts that aren't empty, got {self.stop!r}")
        if self.seed is not None and not (isinstance(self.seed, Integral) and -(2**63) <= int(self.seed) < 2**63):
            raise ValueError(f"seed must be an integer from -2^63 to 2^63 - 1 or None, got {self.seed!r}")


@dataclass(frozen=True)
class Completion:
    """One completion of a prompt.

    Attributes:
        token_ids: what was drawn, an end-of-sequence token and the tokens of a stop text included.
        text: the tokens decoded without special tokens, up to the stop text.
        logprobs: of each token, its log-probability under softmax(logits / temperature) over the whole vocabulary,
            before top-k, top-p and min-p; at temperature 0, of the logits as they are.
        finish_reason: "stop" for an end-of-sequence token or a stop text, "length" for max_tokens or the model's
            last position.
        top_logprobs: of each place the (token, log-probability) of the likeliest, if `logprobs` asked for them.
    """

    token_ids: list[int]
    text: str
    logprobs: list[float]
    finish_reason: str
    top_logprobs: list[list[tuple[int, float]]] | None = None


@dataclass(frozen=True)
class Piece:
    """What a step of `Engine.stream` added to a completion.

    Attributes:
        prompt: index of the prompt.
        sample: which of its n completions.
        text: new text; characters whose bytes aren't complete, and what may become a stop text, wait.
        token_ids: the new tokens.
        logprobs: of the new tokens.
        completion: the whole, with the last piece.
    """

    prompt: int
    sample: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    completion: Completion | None = None
