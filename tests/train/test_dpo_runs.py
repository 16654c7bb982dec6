"""Whole runs of DPOTrainer: going on after a stop, precomputed references, evaluation, mistakes, and the command."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain import DPOConfig, DPOTrainer
from posttrain.cli import main
from posttrain.models import ModelError
from posttrain.train.config import ConfigError
from posttrain.train.metrics import read

TIMES = ("step_time", "tokens_per_second")
SETTINGS = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "max_steps": 8,
    "logging_steps": 2,
    "save_steps": 4,
    "gradient_checkpointing": False,
    "use_cpu": True,
}


def trainer(model_dir: Path, output_dir: Path, rows: list, **changes) -> DPOTrainer:
    return DPOTrainer(str(model_dir), None, DPOConfig(output_dir=str(output_dir), **(SETTINGS | changes)), rows)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bf16": True, "max_tokens_per_batch": 90},
        {"lora_r": 4, "lora_dropout": 0.2, "disable_dropout": False},
        {"precompute_ref_log_probs": True, "bf16": True},
        {"loss_type": ["aot"], "max_tokens_per_batch": 90},
    ],
    ids=["fp32", "bf16", "lora with dropout", "precomputed", "coupled pairs"],
)
def test_4_steps_and_4_more_are_8_steps_bit_for_bit(model_dir, pair_rows, tmp_path, changes):
    whole = trainer(model_dir, tmp_path / "whole", pair_rows, **changes)
    whole.train()
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    folder = tmp_path / "whole" / "checkpoint-4"
    resumed = trainer(model_dir, tmp_path / "parts", pair_rows, **changes)
    resumed.train(resume_from_checkpoint=folder)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    later = [record for record in metrics(tmp_path / "whole") if record["step"] > 4]
    assert metrics(tmp_path / "parts") == later and len(later) == 2


def metrics(output_dir: Path) -> list[dict]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in read(output_dir)]


@pytest.mark.parametrize("changes", [{}, {"lora_r": 4}, {"ld_alpha": 0.5}], ids=str)
def test_precomputed_log_probabilities_give_the_same_run(model_dir, pair_rows, tmp_path, changes):
    runs = []
    for name, precompute in (("a", False), ("b", True)):
        run = trainer(model_dir, tmp_path / name, pair_rows, precompute_ref_log_probs=precompute, **changes)
        run.train()
        runs.append(run.log_history)
    for live, precomputed in zip(*runs, strict=True):
        for name in ("loss", "rewards/chosen", "rewards/rejected", "grad_norm"):
            assert abs(live[name] - precomputed[name]) <= 1e-5, name
    assert abs(runs[0][-1]["rewards/margins"]) > 0.01


def test_log_probabilities_are_precomputed_in_the_precision_of_the_run(model_dir, pair_rows, tmp_path):
    changes = {"bf16": True, "max_steps": 1, "train_sampling_strategy": "sequential"}
    run = trainer(model_dir, tmp_path, pair_rows, precompute_ref_log_probs=True, **changes)
    run.train()
    assert abs(run.log_history[0]["loss"] - math.log(2)) <= 1e-7


def test_evaluation(model_dir, pair_rows, tmp_path):
    for precompute in (False, True):
        run = DPOTrainer(
            str(model_dir),
            args=DPOConfig(output_dir=str(tmp_path), precompute_ref_log_probs=precompute, **SETTINGS),
            train_dataset=pair_rows,
            eval_dataset=pair_rows[:6],
        )
        found = run.evaluate()
        assert abs(found["eval_loss"] - math.log(2)) <= 1e-7
        assert found["eval_rewards/margins"] == pytest.approx(0, abs=1e-9)
        assert found["eval_logps/chosen"] < 0 < found["eval_entropy"]


def test_pairs_that_the_reference_finds_strange_are_left_out(model_dir, pair_rows, tmp_path, caplog):
    options = {"precompute_ref_log_probs": True, "num_train_epochs": 1.0, "max_steps": -1}
    every = trainer(model_dir, tmp_path / "a", pair_rows, **options)._loop.source
    perplexities = (-every._reference / every.lengths).exp().amax(1)
    limit = perplexities.median().item()
    kept = trainer(model_dir, tmp_path / "b", pair_rows, max_perplexity=limit, **options)
    expected = [i for i, found in enumerate(perplexities) if found <= limit]
    assert [pair.origin for pair in kept._loop.source._pairs] == [f"rows[{i}]" for i in expected]
    torch.testing.assert_close(kept._loop.source._reference, every._reference[expected])
    assert kept._loop.num_steps == -(-len(expected) // 4) < every.steps_per_epoch
    assert f"leaves {len(expected)} of {len(pair_rows)} pairs" in caplog.text
    with pytest.raises(ConfigError, match="no pair is within max_perplexity 1"):
        trainer(model_dir, tmp_path / "c", pair_rows, max_perplexity=1.0, **options)


def test_dpo_command(model_dir, pair_rows, tmp_path, capsys):
    data, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in pair_rows))
    flags = {"model": model_dir, "data": data, "output_dir": run, "max_steps": 2, "logging_steps": 1}
    options = [f"--{name}={value}" for name, value in flags.items()]
    assert main(["dpo", *options, "--use_cpu", "--loss-type", "sigmoid,sft", "--loss_weights", "1,0.1"]) == 0
    assert f"checkpoint in {run / 'checkpoint-2'}" in capsys.readouterr().out
    assert [record["step"] for record in read(run)] == [1, 2]
    assert json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())["config"]["loss_weights"] == [1.0, 0.1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": ["dpo"]}, "loss_type must be one of sigmoid, .*; got 'dpo'"),
        ({"loss_weights": ["a"]}, r"loss_weights must be a list of numbers, got \['a'\]"),
        ({"loss_weights": [1.0, 2.0]}, "loss_weights has 2 numbers for 1 of loss_type"),
        ({"f_divergence_type": "kl"}, "f_divergence_type must be one of reverse_kl, .*; got 'kl'"),
        ({"ld_alpha": 1.5}, "ld_alpha must be at most 1, got 1.5"),
        ({"beta": -0.1}, "beta must be at least 0, got -0.1"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"discopop_tau": 0.0}, "discopop_tau must be above 0, got 0"),
        ({"max_perplexity": 9.0}, "max_perplexity needs precompute_ref_log_probs"),
        (
            {"max_tokens_per_batch": 30},
            r"rows\[0\], with both answers, has \d+ tokens, more than max_tokens_per_batch 30",
        ),
    ],
)
def test_settings_that_cannot_be_used(model_dir, pair_rows, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        trainer(model_dir, tmp_path / "run", pair_rows, **changes)
    assert not (tmp_path / "run").exists()


def test_wrong_settings_show_before_the_model_is_loaded(pair_rows, tmp_path):
    with pytest.raises(ConfigError, match="label_smoothing must be above 0 for exo_pair"):
        trainer(tmp_path / "no model here", tmp_path / "run", pair_rows, loss_type=["exo_pair"])
    with pytest.raises(ModelError):
        trainer(tmp_path / "no model here", tmp_path / "run", pair_rows)


def test_a_reference_that_is_none(model_dir, pair_rows):
    with pytest.raises(ConfigError, match="ref_model must be a transformers model, got str"):
        DPOTrainer(str(model_dir), str(model_dir), DPOConfig(), pair_rows)
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="ref_model is the model itself"):
        DPOTrainer(model, model, DPOConfig(), pair_rows)
