"""The same model on the same pairs has the same losses, metrics and gradients in TRL's DPOTrainer."""

from pathlib import Path

import pytest
import torch

from posttrain import DPOConfig, DPOTrainer

STEPS = 20
COMMON = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "per_device_train_batch_size": 4,
    "max_steps": STEPS,
    "max_length": 40,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "train_sampling_strategy": "sequential",
}
METRICS = (
    *("loss", "entropy", "mean_token_accuracy", "logps/chosen", "logps/rejected"),
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
)


Gradients = list[dict[str, torch.Tensor]]


def ours(model_dir: Path, output_dir: Path, rows: list, options: dict) -> tuple[list[dict], Gradients]:
    """The log, and the gradients of every step."""
    trainer = DPOTrainer(str(model_dir), None, DPOConfig(output_dir=str(output_dir), **COMMON, **options), rows)
    gradients: Gradients = []
    step = trainer._loop._optimizer.step

    def recording(learning_rate: float) -> torch.Tensor:
        gradients.append(gradients_of(trainer.model))
        return step(learning_rate)

    trainer._loop._optimizer.step = recording
    trainer.train()
    return trainer.log_history, gradients


def theirs(model_dir: Path, output_dir: Path, rows: list, options: dict) -> tuple[list[dict], Gradients]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig as TRLConfig
    from trl import DPOTrainer as TRLTrainer

    gradients: Gradients = []

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, *args, model, **kwargs):
            gradients.append(gradients_of(model))

    trainer = TRLTrainer(
        AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32"),
        args=TRLConfig(output_dir=str(output_dir), save_strategy="no", disable_tqdm=True, **COMMON, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        callbacks=[Recorder()],
    )
    trainer.train()
    return [record for record in trainer.state.log_history if "loss" in record], gradients


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_20_steps(model_dir, pair_rows, tmp_path, loss_type):
    options = {"loss_type": [loss_type]}
    found, gradients = ours(model_dir, tmp_path / "ours", pair_rows, options)
    expected, their_gradients = theirs(model_dir, tmp_path / "theirs", pair_rows, options)
    assert [record["num_tokens"] for record in found] == [record["num_tokens"] for record in expected]
    for name in METRICS:
        difference = [record[name] - float(other[name]) for record, other in zip(found, expected, strict=True)]
        assert len(difference) == STEPS
        assert max(map(abs, difference)) <= 1e-4, name
    assert abs(found[-1]["rewards/margins"]) > 0.1  # the policy has moved
    assert len(gradients) == STEPS
    for one, other in zip(gradients, their_gradients, strict=True):
        for name in one:
            assert (one[name] - other[name]).norm() <= 1e-4 * other[name].norm(), name
