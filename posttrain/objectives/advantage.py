"""Advantages of completions: how much better each one is than the others of its prompt.

With rewards r_1 .. r_G of the completions of one prompt, each the weighted sum of what the reward functions say,

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)

(Shao et al., "DeepSeekMath", 2024, arXiv 2402.03300, GRPO), with the sample standard deviation of the group, of the
whole batch (Liu et al., "Tricks or traps?", 2025, arXiv 2508.08221), or without it (Liu et al., "Understanding
R1-Zero-like training", 2025, arXiv 2503.20783, Dr. GRPO: dividing favours prompts that are nearly always or never
solved).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SCALES = ("group", "batch", "none")
_EPSILON = 1e-4


class Advantages(NamedTuple):
    """What B completions are worth.

    Attributes:
        advantage: float64 `[B]`; 0 where no reward function applies or all of a group have the same reward.
        reward: float64 `[B]`, weighted sum of the rewards; NaN where none applies.
        metrics: reward, reward_std, frac_reward_zero_std.
    """

    advantage: Tensor
    reward: Tensor
    metrics: Mapping[str, Tensor]


def group_advantages(
    rewards: Tensor, num_generations: int, *, weights: Sequence[float] | None = None, scale_rewards: str = "group"
) -> Advantages:
    """Advantages within groups.

    Args:
        rewards: `[B, F]`, of F reward functions; NaN where one does not apply. The completions of a prompt follow each
            other.
        num_generations: completions of a prompt.
        weights: `[F]`, one for each reward function; 1 by default.
        scale_rewards: "group", "batch" or "none": whose standard deviation divides.

    Raises:
        ValueError: shapes that don't fit, or an unknown scale.
    """
    if rewards.ndim != 2 or num_generations < 1 or len(rewards) % num_generations:
        raise ValueError(
            f"group_advantages: rewards must be [B, F] with B a multiple of num_generations {num_generations}, "
            f"got {list(rewards.shape)}"
        )
    if weights is not None and len(weights) != rewards.shape[1]:
        raise ValueError(f"group_advantages: {len(weights)} weights for {rewards.shape[1]} reward functions")
    if scale_rewards not in SCALES:
        raise ValueError(f"group_advantages: scale_rewards must be one of {', '.join(SCALES)}, got {scale_rewards!r}")
    wide = rewards.double()
    each = wide if weights is None else wide * torch.tensor(weights, dtype=torch.float64)
    reward = each.nansum(1).masked_fill(each.isnan().all(1), math.nan)
    groups = reward.view(-1, num_generations)
    centred = groups - groups.nanmean(1, keepdim=True)
    centred = centred.masked_fill(_equal(groups), 0.0).nan_to_num(0.0)  # equal rewards have a rounded mean
    spread = _std(groups)
    if scale_rewards != "none":
        scale = spread[:, None] if scale_rewards == "group" else _std(reward[None])
        centred = centred / (scale + _EPSILON)
    metrics = {
        "reward": reward.nanmean(),
        "reward_std": _std(reward[None])[0],
        "frac_reward_zero_std": torch.isclose(spread, torch.zeros_like(spread)).double().mean(),
    }
    return Advantages(centred.flatten(), reward, metrics)


def _std(values: Tensor) -> Tensor:
    """Sample standard deviation `[R]` of the rows of `[R, C]`, of what isn't NaN; 0 for fewer than two values."""
    count = (~values.isnan()).sum(1)
    squares = (values - values.nanmean(1, keepdim=True)).square().nansum(1)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def _equal(groups: Tensor) -> Tensor:
    """bool `[R, 1]`: whether all that isn't NaN in a row is the same."""
    low = groups.nan_to_num(math.inf).amin(1, keepdim=True)
    high = groups.nan_to_num(-math.inf).amax(1, keepdim=True)
    return low >= high
