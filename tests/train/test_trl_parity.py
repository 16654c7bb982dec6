"""The same model on the same batches has the same losses in TRL's SFTTrainer."""

from pathlib import Path

import pytest
import torch

from posttrain import SFTConfig, SFTTrainer

STEPS = 20
COMMON = {
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "max_length": 24,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "train_sampling_strategy": "sequential",
}


def chats(rows: list[dict[str, str]]) -> list[dict[str, list[dict[str, str]]]]:
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in rows
    ]


def theirs(model_dir: Path, output_dir: Path, rows: list) -> list[dict[str, float]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig as TRLConfig
    from trl import SFTTrainer as TRLTrainer

    trainer = TRLTrainer(
        AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32"),
        TRLConfig(output_dir=str(output_dir), save_strategy="no", disable_tqdm=True, **COMMON),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )
    trainer.train()
    return [record for record in trainer.state.log_history if "loss" in record]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("shape", [list, chats], ids=["prompt and completion", "chat"])
def test_losses_of_20_steps(model_dir, rows, tmp_path, shape):
    rows = shape(rows)
    ours = SFTTrainer(str(model_dir), SFTConfig(output_dir=str(tmp_path / "ours"), **COMMON), rows)
    ours.train()
    expected = theirs(model_dir, tmp_path / "theirs", rows)
    assert [record["num_tokens"] for record in ours.log_history] == [record["num_tokens"] for record in expected]
    for name in ("loss", "learning_rate", "grad_norm"):
        found = torch.tensor([record[name] for record in ours.log_history])
        wanted = torch.tensor([float(record[name]) for record in expected])
        assert len(found) == len(wanted) == STEPS
        assert (found - wanted).abs().max() <= 1e-4, name
