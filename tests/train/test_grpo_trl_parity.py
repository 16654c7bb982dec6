"""Fixed rollouts give the same gradients and metrics in TRL's GRPOTrainer."""

from pathlib import Path

import grpo_rollouts as fixed
import pytest
import torch

LOSSES = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "bnpo": {"loss_type": "bnpo", "delta": 1.5},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
    "sapo": {"loss_type": "sapo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "bonus": {"loss_type": "dapo", "entropy_coef": 0.1, "top_entropy_quantile": 0.4},
}


def theirs(model_dir: Path, output_dir: Path, **changes):
    """TRL's trainer of the same model."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    settings = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 12,
        "num_generations": 4,
        "max_completion_length": 12,
        "temperature": 0.9,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
    }
    return GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32"),
        fixed.vowels,
        args=GRPOConfig(**(settings | changes)),
        train_dataset=Dataset.from_list([{"prompt": "?"}]),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )


def padded(given: list[fixed.Rollout]) -> dict[str, torch.Tensor]:
    """The rollouts as TRL holds them: prompts padded on the left, completions on the right."""
    from trl.trainer.utils import pad

    parts = [(r.example.input_ids[~r.example.loss_mask], r.example.input_ids[r.example.loss_mask]) for r in given]
    prompts = [torch.from_numpy(prompt).long() for prompt, _ in parts]
    completions = [torch.from_numpy(completion).long() for _, completion in parts]

    def right(rows):
        return pad(rows, padding_value=0, padding_side="right")

    mask = right([torch.ones_like(row) for row in completions])
    return {
        "prompt_ids": pad(prompts, padding_value=0, padding_side="left"),
        "prompt_mask": pad([torch.ones_like(row) for row in prompts], padding_value=0, padding_side="left"),
        "completion_ids": right(completions),
        "completion_mask": mask,
        "advantages": torch.tensor([rollout.advantage for rollout in given]),
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": right([torch.from_numpy(rollout.old_logprob) for rollout in given]),
        "ref_per_token_logps": right([torch.from_numpy(rollout.ref_logprob) for rollout in given]),
    }


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients(model_dir, tmp_path, name, beta):
    changes = LOSSES[name] | {"beta": beta}
    given = fixed.rollouts()
    found, metrics = fixed.gradients(fixed.trainer(model_dir, tmp_path / "ours", **changes), given)
    peer = theirs(model_dir, tmp_path / "theirs", **changes)
    peer.model.train()
    peer.current_gradient_accumulation_steps = 1
    loss = peer._compute_loss(peer.model, padded(given))
    loss.backward()
    fixed.assert_close(found, {key: p.grad for key, p in peer.model.named_parameters()}, 1e-4)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    wanted = {key: values[0] for key, values in peer._metrics["train"].items()}
    shared = metrics.keys() & wanted.keys()
    assert {"entropy"} <= shared and (beta == 0 or "kl" in shared)
    assert name not in ("grpo", "dapo", "gspo") or (0 < metrics["clip_ratio/region_mean"] < 1)
    for key in shared:
        assert metrics[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-7), key
