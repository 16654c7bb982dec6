"""What a call of the engine did, in numbers."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain.rollout.scheduler import Scheduler, Step


@dataclass
class Stats:
    """Of one call.

    Attributes:
        prompt_tokens: of the prompts of all samples.
        shared_tokens: those of them that weren't computed for the sample: found in the cache, or another sample's.
        prefill_tokens: computed in steps with pieces of prompts, tokens drawn there included.
        decode_tokens: computed in the other steps.
        prefill_seconds: of the steps with pieces of prompts.
        decode_seconds: of the others.
        batch_sizes: (steps, sequences in each), one after the other.
        peak_pages: most pages held at once.
        num_pages: of the cache.
        preempted: how often a sequence lost its pages to another.
    """

    prompt_tokens: int = 0
    shared_tokens: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    batch_sizes: list[tuple[int, int]] = field(default_factory=list)
    peak_pages: int = 0
    num_pages: int = 0
    preempted: int = 0

    def add(self, step: "Step", scheduler: "Scheduler", seconds: float) -> None:
        """Count a step of the scheduler."""
        if step.decodes:
            self.decode_tokens += step.num_tokens
            self.decode_seconds += seconds
        else:
            self.prefill_tokens += step.num_tokens
            self.prefill_seconds += seconds
        self._count(1, len(step.chunks))
        self.prompt_tokens, self.shared_tokens = scheduler.prompt_tokens, scheduler.shared_tokens
        self.preempted, self.peak_pages = scheduler.preempted, max(self.peak_pages, scheduler.held)

    def add_burst(self, drawn: list[int], scheduler: "Scheduler", seconds: float) -> None:
        """Count steps of which each sequence took the first so many, with one token each."""
        self.peak_pages = max(self.peak_pages, scheduler.held)
        self.decode_tokens += sum(drawn)
        self.decode_seconds += seconds
        before = 0
        for steps in sorted(set(drawn)):
            self._count(steps - before, sum(own >= steps for own in drawn))
            before = steps

    def _count(self, steps: int, size: int) -> None:
        if self.batch_sizes and self.batch_sizes[-1][1] == size:
            self.batch_sizes[-1] = (self.batch_sizes[-1][0] + steps, size)
        elif steps:
            self.batch_sizes.append((steps, size))

    @property
    def metrics(self) -> dict[str, float]:
        """Rates and shares, by the names that go into a log."""
        steps = sum(count for count, _ in self.batch_sizes)
        return {
            "rollout/prefill_tokens_per_second": _ratio(self.prefill_tokens, self.prefill_seconds),
            "rollout/decode_tokens_per_second": _ratio(self.decode_tokens, self.decode_seconds),
            "rollout/cache_use": _ratio(self.peak_pages, self.num_pages),
            "rollout/shared_prefix_rate": _ratio(self.shared_tokens, self.prompt_tokens),
            "rollout/batch_size": _ratio(sum(count * size for count, size in self.batch_sizes), steps),
            "rollout/preempted": float(self.preempted),
        }


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0
