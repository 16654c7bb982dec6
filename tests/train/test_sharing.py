"""SFT on examples that begin alike: their common tokens are computed once, and nothing else changes."""

from pathlib import Path

import pytest
import torch
from sft_config import assert_equivalent, sft_config

from posttrain import SFTTrainer
from posttrain.data.share import keep_apart


@pytest.fixture(params=["shared_rows", "conversation_trees"])
def data(request) -> list:
    return request.getfixturevalue(request.param)


def trainer(model, output_dir: Path, rows: list, **changes) -> SFTTrainer:
    tokenizer = changes.pop("processing_class", None)
    args = sft_config(output_dir, **{"train_sampling_strategy": "sequential", **changes})
    return SFTTrainer(model, args, rows, processing_class=tokenizer)


@pytest.fixture
def unshared(monkeypatch):
    """A trainer as above, whose examples stay apart."""

    def make(*arguments, **changes) -> SFTTrainer:
        with monkeypatch.context() as patch:
            patch.setattr("posttrain.train.source.share_prefixes", keep_apart)
            return trainer(*arguments, **changes)

    return make


def train(run: SFTTrainer) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """The loss and the gradients of every step."""
    gradients: list[dict[str, torch.Tensor]] = []
    step = run._loop._optimizer.step

    def recording(learning_rate: float) -> torch.Tensor:
        gradients.append({name: parameter.grad.clone() for name, parameter in run.model.named_parameters()})
        return step(learning_rate)

    run._loop._optimizer.step = recording
    run.train()
    return torch.tensor([record["loss"] for record in run.log_history if "loss" in record]), gradients


def assert_same(first: SFTTrainer, second: SFTTrainer) -> None:
    """Losses and gradients of all steps agree to 1e-5."""
    (losses, gradients), (other_losses, other_gradients) = train(first), train(second)
    assert (losses - other_losses).abs().max() <= 1e-5
    for one, other in zip(gradients, other_gradients, strict=True):
        for name in one:
            assert (one[name] - other[name]).norm() <= 1e-5 * one[name].norm(), name


def test_losses_and_gradients_are_those_of_copies(model_dir, data, unshared, tmp_path):
    shared, copies = trainer(str(model_dir), tmp_path / "a", data), unshared(str(model_dir), tmp_path / "b", data)
    assert_same(shared, copies)
    assert shared.log_history[-1]["num_tokens"] == copies.log_history[-1]["num_tokens"]
    assert copies.log_history[-1]["num_packed_tokens"] == copies.log_history[-1]["num_tokens"]


def test_micro_batches_change_nothing(model_dir, data, tmp_path):
    whole = trainer(str(model_dir), tmp_path / "a", data)
    longest = max(len(example) for example in whole._loop.source._examples)
    parts = trainer(str(model_dir), tmp_path / "b", data, max_tokens_per_batch=longest)
    assert len(whole._loop.source.step(0).batches) == 1
    assert len(parts._loop.source.step(0).batches) >= 4
    assert_same(whole, parts)


def test_50_steps_follow_those_of_copies(model_dir, shared_rows, unshared, tmp_path):
    changes = {"max_steps": 50, "train_sampling_strategy": "random"}
    shared = trainer(str(model_dir), tmp_path / "a", shared_rows, **changes)
    copies = unshared(str(model_dir), tmp_path / "b", shared_rows, **changes)
    assert_equivalent(train(shared)[0], train(copies)[0])


def test_shared_tokens_are_computed_once(model_dir, data, tmp_path):
    run = trainer(str(model_dir), tmp_path, data)
    computed = []
    run.model.get_input_embeddings().register_forward_hook(lambda module, ids, out: computed.append(ids[0].numel()))
    run.train()
    last = run.log_history[-1]
    assert sum(computed) == last["num_packed_tokens"] < 0.65 * last["num_tokens"]


def test_evaluation_shares_too(model_dir, data, unshared, tmp_path):
    settings = {"max_steps": 1}
    shared, copies = trainer(str(model_dir), tmp_path, data, **settings), unshared(str(model_dir), tmp_path, data)
    for run in (shared, copies):
        run._loop.eval_source = run._loop.source
    everything = shared._loop.source.everything()
    assert everything.num_packed_tokens < 0.65 * everything.num_tokens
    for name, value in copies.evaluate().items():
        assert shared.evaluate()[name] == pytest.approx(value, abs=1e-5)


def test_a_model_that_runs_padded_shares_nothing(model_dir, shared_rows, tmp_path):
    """A recurrent model's state can't be continued by several branches in one row."""
    from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=258, hidden_size=16, state_size=4, num_hidden_layers=1, pad_token_id=0)
    run = trainer(
        MambaForCausalLM(config),
        tmp_path,
        shared_rows,
        max_steps=1,
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )
    run.train()
    assert run.log_history[-1]["num_packed_tokens"] == run.log_history[-1]["num_tokens"]
