"""Fixed rollouts of a tiny model, and the gradients that a trainer makes of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from posttrain.data import Example
from posttrain.objectives.policy import PolicyCounts
from posttrain.train.grpo import GRPOConfig, GRPOTrainer
from posttrain.train.rollouts import Packing, PolicyStep, Rollout

ADVANTAGES = [[1.2, -0.7, 0.1, -0.6], [0.0, 0.0, 0.0, 0.0], [-1.5, 0.5, 0.5, 0.5]]


def rollouts() -> list[Rollout]:
    """Three prompts (two long enough to be shared) with four completions each, and what was known of them."""
    draw = np.random.default_rng(0)
    found = []
    for group, (length, advantages) in enumerate(zip((24, 5, 19), ADVANTAGES, strict=True)):
        prompt = draw.integers(2, 258, length)
        for advantage in advantages:
            completion = draw.integers(2, 258, draw.integers(3, 12))
            ids = np.concatenate([prompt, completion]).astype(np.int32)
            mask = np.arange(len(ids)) >= length
            known = [(-5.5 + 0.8 * draw.standard_normal(len(completion))).astype(np.float32) for _ in range(3)]
            found.append(Rollout(Example(ids, mask, group=group), advantage, *known))
    return found


def trainer(model_dir: Path, output_dir: Path, **changes) -> GRPOTrainer:
    settings = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 12,
        "num_generations": 4,
        "max_completion_length": 12,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "save_steps": 0,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "temperature": 0.9,
    }
    rows = [{"prompt": f"Question {n}: {n} + {n} = ", "right": str(2 * n)} for n in range(6)]
    return GRPOTrainer(str(model_dir), vowels, GRPOConfig(**(settings | changes)), rows)


def vowels(prompts, completions, completion_ids, **columns) -> list[float]:
    """A reward that a random model gets now and then."""
    return [float(sum(text.count(vowel) for vowel in "aeiouAEIOU")) for text in completions]


def gradients(
    run: GRPOTrainer, given: Sequence[Rollout], *, max_tokens: int = 10_000, share: bool = True, mean_tokens=None
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """(gradients by parameter, metrics) of one optimizer step made of `given`."""
    tokens = sum(rollout.example.num_targets for rollout in given)
    counts = PolicyCounts(len(given), tokens, mean_tokens or tokens)
    batches, counts = run._prepare(Packing(max_tokens, share, run._objective.only_policy).batches(given), counts)
    step = PolicyStep(batches, tokens, tokens, tokens, counts=counts)
    run.model.train()
    run.model.zero_grad()
    metrics: dict[str, float] = {}
    for batch in batches:
        loss = run._loss(run.model, batch, step)
        if loss.value.requires_grad:
            loss.value.backward()
        for name, value in loss.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value.item()
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}, metrics


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Each gradient is within `tolerance` of the other one's norm."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name
