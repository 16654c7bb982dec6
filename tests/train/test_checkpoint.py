"""A checkpoint is whole or not there, and a resumed run is the run that was not interrupted."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain import SFTConfig, SFTTrainer
from posttrain.train import checkpoint
from posttrain.train.config import ConfigError
from posttrain.train.loop import Interrupted
from posttrain.train.metrics import read

TIMES = ("step_time", "tokens_per_second")


def trainer(model_dir: Path, output_dir: Path, rows, **changes) -> SFTTrainer:
    settings = {
        "output_dir": str(output_dir),
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "max_steps": 20,
        "logging_steps": 4,
        "save_steps": 10,
        "gradient_checkpointing": False,
        "use_cpu": True,
    }
    return SFTTrainer(str(model_dir), SFTConfig(**(settings | changes)), rows)


def metrics(output_dir: Path) -> list[dict]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in read(output_dir)]


def same_files(first: Path, second: Path) -> None:
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        if name.endswith(".safetensors"):
            assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.parametrize(
    ("changes", "data"),
    [
        ({}, "rows"),
        ({"bf16": True}, "rows"),
        ({"lora_r": 4, "lora_dropout": 0.2}, "rows"),
        ({"max_tokens_per_batch": 80}, "shared_rows"),
    ],
    ids=["fp32", "bf16", "lora with dropout", "shared prompts"],
)
def test_10_steps_and_10_more_are_20_steps_bit_for_bit(model_dir, tmp_path, changes, data, request):
    rows = request.getfixturevalue(data)
    whole = trainer(model_dir, tmp_path / "whole", rows, **changes)
    whole.train()

    stopped = trainer(model_dir, tmp_path / "parts", rows, **changes)
    stop_after(stopped, 10)
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    resumed = trainer(model_dir, tmp_path / "parts", rows, **changes)
    resumed.train(resume_from_checkpoint=True)

    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    same_files(tmp_path / "whole" / "checkpoint-20", tmp_path / "parts" / "checkpoint-20")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def stop_after(run: SFTTrainer, step: int) -> None:
    """Train, and press Ctrl-C within optimizer step `step`."""
    loss = run._loop.loss
    seen = set()

    def interrupting(model, batch, data):
        if id(data) not in seen and len(seen) == step - 1:
            os.kill(os.getpid(), 2)
        seen.add(id(data))
        return loss(model, batch, data)

    kept = []
    source = run._loop.source.step
    run._loop.source.step = lambda number: kept.append(source(number)) or kept[-1]  # kept alive: ids stay unique
    run._loop.loss = interrupting
    with pytest.raises(Interrupted, match=f"checkpoint-{step}"):
        run.train()


def test_ctrl_c_saves_at_the_end_of_the_step(model_dir, rows, tmp_path):
    run = trainer(model_dir, tmp_path, rows)
    stop_after(run, 7)
    assert checkpoint.find_newest(tmp_path) == tmp_path / "checkpoint-7"
    weights = trainer(model_dir, tmp_path / "other", rows, max_steps=20)
    stop_after(weights, 7)
    same_files(tmp_path / "checkpoint-7", tmp_path / "other" / "checkpoint-7")


def test_a_checkpoint_is_a_plain_transformers_folder(model_dir, rows, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = trainer(model_dir, tmp_path, rows, max_steps=3)
    folder = run.train().checkpoint
    plain = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.tensor([AutoTokenizer.from_pretrained(folder)("12 + 30 = ")["input_ids"]])
    run.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, run.model(tokens).logits)
    assert not torch.equal(plain.lm_head.weight, AutoModelForCausalLM.from_pretrained(model_dir).lm_head.weight)


def test_nothing_is_pickled(model_dir, rows, tmp_path):
    folder = trainer(model_dir, tmp_path, rows, max_steps=1).train().checkpoint
    assert {path.suffix for path in folder.iterdir()} <= {".safetensors", ".json", ".jinja"}


@pytest.fixture
def two_checkpoints(model_dir, rows, tmp_path) -> Path:
    trainer(model_dir, tmp_path, rows, max_steps=2, save_steps=1).train()
    assert checkpoint.find_newest(tmp_path) == tmp_path / "checkpoint-2"
    return tmp_path


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_folder_is_not_a_checkpoint(two_checkpoints, name, damage):
    path = two_checkpoints / "checkpoint-2" / name
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.unlink()
    assert checkpoint.defect(two_checkpoints / "checkpoint-2")
    assert checkpoint.find_newest(two_checkpoints) == two_checkpoints / "checkpoint-1"


def test_resume_from_a_damaged_folder_says_what_is_wrong(two_checkpoints, model_dir, rows):
    (two_checkpoints / "checkpoint-2" / "model.safetensors").unlink()
    run = trainer(model_dir, two_checkpoints, rows, max_steps=3)
    with pytest.raises(ValueError, match=r"checkpoint-2 is not a checkpoint: model.safetensors is missing"):
        run.train(resume_from_checkpoint=str(two_checkpoints / "checkpoint-2"))


def test_resume_from_a_checkpoint_from_before_tokens_were_shared(two_checkpoints, model_dir, rows):
    folder = two_checkpoints / "checkpoint-2"
    state = json.loads((folder / "trainer_state.json").read_text())
    del state["num_packed_tokens"]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / checkpoint.MANIFEST).unlink()
    checkpoint._seal(folder)
    run = trainer(model_dir, two_checkpoints, rows, max_steps=3)
    run.train(resume_from_checkpoint=True)
    last = run.log_history[-1]
    assert last["num_packed_tokens"] == last["num_tokens"] > state["num_tokens"]


KILLED = """
import os, sys
from pathlib import Path
import posttrain.train.checkpoint as checkpoint
import torch

step, stage, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])

class Model(torch.nn.Linear):
    def save_pretrained(self, folder):
        (folder / "model.safetensors").write_bytes(b"x" * 100)

class Tokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")

def die(*arguments, **keywords):
    os.kill(os.getpid(), 9)

if stage == "tensors":
    checkpoint.save_file = die
elif stage == "manifest":
    checkpoint._seal = die
elif stage == "rename":
    Path.rename = die
checkpoint.save(folder, step, Model(2, 2), Tokenizer(), {"a": torch.ones(2)}, {"num_tokens": 0})
"""


def test_kill_within_a_save_leaves_the_previous_checkpoint(tmp_path):
    def save(step: int, stage: str) -> int:
        command = [sys.executable, "-c", KILLED, str(step), stage, str(tmp_path)]
        return subprocess.run(command, check=False, capture_output=True, text=True).returncode

    assert save(1, "none") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-1").iterdir()}
    for stage in ("tensors", "manifest", "rename"):
        assert save(2, stage) == -9
        assert not (tmp_path / "checkpoint-2").exists()
        assert checkpoint.find_newest(tmp_path) == tmp_path / "checkpoint-1"
        assert before == {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-1").iterdir()}
    assert save(3, "none") == 0
    assert checkpoint.find_newest(tmp_path) == tmp_path / "checkpoint-3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]


def test_save_total_limit_keeps_the_newest(model_dir, rows, tmp_path):
    trainer(model_dir, tmp_path, rows, max_steps=5, save_steps=1, save_total_limit=2).train()
    assert [path.name for path in checkpoint.find_all(tmp_path)] == ["checkpoint-5", "checkpoint-4"]


def test_save_total_limit_after_going_back_to_an_older_checkpoint(model_dir, rows, tmp_path):
    """Those after it belong to the branch that is left: they go out of the way, and don't count."""
    settings = {"save_steps": 2, "save_total_limit": 2}
    trainer(model_dir, tmp_path, rows, max_steps=8, save_steps=2).train()
    resumed = trainer(model_dir, tmp_path, rows, max_steps=5, **settings)
    result = resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert result.checkpoint == tmp_path / "checkpoint-5"
    assert checkpoint.defect(result.checkpoint) is None
    assert [path.name for path in checkpoint.find_all(tmp_path)] == ["checkpoint-5", "checkpoint-4"]
    aside = checkpoint.find_all(tmp_path / "abandoned-1")
    assert [path.name for path in aside] == ["checkpoint-8", "checkpoint-6", "checkpoint-4"]
    assert checkpoint.defect(aside[0]) is None


def test_resume_after_going_back_stays_on_the_new_branch(model_dir, rows, tmp_path):
    def run(resume, steps: int) -> None:
        settings = {"max_steps": steps, "save_steps": 1, "logging_steps": 1}
        trainer(model_dir, tmp_path, rows, **settings).train(resume_from_checkpoint=resume)

    run(None, 3)
    run(tmp_path / "checkpoint-1", 2)
    assert checkpoint.find_newest(tmp_path) == tmp_path / "checkpoint-2"
    run(True, 4)
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3, 4]
    run(tmp_path / "abandoned-1" / "checkpoint-3", 5)
    assert checkpoint.find_newest(tmp_path) == tmp_path / "checkpoint-5"
    assert [path.name for path in checkpoint.find_all(tmp_path / "abandoned-2")] == ["checkpoint-4"]


def test_ctrl_c_at_a_saving_step_saves_once(model_dir, rows, tmp_path, monkeypatch):
    saved = []
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda folder, step, *more: saved.append(step) or save(folder, step, *more))
    stop_after(trainer(model_dir, tmp_path, rows, save_steps=5), 10)
    assert saved == [5, 10]


def test_a_manifest_of_something_else_is_no_manifest(two_checkpoints):
    for content in ("{}", "[]", '{"files": {"model.safetensors": 3}}', '{"files": []}'):
        (two_checkpoints / "checkpoint-2" / "manifest.json").write_text(content)
        assert checkpoint.find_newest(two_checkpoints) == two_checkpoints / "checkpoint-1"


def test_resume_with_another_rank(model_dir, rows, tmp_path):
    trainer(model_dir, tmp_path, rows, max_steps=1, lora_r=2).train()
    with pytest.raises(ConfigError, match="checkpoint-1 doesn't fit this model: "):
        trainer(model_dir, tmp_path, rows, lora_r=4).train(resume_from_checkpoint=True)


def test_a_run_does_not_mix_with_an_older_one(two_checkpoints, model_dir, rows):
    with pytest.raises(ValueError, match="already holds checkpoint-2; set resume_from_checkpoint"):
        trainer(model_dir, two_checkpoints, rows).train()


def test_resume_needs_a_checkpoint(model_dir, rows, tmp_path):
    with pytest.raises(ValueError, match="no valid checkpoint in"):
        trainer(model_dir, tmp_path / "run", rows).train(resume_from_checkpoint=True)
    assert not (tmp_path / "run").exists()


def test_resume_of_a_finished_run(two_checkpoints, model_dir, rows):
    with pytest.raises(ValueError, match=r"nothing to do: .*checkpoint-2 is at step 2 of 2"):
        trainer(model_dir, two_checkpoints, rows, max_steps=2).train(resume_from_checkpoint=True)


def test_resume_with_the_wrong_kind_of_model(two_checkpoints, model_dir, rows):
    with pytest.raises(ValueError, match="holds a whole model, but this run trains an adapter"):
        trainer(model_dir, two_checkpoints, rows, lora_r=2).train(resume_from_checkpoint=True)


def test_metrics_after_the_checkpoint_are_dropped_on_resume(two_checkpoints, model_dir, rows):
    with (two_checkpoints / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "loss": 0.0}) + "\n" + '{"step": 4, "lo')
    trainer(model_dir, two_checkpoints, rows, max_steps=3, logging_steps=1).train(resume_from_checkpoint=True)
    assert [record["step"] for record in read(two_checkpoints)] == [2, 3]
    assert read(two_checkpoints)[-1]["loss"] > 0
