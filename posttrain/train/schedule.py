"""The course of the learning rate, as a pure function of the step.

With S steps, W of them warm-up, step s = 0 .. S-1, and p = (s - W) / (S - W):

    s < W                        s / W
    linear                       1 - p
    cosine                       (1 + cos(pi p)) / 2
    constant_with_warmup         1
    constant                     1, without warm-up

as in `transformers.get_scheduler`.
"""

import math

from posttrain.train.config import ConfigError


def learning_rate_factor(schedule: str, step: int, num_steps: int, num_warmup: int) -> float:
    """What the peak learning rate is multiplied with in optimizer step `step` (counted from 0) of `num_steps`."""
    if schedule == "constant":
        return 1.0
    if step < num_warmup:
        return step / num_warmup
    num_decay = max(1, num_steps - num_warmup)
    if schedule == "linear":
        return max(0.0, (num_steps - step) / num_decay)
    if schedule == "cosine":
        progress = (step - num_warmup) / num_decay
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    if schedule == "constant_with_warmup":
        return 1.0
    raise ConfigError(f"unknown lr_scheduler_type {schedule!r}")


def num_warmup_steps(warmup_steps: float, num_steps: int) -> int:
    """Steps of warm-up: `warmup_steps` itself, or, below 1, that share of `num_steps` rounded up."""
    return int(warmup_steps) if warmup_steps >= 1 else math.ceil(num_steps * warmup_steps)
