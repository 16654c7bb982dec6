"""What the tests of SFT have in common: a short run on the CPU, and when two runs are the same."""

from pathlib import Path

from torch import Tensor

from posttrain import SFTConfig


def sft_config(output_dir: Path, **changes) -> SFTConfig:
    """4 steps of 8 sequences, all logged, nothing saved."""
    settings = {
        "output_dir": str(output_dir),
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "logging_steps": 1,
        "save_steps": 0,
        "gradient_checkpointing": False,
        "use_cpu": True,
    }
    return SFTConfig(**(settings | changes))


def assert_equivalent(losses: Tensor, others: Tensor) -> None:
    """50 steps have the same losses, by rule: each within 1e-3, in the mean within 1e-5."""
    difference = losses - others
    assert len(difference) == 50
    assert difference.abs().max() <= 1e-3
    assert difference.mean().abs() <= 1e-5
