"""DPOTrainer on a tiny model: what must not change the result, and what the reference is."""

import math
from pathlib import Path

import pytest
import torch

from posttrain import DPOConfig, DPOTrainer
from posttrain.data.share import keep_apart
from posttrain.models import load
from posttrain.ops import use_backend

SETTINGS = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 8,
    "max_steps": 4,
    "logging_steps": 1,
    "save_steps": 0,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "train_sampling_strategy": "sequential",
}


def trainer(model_dir: Path, output_dir: Path, rows: list, ref_model=None, **changes) -> DPOTrainer:
    return DPOTrainer(str(model_dir), ref_model, DPOConfig(output_dir=str(output_dir), **(SETTINGS | changes)), rows)


def moved(run: DPOTrainer) -> DPOTrainer:
    """The trainer with a policy that is not its reference any more."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return run


def first_step(run: DPOTrainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first step."""
    run.model.train()
    step = run._loop.source.step(0)
    losses = []
    for batch in step.batches:
        loss = run._loop.loss(run.model, batch, step)
        loss.value.backward()
        losses.append(loss.metrics["loss"].item())
    return sum(losses), {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}


def assert_same(first: DPOTrainer, second: DPOTrainer) -> None:
    (loss, gradients), (other_loss, other_gradients) = first_step(moved(first)), first_step(moved(second))
    assert abs(loss - other_loss) <= 1e-5 * abs(loss)
    assert gradients.keys() == other_gradients.keys()
    for name in gradients:
        assert (gradients[name] - other_gradients[name]).norm() <= 1e-5 * gradients[name].norm(), name


LOSSES = pytest.mark.parametrize("loss_type", [["sigmoid"], ["ipo", "aot"], ["aot_unpaired", "sft"]], ids="+".join)


@LOSSES
@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_change_nothing(model_dir, pair_rows, tmp_path, loss_type, size):
    whole = trainer(model_dir, tmp_path / "a", pair_rows, loss_type=loss_type)
    pairs = whole._loop.source._pairs[:8]
    longest = max(len(pair.chosen) + len(pair.rejected) for pair in whole._loop.source._pairs)
    parts = trainer(model_dir, tmp_path / "b", pair_rows, loss_type=loss_type, max_tokens_per_batch=longest * size)
    assert [batch.numbers.tolist() for batch in whole._loop.source.step(0).batches] == [list(range(len(pairs)))]
    assert len(parts._loop.source.step(0).batches) >= (5 if size == 1 else 2)
    assert_same(whole, parts)


@LOSSES
def test_shared_prompts_change_nothing(model_dir, pair_rows, tmp_path, loss_type, monkeypatch):
    shared = trainer(model_dir, tmp_path / "a", pair_rows, loss_type=loss_type)
    monkeypatch.setattr("posttrain.train.pairs.share_prefixes", keep_apart)
    copies = trainer(model_dir, tmp_path / "b", pair_rows, loss_type=loss_type)
    step, copied = (run._loop.source.step(0) for run in (shared, copies))
    assert copied.num_packed_tokens == copied.num_tokens == step.num_tokens
    assert step.num_packed_tokens < 0.7 * step.num_tokens
    assert_same(shared, copies)


def test_the_order_within_a_step_changes_nothing(model_dir, pair_rows, tmp_path):
    first = trainer(model_dir, tmp_path / "a", pair_rows, loss_type=["sigmoid", "aot"])
    other = trainer(model_dir, tmp_path / "b", pair_rows[7::-1] + pair_rows[8:], loss_type=["sigmoid", "aot"])
    assert_same(first, other)


def test_activation_checkpointing_changes_nothing(model_dir, pair_rows, tmp_path):
    plain = trainer(model_dir, tmp_path / "a", pair_rows)
    thrifty = trainer(model_dir, tmp_path / "b", pair_rows)
    thrifty.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(plain, thrifty)


def test_kernels_change_nothing(model_dir, pair_rows, tmp_path):
    fast = first_step(moved(trainer(model_dir, tmp_path / "a", pair_rows)))
    with use_backend("reference"):
        slow = first_step(moved(trainer(model_dir, tmp_path / "b", pair_rows)))
    assert abs(fast[0] - slow[0]) <= 1e-5
    for name, gradient in slow[1].items():
        assert (fast[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_dropout_is_off_unless_asked_for(model_dir, pair_rows, tmp_path):
    options = {"lora_r": 4, "lora_dropout": 0.5}
    run = moved(trainer(model_dir, tmp_path / "a", pair_rows, **options))
    assert first_step(run)[0] == first_step(run)[0]
    run = moved(trainer(model_dir, tmp_path / "b", pair_rows, disable_dropout=False, **options))
    assert first_step(run)[0] != first_step(run)[0]


def answers(model, run: DPOTrainer) -> torch.Tensor:
    """Log-probabilities of the first step's answers, by a plain forward pass over each."""
    found = []
    for pair in run._loop.source._pairs[:8]:
        for example in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(example.input_ids).long()
            with torch.no_grad():
                logprobs = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
            found.append(logprobs[torch.from_numpy(example.loss_mask[1:])].double().sum())
    return torch.stack(found).view(-1, 2)


def reference_of(run: DPOTrainer) -> torch.Tensor:
    (batch,) = run._loop.source.step(0).batches
    return run._pairs(run.model, batch)[0].reference


@pytest.mark.parametrize("kind", ["frozen copy", "adapter off", "copy of an adapter", "other model", "precomputed"])
def test_what_the_reference_is(model_dir, pair_rows, tmp_path, kind):
    plain, _ = load(model_dir, attn_implementation="eager")
    plain.eval()
    options: dict = {}
    ref_model = None
    if kind == "adapter off":
        options = {"lora_r": 4, "lora_target_modules": "q_proj,down_proj"}
    elif kind == "copy of an adapter":
        adapted = moved(trainer(model_dir, tmp_path / "first", pair_rows, lora_r=4))
        adapted.save_model(tmp_path / "adapter")
        plain = load(tmp_path / "adapter", attn_implementation="eager")[0].eval()
        model_dir = tmp_path / "adapter"
    elif kind == "other model":
        ref_model = load(model_dir)[0]
        with torch.no_grad():
            for parameter in ref_model.parameters():
                parameter.mul_(1.5)
        plain.load_state_dict(ref_model.state_dict())
    elif kind == "precomputed":
        options = {"precompute_ref_log_probs": True}
    run = trainer(model_dir, tmp_path / "run", pair_rows, ref_model, **options)
    expected = answers(plain, run)
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    torch.testing.assert_close(reference_of(run), expected, rtol=1e-5, atol=1e-4)
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    run.train()
    torch.testing.assert_close(reference_of(run), expected, rtol=1e-5, atol=1e-4)
    run.model.eval()
    assert (answers(run.model, run) - expected).abs().max() > 0.1
    if kind != "other model":
        assert abs(run.log_history[0]["loss"] - math.log(2)) <= 1e-7
        assert run.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-9)


def test_no_reference_where_nothing_depends_on_it(model_dir, pair_rows, tmp_path):
    run = trainer(model_dir, tmp_path, pair_rows, beta=0.0, loss_type=["sigmoid", "sft"])
    assert run._reference_policy is None
    computed = []
    run.model.get_input_embeddings().register_forward_hook(lambda module, ids, out: computed.append(ids[0].numel()))
    run.train()
    last = run.log_history[-1]
    assert sum(computed) == last["num_packed_tokens"]
    assert last["rewards/margins"] == 0
    assert last["loss"] < run.log_history[0]["loss"]
