"""Advantages within groups, against their closed form."""

import math

import pytest
import torch

from posttrain.objectives.advantage import group_advantages

NAN = math.nan


def advantages(rows: list, generations: int, **options) -> list[float]:
    return group_advantages(torch.tensor(rows), generations, **options).advantage.tolist()


def test_group_is_centred_and_scaled_by_its_own_deviation():
    found = advantages([[0.0], [1.0], [10.0], [14.0]], 2)
    one, two = 0.5 / (math.sqrt(0.5) + 1e-4), 2 / (math.sqrt(8) + 1e-4)
    assert found == pytest.approx([-one, one, -two, two], abs=1e-12)


def test_batch_and_no_scale():
    rewards = [[0.0], [1.0], [10.0], [14.0]]
    deviation = torch.tensor([0.0, 1, 10, 14], dtype=torch.float64).std().item() + 1e-4
    assert advantages(rewards, 2, scale_rewards="none") == pytest.approx([-0.5, 0.5, -2, 2])
    expected = [value / deviation for value in (-0.5, 0.5, -2, 2)]
    assert advantages(rewards, 2, scale_rewards="batch") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_have_exactly_no_advantage(scale):
    found = advantages([[0.1]] * 3 + [[0.0], [1.0], [0.5]], 3, scale_rewards=scale)
    assert found[:3] == [0.0, 0.0, 0.0] and found[3] < 0 < found[4]


def test_weights_and_rewards_that_do_not_apply():
    rewards = torch.tensor([[1.0, NAN], [0.0, 2.0], [NAN, NAN], [2.0, 1.0]])
    found = group_advantages(rewards, 4, weights=[2.0, 0.5], scale_rewards="none")
    assert found.reward.tolist() == pytest.approx([2.0, 1.0, NAN, 4.5], nan_ok=True)
    assert found.advantage.tolist() == pytest.approx([2 - 2.5, 1 - 2.5, 0, 4.5 - 2.5])
    assert found.metrics["reward"].item() == pytest.approx(2.5)
    assert found.metrics["reward_std"].item() == pytest.approx(torch.tensor([2.0, 1.0, 4.5]).std().item())


def test_share_of_groups_without_spread():
    found = group_advantages(torch.tensor([[1.0], [1.0], [0.0], [1.0]]), 2)
    assert found.metrics["frac_reward_zero_std"].item() == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 3}, r"multiple of num_generations 3, got \[4, 2\]"),
        ({"num_generations": 2, "weights": [1.0]}, "1 weights for 2 reward functions"),
        ({"num_generations": 2, "scale_rewards": "std"}, "got 'std'"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(4, 2), **options)
