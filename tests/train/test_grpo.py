"""GRPO: what must not change the gradient, what a run leaves behind, and what it says of mistakes."""

import json
import random
from dataclasses import replace
from pathlib import Path

import grpo_rollouts as fixed
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from posttrain.cli import main
from posttrain.models import head, hidden_states
from posttrain.ops import use_backend
from posttrain.train import checkpoint
from posttrain.train.config import ConfigError
from posttrain.train.grpo import GRPOConfig, GRPOTrainer
from posttrain.train.loop import _recompute_activations

FULL = {"beta": 0.04, "loss_type": "grpo", "entropy_coef": 0.01, "top_entropy_quantile": 0.6}


@pytest.fixture
def whole(model_dir, tmp_path):
    """A trainer with all terms of the loss, the fixed rollouts, and their gradient in one micro-batch."""
    run = fixed.trainer(model_dir, tmp_path, **FULL)
    given = fixed.rollouts()
    return run, given, fixed.gradients(run, given)[0]


def test_copies_of_prompts_give_the_same_gradient(whole):
    run, given, expected = whole
    fixed.assert_close(fixed.gradients(run, given, share=False)[0], expected, 1e-5)


@pytest.mark.parametrize("max_tokens", [36, 60, 110])
def test_micro_batches_give_the_same_gradient(whole, max_tokens):
    run, given, expected = whole
    found, metrics = fixed.gradients(run, given, max_tokens=max_tokens)
    fixed.assert_close(found, expected, 1e-5)
    assert metrics["entropy"] == pytest.approx(fixed.gradients(run, given)[1]["entropy"], rel=1e-5)


def test_micro_batches_of_one_completion_give_the_same_gradient(whole):
    run, given, expected = whole
    sizes = [len(rollout.example) for rollout in given]
    found, _ = fixed.gradients(run, given, max_tokens=max(sizes), share=False)
    fixed.assert_close(found, expected, 1e-5)


def test_the_order_of_completions_does_not_change_the_gradient(whole):
    run, given, expected = whole
    shuffled = random.Random(0).sample(given, len(given))
    fixed.assert_close(fixed.gradients(run, shuffled)[0], expected, 1e-5)


def test_activation_checkpointing_gives_the_same_gradient(whole):
    run, given, expected = whole
    _recompute_activations(run.model)
    fixed.assert_close(fixed.gradients(run, given)[0], expected, 1e-5)


def test_kernels_give_the_gradient_of_the_reference(whole):
    run, given, expected = whole
    with use_backend("reference"):
        fixed.assert_close(fixed.gradients(run, given)[0], expected, 1e-5)


def test_groups_without_advantage_cost_no_backward(model_dir, tmp_path):
    """Their gradient is 0, so leaving it out changes nothing; their entropy still counts."""
    run = fixed.trainer(model_dir, tmp_path)
    given = fixed.rollouts()
    batches = run._packing.batches(given)
    assert [(batch.idle, sorted({given[i].example.group for i in batch.members})) for batch in batches] == [
        (False, [0, 2]),
        (True, [1]),
    ]
    found, metrics = fixed.gradients(run, given)
    run._objective = replace(run._objective, entropy_coef=1e-30)  # as nothing, but not known to be
    expected, wanted = fixed.gradients(run, given)
    fixed.assert_close(found, expected, 1e-5)
    assert metrics["entropy"] == pytest.approx(wanted["entropy"], rel=1e-6)


def test_a_step_without_any_advantage_has_a_gradient_of_zero(model_dir, tmp_path):
    run = fixed.trainer(model_dir, tmp_path)
    found, _ = fixed.gradients(run, [replace(rollout, advantage=0.0) for rollout in fixed.rollouts()])
    assert found.keys() == dict(run.model.named_parameters()).keys()
    assert not any(gradient.any() for gradient in found.values())


def test_completions_that_agree_are_there_once(model_dir, tmp_path):
    run = fixed.trainer(model_dir, tmp_path)
    given = fixed.rollouts()
    (one,) = run._packing.batches(given[:1])
    (same,) = run._packing.batches([given[0]] * 4)
    assert len(same.packed.input_ids) == len(one.packed.input_ids)
    assert len(same.packed.targets) == 4 * len(one.packed.targets)


def records(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("step_time", "tokens_per_second")} for line in lines]


@pytest.mark.parametrize("stop", [10, 11], ids=["between generations", "completions in hand"])
def test_10_steps_and_10_more_are_20_steps_bit_for_bit(model_dir, tmp_path, stop):
    changes = {"max_steps": 20, "save_steps": stop, "steps_per_generation": 2, "logging_steps": 3, "beta": 0.01}
    whole = fixed.trainer(model_dir, tmp_path, **changes)
    whole.train()
    saved = tmp_path / f"checkpoint-{stop}"
    assert (saved / "source.safetensors").is_file() == (stop == 11)
    expected = records(tmp_path)
    weights = load_file(tmp_path / "checkpoint-20" / "model.safetensors")
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    resumed = fixed.trainer(model_dir, tmp_path, **changes)
    resumed.train(resume_from_checkpoint=saved)
    for name, value in load_file(tmp_path / "checkpoint-20" / "model.safetensors").items():
        assert torch.equal(value, weights[name]), name
    assert records(tmp_path) == expected


def test_a_run_writes_metrics_and_completions(model_dir, tmp_path):
    import pyarrow.parquet

    def length(prompts, completions, completion_ids, right, log_extra, log_metric, trainer_state, **columns):
        assert prompts == [f"Question {int(n) // 2}: {int(n) // 2} + {int(n) // 2} = " for n in right]
        log_extra("tokens", [len(ids) for ids in completion_ids])
        log_metric("seen", trainer_state.global_step)
        return [None if answer == "0" else -len(ids) for ids, answer in zip(completion_ids, right, strict=True)]

    run = fixed.trainer(model_dir, tmp_path, max_steps=2)
    run = GRPOTrainer(
        str(model_dir),
        [fixed.vowels, length],
        replace(run.args, reward_weights=[1.0, 0.5], num_iterations=2),
        [{"prompt": f"Question {n}: {n} + {n} = ", "right": str(2 * n)} for n in range(6)],
    )
    run.train()
    first, second = run.log_history
    assert first["loss"] == pytest.approx(0, abs=1e-6)  # on-policy, with the mean of each group taken off
    assert first["grad_norm"] > 0 and first["seen"] == 0
    assert first["clip_ratio/region_mean"] == 0 and 4 < first["entropy"] < 6
    assert first["sampling/sampling_logp_difference/max"] < 1e-5
    assert 0 < first["completions/min_length"] <= first["completions/mean_length"] <= first["completions/max_length"]
    assert second["reward"] == first["reward"]  # the same completions again
    table = pyarrow.parquet.read_table(tmp_path / "completions" / "completions_00000.parquet").to_pydict()
    assert len(table["completion"]) == 12 and not (tmp_path / "completions" / "completions_00001.parquet").exists()
    assert table["vowels"] == fixed.vowels(None, table["completion"], None)
    applies = [value for value in table["length"] if value is not None]
    assert [-tokens for tokens, value in zip(table["tokens"], table["length"], strict=True) if value] == applies
    assert len(applies) < 12 and first["rewards/length/mean"] == pytest.approx(np.mean(applies))
    totals = [a + 0.5 * (b or 0) for a, b in zip(table["vowels"], table["length"], strict=True)]
    assert first["reward"] == pytest.approx(np.mean(totals))


def test_it_learns(model_dir, tmp_path):
    run = fixed.trainer(model_dir, tmp_path, max_steps=30, learning_rate=1e-2, logging_steps=5)
    run.train()
    assert run.log_history[-1]["reward"] > 2 * run.log_history[0]["reward"]


def test_evaluation_is_of_new_completions_and_always_the_same(model_dir, tmp_path):
    run = fixed.trainer(model_dir, tmp_path)
    run._loop.eval_source = run._loop.source
    first = run.evaluate()
    assert first == run.evaluate()
    assert first["eval_reward"] >= 0 and first["eval_loss"] == pytest.approx(0, abs=1e-6)
    assert (tmp_path / "completions" / "eval_00000.parquet").exists()


def test_each_evaluation_has_a_step_and_a_file_of_its_own(model_dir, tmp_path):
    run = fixed.trainer(model_dir, tmp_path, max_steps=2, eval_steps=1, num_iterations=4)
    run._loop.eval_source = run._loop.source
    run.train()
    names = sorted(path.name for path in (tmp_path / "completions").iterdir())
    assert names == ["completions_00000.parquet", "eval_00001.parquet", "eval_00002.parquet"]


def test_adapter_and_reference_with_it_off(model_dir, tmp_path):
    run = fixed.trainer(model_dir, tmp_path, lora_r=4, beta=0.1, max_steps=3)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    run.train()
    assert run.log_history[0]["kl"] == pytest.approx(0, abs=1e-6) and run.log_history[2]["kl"] > 0
    changed = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora" in name for name in changed)


@pytest.mark.parametrize("lora", [0, 4], ids=["frozen copy", "adapter off"])
def test_exact_divergence(model_dir, tmp_path, lora):
    changes = {"beta": 0.1, "kl_estimator": "exact", "lora_r": lora, "learning_rate": 3e-2}
    run = fixed.trainer(model_dir, tmp_path, **changes)
    given = [replace(rollout, ref_logprob=None) for rollout in fixed.rollouts()]
    assert fixed.gradients(run, given)[1]["kl"] == pytest.approx(0, abs=1e-6)
    run.train()
    run.model.eval()
    (batch,) = run._packing.batches(given)

    def everything(model):
        return head(model).logits(hidden_states(model, batch.packed)[batch.packed.rows] / 0.9).log_softmax(-1)

    with run._reference_policy() as model:
        reference = everything(model)
    with torch.no_grad():
        policy = everything(run.model)
    exact = torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="sum") / len(policy)
    assert exact > 0.01
    torch.testing.assert_close(torch.tensor(fixed.gradients(run, given)[1]["kl"]), exact)


def test_no_reference_is_kept_without_beta(model_dir, tmp_path):
    assert fixed.trainer(model_dir, tmp_path)._reference_policy is None


def test_truncated_completions_are_left_out(model_dir, tmp_path):
    run = fixed.trainer(model_dir, tmp_path, mask_truncated_completions=True, max_completion_length=3)
    step = run._loop.source.step(0)
    generation = run._loop.source._generation
    assert generation.metrics["completions/clipped_ratio"] > 0.5
    assert step.num_targets < 12 and step.counts.sequences == 12


@pytest.mark.parametrize("mode", ["rollout", "recomputed", "corrected"])
def test_old_logprobs(model_dir, tmp_path, mode):
    changes = {
        "rollout": {"num_iterations": 2, "use_rollout_logprobs": True},
        "recomputed": {"num_iterations": 2},
        "corrected": {"importance_sampling_correction": True},
    }
    run = fixed.trainer(model_dir, tmp_path, max_steps=2, **changes[mode])
    run.train()
    for rollout in run._loop.source._generation.rollouts:
        assert rollout.old_logprob == pytest.approx(rollout.sampling_logprob, abs=1e-5)
    if mode == "corrected":
        for batch in run._loop.source.step(1).batches:
            assert batch.targets.weight.tolist() == pytest.approx([1.0] * len(batch.targets.weight), abs=1e-3)


def test_prompts_are_taken_in_turn(model_dir, tmp_path):
    """Six prompts, three at a time: every two steps each once, and a pass ends within a generation of four."""
    run = fixed.trainer(model_dir, tmp_path, per_device_train_batch_size=16)
    source = run._loop.source
    taken = [index for generation in range(6) for index in source._prompts(generation)]
    assert len(taken) == 24 and source.steps_per_epoch == 1.5
    assert all(sorted(taken[first : first + 6]) == list(range(6)) for first in range(0, 24, 6))
    assert taken[:6] != taken[6:12]


def test_epochs_are_no_step_too_long(model_dir, tmp_path):
    """29 prompts, 9 at a time for 3 steps: 3 epochs of 29/3 steps are 29, though not in floating point."""
    args = replace(fixed.trainer(model_dir, tmp_path).args, max_steps=-1, num_train_epochs=3.0, num_generations=4)
    args = replace(args, per_device_train_batch_size=12, steps_per_generation=3)
    run = GRPOTrainer(str(model_dir), fixed.vowels, args, [{"prompt": f"{n}"} for n in range(29)])
    assert run._loop.num_steps == 29


def test_a_step_without_loss_tokens_has_a_loss_of_zero(model_dir, tmp_path):
    run = fixed.trainer(model_dir, tmp_path, mask_truncated_completions=True, max_completion_length=1, max_steps=1)
    torch.nn.init.zeros_(run.model.get_output_embeddings().weight)  # so that hardly any token is an end
    assert run.train().loss == 0


def test_a_failing_reward_saves_the_run(model_dir, tmp_path):
    calls = []

    def sometimes(prompts, completions, **columns):
        calls.append(1)
        return [float("nan") if len(calls) == 3 and i == 5 else 1.0 for i in range(len(completions))]

    run = fixed.trainer(model_dir, tmp_path)
    rows = [{"prompt": f"Question {n}"} for n in range(6)]
    run = GRPOTrainer(str(model_dir), sometimes, run.args, rows)
    with pytest.raises(ConfigError, match=r"sometimes returned nan .*completion 5: .*prompt 'Question .*checkpoint-2"):
        run.train()
    assert checkpoint.find_newest(tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 6}, "the 6 completions .* multiple of num_generations 4"),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 3}, "steps_per_generation 3 must be a multiple"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"loss_type": "ppo"}, "loss_type must be one of grpo"),
        ({"top_p": 0.0}, "top_p must be positive"),
        ({"reward_weights": [1.0, 2.0]}, "2 reward_weights for 1 reward functions"),
        ({"importance_sampling_clip_min": 4.0}, "must be below importance_sampling_clip_max 3"),
        ({"max_tokens_per_batch": 20}, r"rows\[0\] has 20 tokens, with max_completion_length 12 more than"),
    ],
)
def test_refuses_settings(model_dir, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        fixed.trainer(model_dir, tmp_path, **changes)


def test_a_prompt_needs_room_for_an_answer(model_dir, tmp_path):
    args = fixed.trainer(model_dir, tmp_path).args
    with pytest.raises(ConfigError, match=r"rows\[1\] has 256 tokens, and the model's context 256"):
        GRPOTrainer(str(model_dir), fixed.vowels, args, [{"prompt": "x" * n} for n in (255, 256)])


def test_command_line(model_dir, tmp_path, capsys):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n} + {n} = ", "answer": 2 * n}) + "\n" for n in range(4)))
    flags = {
        "model": model_dir,
        "data": data,
        "output_dir": tmp_path / "run",
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 4,
        "use_cpu": True,
    }
    common = ["grpo", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]
    assert main([*common, "--reward_funcs", "numeric,exact_mach"]) == 2
    assert "posttrain.rewards has no 'exact_mach'" in capsys.readouterr().err
    assert main([*common, "--reward_funcs", "numeric,exact_match", "--reward_weights", "1,0.5"]) == 0
    assert "checkpoint-1" in capsys.readouterr().out
    assert {"rewards/numeric/mean", "rewards/exact_match/mean"} <= records(tmp_path / "run")[0].keys()


def test_config_lists_what_the_objective_knows():
    from posttrain.objectives import advantage, policy
    from posttrain.train import grpo_config

    for name in ("LOSSES", "LEVELS", "ESTIMATORS", "CORRECTIONS"):
        assert getattr(grpo_config, name) == getattr(policy, name)
    assert grpo_config.SCALES == advantage.SCALES
    objective = policy.PolicyObjective()
    assert all(getattr(GRPOConfig(), name) == value for name, value in vars(objective).items())


def test_refuses_a_run_without_reward(model_dir, tmp_path):
    with pytest.raises(ConfigError, match="no reward function"):
        GRPOTrainer(str(model_dir), args=GRPOConfig(output_dir=str(tmp_path)), train_dataset=[{"prompt": "?"}])
