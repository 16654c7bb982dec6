"""The trainer on a tiny model: what must not change the result, and what must."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sft_config import assert_equivalent, sft_config

from posttrain import SFTConfig, SFTTrainer


def config(model_dir: Path, output_dir: Path, **changes) -> SFTConfig:
    return sft_config(output_dir, **{"model": str(model_dir), **changes})


def losses(trainer: SFTTrainer) -> torch.Tensor:
    trainer.train()
    return torch.tensor([record["loss"] for record in trainer.log_history if "loss" in record])


def gradients(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    """Of the first optimizer step."""
    step = trainer._loop.source.step(0)
    trainer.model.zero_grad()
    for batch in step.batches:
        trainer._loop.loss(trainer.model, batch, step).value.backward()
    return {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize("max_tokens", [32, 64, 100000])
def test_micro_batches_give_the_same_gradient(model_dir, rows, tmp_path, max_tokens):
    whole = SFTTrainer(args=config(model_dir, tmp_path, max_tokens_per_batch=2048), train_dataset=rows)
    parts = SFTTrainer(args=config(model_dir, tmp_path, max_tokens_per_batch=max_tokens), train_dataset=rows)
    num_batches = len(parts._loop.source.step(0).batches)
    assert num_batches > 3 if max_tokens == 32 else num_batches >= 1
    expected, found = gradients(whole), gradients(parts)
    for name in expected:
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, name


def test_packing_order_does_not_change_the_gradient(model_dir, rows, tmp_path):
    args = config(model_dir, tmp_path, per_device_train_batch_size=len(rows), train_sampling_strategy="sequential")
    expected = gradients(SFTTrainer(args=args, train_dataset=rows))
    found = gradients(SFTTrainer(args=args, train_dataset=rows[::-1]))
    for name in expected:
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, name


def test_sequences_per_step_is_batch_times_accumulation(model_dir, rows, tmp_path):
    one = SFTTrainer(args=config(model_dir, tmp_path, per_device_train_batch_size=8), train_dataset=rows)
    eight = SFTTrainer(
        args=config(model_dir, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8),
        train_dataset=rows,
    )
    assert one._loop.num_steps == eight._loop.num_steps
    expected, found = gradients(one), gradients(eight)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def equivalent(first: SFTTrainer, second: SFTTrainer) -> None:
    assert_equivalent(losses(first), losses(second))


def test_micro_batch_size_does_not_change_50_steps(model_dir, rows, tmp_path):
    equivalent(
        SFTTrainer(args=config(model_dir, tmp_path / "a", max_steps=50), train_dataset=rows),
        SFTTrainer(args=config(model_dir, tmp_path / "b", max_steps=50, max_tokens_per_batch=32), train_dataset=rows),
    )


def test_gradient_checkpointing_does_not_change_50_steps(model_dir, rows, tmp_path):
    plain = SFTTrainer(args=config(model_dir, tmp_path / "a", max_steps=50), train_dataset=rows)
    saving = config(model_dir, tmp_path / "b", max_steps=50, gradient_checkpointing=True)
    recomputing = SFTTrainer(args=saving, train_dataset=rows)
    equivalent(plain, recomputing)
    flags = [layer.gradient_checkpointing for layer in recomputing.model.model.layers]
    assert flags == [True, True]


def test_training_lowers_the_loss_and_logs_it(model_dir, rows, tmp_path):
    trainer = SFTTrainer(
        args=config(model_dir, tmp_path, max_steps=30, logging_steps=3, eval_steps=15, learning_rate=1e-2),
        train_dataset=rows,
        eval_dataset=rows[:16],
    )
    before = trainer.evaluate()
    result = trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.7 * before["eval_loss"]
    assert after["eval_mean_token_accuracy"] > before["eval_mean_token_accuracy"]
    train = [record for record in trainer.log_history if "loss" in record]
    evaluations = [record for record in trainer.log_history if "eval_loss" in record]
    assert [record["step"] for record in train] == list(range(3, 31, 3))
    assert [record["step"] for record in evaluations] == [15, 30]
    assert evaluations[-1]["eval_loss"] == after["eval_loss"]
    names = {"loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "num_tokens", "epoch", "step_time"}
    assert names <= train[0].keys()
    assert train[-1]["num_tokens"] == sum(trainer._loop.source.step(number).num_tokens for number in range(30))
    assert result.global_step == 30
    assert result.loss == train[-1]["loss"]
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_logged_values_are_means_of_their_steps(model_dir, rows, tmp_path):
    every = SFTTrainer(args=config(model_dir, tmp_path / "a", max_steps=6), train_dataset=rows)
    third = SFTTrainer(args=config(model_dir, tmp_path / "b", max_steps=6, logging_steps=3), train_dataset=rows)
    torch.testing.assert_close(losses(third), losses(every).reshape(2, 3).mean(1))


def test_clipping_bounds_the_update_but_not_the_logged_norm(model_dir, rows, tmp_path):
    free = SFTTrainer(args=config(model_dir, tmp_path / "a", max_steps=1, max_grad_norm=0), train_dataset=rows)
    held = SFTTrainer(args=config(model_dir, tmp_path / "b", max_steps=1, max_grad_norm=1e-9), train_dataset=rows)
    start = copy.deepcopy(free.model.state_dict())
    free.train()
    held.train()
    assert free.log_history[0]["grad_norm"] == held.log_history[0]["grad_norm"] > 0.1

    def moved(trainer: SFTTrainer) -> float:
        return max(float((value - start[name]).abs().max()) for name, value in trainer.model.state_dict().items())

    assert moved(held) < 0.2 * moved(free)  # AdamW's epsilon is 1e-8: gradients of 1e-9 hardly move a weight


def test_packing_counts_bins(model_dir, rows, tmp_path):
    plain = SFTTrainer(args=config(model_dir, tmp_path, max_steps=-1, num_train_epochs=1), train_dataset=rows)
    packed = SFTTrainer(
        args=config(model_dir, tmp_path, max_steps=-1, num_train_epochs=1, packing=True, max_length=64),
        train_dataset=rows,
    )
    assert plain._loop.num_steps == 8
    assert packed._loop.num_steps < 8
    assert packed._loop.source.step(0).num_tokens > plain._loop.source.step(0).num_tokens


def test_lora_trains_the_adapter_only(model_dir, rows, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trainer = SFTTrainer(args=config(model_dir, tmp_path, lora_r=4, max_steps=5), train_dataset=rows)
    before = copy.deepcopy(trainer.model.state_dict())
    result = trainer.train()
    after = trainer.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("lora_" in name for name in moved)
    assert any("lora_B" in name for name in moved)

    tokens = torch.arange(2, 12)[None]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), result.checkpoint)
    trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, trainer.model(tokens).logits)


def test_peft_config(model_dir, rows, tmp_path):
    from peft import LoraConfig

    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = SFTTrainer(args=config(model_dir, tmp_path, max_steps=2), train_dataset=rows, peft_config=adapter)
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4 and all("q_proj.lora_" in name for name in trained)
    trainer.train()


@pytest.mark.parametrize("lora_r", [0, 4], ids=["weights", "lora"])
def test_bf16_follows_fp32(model_dir, rows, tmp_path, lora_r):
    changes = {"max_steps": 10, "lora_r": lora_r}
    wide = SFTTrainer(args=config(model_dir, tmp_path / "a", **changes), train_dataset=rows)
    half = SFTTrainer(args=config(model_dir, tmp_path / "b", bf16=True, **changes), train_dataset=rows)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert {twin.dtype for twin in half._loop._optimizer._named.values()} == {torch.float32}
    expected, found = losses(wide), losses(half)
    assert found[-1] < found[0]
    assert (found - expected).abs().max() < 2**-8 * expected.abs().max()  # bfloat16 rounds by up to 2^-9


def test_model_object_with_its_tokenizer(model_dir, rows, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = config(model_dir, tmp_path / "a", model=None)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    with pytest.raises(ValueError, match="processing_class"):
        SFTTrainer(model, args, train_dataset=rows)
    given = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    loaded = SFTTrainer(args=config(model_dir, tmp_path / "b"), train_dataset=rows)
    torch.testing.assert_close(losses(given), losses(loaded), rtol=0, atol=0)


def test_dataset_object(model_dir, rows, tmp_path):
    from datasets import Dataset

    given = SFTTrainer(args=config(model_dir, tmp_path / "a"), train_dataset=Dataset.from_list(rows))
    listed = SFTTrainer(args=config(model_dir, tmp_path / "b"), train_dataset=rows)
    torch.testing.assert_close(losses(given), losses(listed), rtol=0, atol=0)


def test_tensorboard_has_the_same_values(model_dir, rows, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = SFTTrainer(args=config(model_dir, tmp_path, report_to=["tensorboard"]), train_dataset=rows)
    expected = losses(trainer)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    torch.testing.assert_close(torch.tensor([event.value for event in board.Scalars("train/loss")]), expected)


def test_wandb_has_the_same_values(model_dir, rows, tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("done"))
    stand_in = SimpleNamespace(init=lambda **given: calls.append(given) or run)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    trainer = SFTTrainer(args=config(model_dir, tmp_path, report_to=["wandb"], max_steps=2), train_dataset=rows)
    expected = losses(trainer)
    first, *logged, last = calls
    assert first == {"dir": tmp_path, "name": tmp_path.name} and last == "done"
    assert [step for step, _ in logged] == [1, 2]
    torch.testing.assert_close(torch.tensor([values["train/loss"] for _, values in logged]), expected)


def test_wandb_that_fails_is_one_line(model_dir, rows, tmp_path, monkeypatch):
    class Error(Exception):
        pass

    def fail(**given):
        raise Error("No API key configured.\nUse `wandb login`")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fail, Error=Error))
    trainer = SFTTrainer(args=config(model_dir, tmp_path, report_to=["wandb"]), train_dataset=rows)
    with pytest.raises(ValueError, match=r"^report_to wandb: No API key configured\.$"):
        trainer.train()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_wandb_that_is_not_installed(model_dir, rows, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"^report_to wandb needs the package: pip install wandb"):
        SFTTrainer(args=config(model_dir, tmp_path / "run", report_to=["wandb"]), train_dataset=rows)
    assert not (tmp_path / "run").exists()


def test_save_model_writes_a_plain_model_folder(model_dir, rows, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = SFTTrainer(args=config(model_dir, tmp_path / "run"), train_dataset=rows)
    trainer.save_model(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(plain[name], value) for name, value in trainer.model.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<eos>"


def test_missing_pieces_are_named(model_dir, rows, tmp_path):
    with pytest.raises(ValueError, match="no training data"):
        SFTTrainer(args=config(model_dir, tmp_path))
    with pytest.raises(ValueError, match="no model"):
        SFTTrainer(args=config(model_dir, tmp_path, model=None), train_dataset=rows)
    with pytest.raises(ValueError, match="no evaluation data"):
        SFTTrainer(args=config(model_dir, tmp_path), train_dataset=rows).evaluate()


def test_other_objects_are_refused(model_dir, rows, tmp_path):
    with pytest.raises(ValueError, match=r"^model must be a folder, a hub id or a transformers model, got int$"):
        SFTTrainer(3, config(model_dir, tmp_path), rows)
    with pytest.raises(ValueError, match=r"^args must be a posttrain\.SFTConfig, got dict$"):
        SFTTrainer(str(model_dir), {}, rows)


def test_a_tokenizer_of_another_model(model_dir, rows, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir, vocab_size=60))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    with pytest.raises(ValueError, match=r"rows\[0\] holds token \d+, but the model's vocabulary has 60"):
        SFTTrainer(other, config(model_dir, tmp_path), [{"text": "~~~"}], processing_class=tokenizer)


def test_an_adapter_goes_on_training_and_takes_no_second_one(model_dir, rows, tmp_path):
    first = SFTTrainer(args=config(model_dir, tmp_path / "a", lora_r=2), train_dataset=rows).train()
    with pytest.raises(ValueError, match="the model has an adapter already"):
        SFTTrainer(args=config(first.checkpoint, tmp_path / "b", lora_r=2), train_dataset=rows)
    again = SFTTrainer(args=config(first.checkpoint, tmp_path / "b"), train_dataset=rows)
    assert {p.requires_grad for name, p in again.model.named_parameters() if "lora_" in name} == {True}
    assert again.train().global_step == 4


def test_a_run_that_diverges_stops_and_saves_nothing_of_it(model_dir, rows, tmp_path):
    args = config(model_dir, tmp_path, learning_rate=1e30, max_grad_norm=0.0, max_steps=20)
    with pytest.raises(ValueError, match=r"step \d+: the gradient's norm is (nan|inf)"):
        SFTTrainer(args=args, train_dataset=rows).train()
    assert not list(tmp_path.glob("checkpoint-*"))
