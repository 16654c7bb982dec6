import pytest
import torch

from posttrain.train.config import ConfigError
from posttrain.train.schedule import learning_rate_factor, num_warmup_steps


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("num_warmup", [0, 1, 7])
def test_equals_transformers(schedule, num_warmup):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=num_warmup, num_training_steps=20)
    for step in range(20):
        assert learning_rate_factor(schedule, step, 20, num_warmup) == theirs.get_last_lr()[0]
        optimizer.step()
        theirs.step()


def test_warmup_is_a_number_of_steps_or_a_share():
    assert num_warmup_steps(0, 100) == 0
    assert num_warmup_steps(10, 100) == 10
    assert num_warmup_steps(0.05, 90) == 5
    assert num_warmup_steps(1, 90) == 1


def test_warmup_longer_than_the_run_never_reaches_the_peak():
    assert [learning_rate_factor("linear", step, 3, 6) for step in range(3)] == [0, 1 / 6, 2 / 6]


def test_unknown_schedule():
    with pytest.raises(ConfigError, match="'sawtooth'"):
        learning_rate_factor("sawtooth", 0, 1, 0)
