"""shared_prefix: forwards, losses and gradients of padded and padding-free batches, against the same without it."""

import numpy as np
import pytest
import torch
from prompted_batches import ANSWERS, PROMPTS, padded, padding_free
from tiny_models import FAMILIES, OTHERS, VOCABULARY, tiny

import posttrain
from posttrain.integrations import counters
from posttrain.integrations.counting import forget
from posttrain.integrations.regroup import regroup
from posttrain.integrations.shared_prefix import shared_where_possible
from posttrain.models import ModelError, prepare
from posttrain.models.prepare import is_prepared

BATCHES = {"left": lambda: padded("left"), "right": lambda: padded("right"), "padding-free": padding_free}


def unchecked() -> dict[str, int]:
    """The counters without the self-check of patched models."""
    return {what: count for what, count in counters().items() if not what.startswith("self-check")}


def results(model, batch, logits_to_keep=0):
    """Logits of the tokens that aren't padding, their loss, and every gradient."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    predicted = mask * torch.nn.functional.pad(mask, (1, 0), value=1)[:, :-1]  # not from padding
    labels = batch["input_ids"].masked_fill(predicted == 0, -100)
    model.zero_grad()
    logits = model(**batch, use_cache=False, logits_to_keep=logits_to_keep).logits
    labels, kept = labels[:, -logits.shape[1] :], mask[:, -logits.shape[1] :].bool()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return logits[kept], loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    torch.testing.assert_close(found[:2], expected[:2])
    assert found[2].keys() == expected[2].keys() and found[2]
    for name in found[2]:
        torch.testing.assert_close(found[2][name], expected[2][name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_equal_to_the_plain_forward(family, kind):
    batch = BATCHES[kind]()
    nan = family == "gemma2" and kind != "padding-free"  # float64: of transformers' eager attention, for padding
    logits, loss, gradients = results(tiny(family, torch.float32 if nan else torch.float64), batch)
    model = tiny(family)
    prepare(model)
    forget()
    with posttrain.shared_prefix(model):
        found = results(model, batch)
    assert unchecked() == {"batch with shared prefixes": 1}
    assert_same(found, (logits.float(), loss.float(), {name: gradient.float() for name, gradient in gradients.items()}))
    assert "forward" not in vars(model.base_model)


def test_each_prefix_is_computed_once_and_no_padding():
    batch = regroup(**padded("left"), position_ids=None)
    assert batch.layout.num_tokens == sum(PROMPTS) + sum(map(sum, ANSWERS)) < batch.tokens
    assert sorted(np.diff(batch.layout.segment_starts).tolist()) == sorted([*PROMPTS, *ANSWERS[0], *ANSWERS[1]])
    real = padded("left")["attention_mask"].bool()
    assert torch.equal(batch.input_ids[batch.places[real]], padded("left")["input_ids"][real])
    assert (batch.places[~real] == len(batch.input_ids)).all()
    hidden = batch.spread(torch.ones(len(batch.input_ids), 3))
    assert torch.equal(hidden, real[..., None].expand(-1, -1, 3).float())


def test_prefixes_at_other_positions_are_others():
    rows = {"input_ids": torch.arange(5, 45).expand(3, -1), "attention_mask": torch.ones(3, 40, dtype=torch.long)}
    positions = torch.arange(40) + torch.tensor([0, 7, 0])[:, None]
    assert regroup(**rows, position_ids=None).layout.num_tokens == 40
    assert regroup(**rows, position_ids=positions).layout.num_tokens == 80
    moved = tiny("llama")
    prepare(moved)
    with posttrain.shared_prefix(moved):
        expected = tiny("llama", torch.float64)(**rows, position_ids=positions).logits
        torch.testing.assert_close(moved(**rows, position_ids=positions).logits, expected.float())


def test_sequences_without_anything_in_common():
    model = tiny("qwen3")
    prepare(model)
    batch = {name: x[::3] for name, x in padded("right").items()}
    expected = results(tiny("qwen3", torch.float64), batch)
    forget()
    with posttrain.shared_prefix(model):
        found = results(model, batch)
    assert unchecked() == {"batch without padding": 1}
    assert_same(found, (expected[0].float(), expected[1].float(), {n: g.float() for n, g in expected[2].items()}))


@pytest.mark.parametrize("keep", [7, torch.tensor([0, 3, 21])])
def test_logits_to_keep(keep):
    model = tiny("llama")
    prepare(model)
    batch = padded("right")
    expected = tiny("llama", torch.float64)(**batch, logits_to_keep=keep).logits
    with posttrain.shared_prefix(model):
        output = model(**batch, logits_to_keep=keep)
    kept = batch["attention_mask"][:, -keep:] if isinstance(keep, int) else batch["attention_mask"][:, keep]
    assert output.logits.shape == (6, kept.shape[1], VOCABULARY) and output.past_key_values is None
    torch.testing.assert_close(output.logits[kept.bool()], expected[kept.bool()].float())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_runs_layers_again_after_it(reentrant):
    batch = padded("left")
    expected = results(tiny("qwen3", torch.float64), batch)[2]
    model = tiny("qwen3").train()
    prepare(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    labels = batch["input_ids"] * torch.nn.functional.pad(batch["attention_mask"], (1, 0))[:, :-1]
    with posttrain.shared_prefix(model):
        loss = model(**batch, labels=labels.masked_fill(labels == 0, -100)).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].float())


def test_adapters():
    from peft import LoraConfig, get_peft_model

    def adapted(dtype):
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        torch.manual_seed(0)
        return get_peft_model(tiny("llama", dtype), config).to(dtype)

    batch, model = padded("left"), adapted(torch.float32)
    expected = results(adapted(torch.float64), batch)
    posttrain.patch(model)
    with posttrain.shared_prefix(model):
        found = results(model, batch)
    assert_same(found, (expected[0].float(), expected[1].float(), {n: g.float() for n, g in expected[2].items()}))


def test_a_model_that_was_not_patched_is(capsys):
    model = tiny("llama")
    with posttrain.shared_prefix(model), posttrain.shared_prefix(model):
        forget()
        model(**padded("left"))
    assert unchecked() == {"batch with shared prefixes": 1}
    assert "replaced attention (2)" in capsys.readouterr().out
    assert "forward" not in vars(model.model) and model.config._attn_implementation == "posttrain"


def holes():
    mask = padded("right")["attention_mask"]
    mask[1, 4] = 0
    return {"attention_mask": mask}


REFUSED = {
    "a cache": (lambda: {"use_cache": True}, "the forward has a cache"),
    "all hidden states": (lambda: {"output_hidden_states": True}, "output_hidden_states asks for more"),
    "holes": (holes, "row 1 of the attention_mask has padding between tokens"),
    "another mask": (lambda: {"attention_mask": torch.ones(6, 7)}, r"attention_mask is \[6, 7\]"),
    "other positions": (lambda: {"position_ids": torch.ones(2, 29)}, r"position_ids are \[2, 29\]"),
    "restarts": (lambda: {"position_ids": torch.arange(29)[None] % 20}, "position_ids of row 0 don't go up by one"),
    "nothing": (lambda: {"attention_mask": torch.zeros(6, 29)}, "no token but padding"),
    "other tensors": (lambda: {"token_type_ids": torch.ones(6, 29)}, "token_type_ids would have to be regrouped"),
    "no ids": (lambda: {"input_ids": None, "inputs_embeds": torch.ones(6, 29, 64)}, "needs input_ids"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what):
    change, message = REFUSED[what]
    model = tiny("llama")
    prepare(model)
    with posttrain.shared_prefix(model), pytest.raises(ValueError, match=message):
        model(**{**padded("right"), **change()})
    assert "forward" not in vars(model.model)


def test_generation_is_refused():
    model = tiny("llama")
    prepare(model)
    with posttrain.shared_prefix(model), pytest.raises(ValueError, match="has a cache"):
        model.generate(**padded("left"), max_new_tokens=2)


def test_other_attention_is_refused():
    model = tiny("llama")
    prepare(model, attention=False)
    with pytest.raises(ModelError, match="LlamaForCausalLM is 'sdpa'"), posttrain.shared_prefix(model):
        pass


@pytest.mark.parametrize("given", ["patched", "as it was"])
def test_a_model_that_is_refused_stays_as_it_was(given):
    model = tiny("llama")
    model.set_attn_implementation("eager")
    if given == "patched":
        posttrain.patch(model)
    with pytest.raises(ModelError, match="'eager', not ours"), posttrain.shared_prefix(model):
        pass
    assert is_prepared(model) == (given == "patched")


def test_what_is_no_model_is_refused():
    with pytest.raises(ModelError, match="str is not a causal language model"), posttrain.shared_prefix("x"):
        pass


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_a_batch_without_tokens_is_refused(shape):
    model = tiny("llama")
    with posttrain.shared_prefix(model), pytest.raises(ValueError, match=r"the batch \[\d, \d\] has no tokens"):
        model(torch.zeros(shape, dtype=torch.long))


def test_trainers_share_where_it_is_possible(capsys):
    from peft import PromptTuningConfig, get_peft_model

    model, other, batch = tiny("llama"), tiny("llama"), padded("right")
    prepare(model)
    prepare(other)
    tuned = get_peft_model(other, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    expected = model(**batch).logits
    forget()
    with shared_where_possible(model, None, tiny("qwen3"), tuned):
        assert model(**batch, output_hidden_states=True).hidden_states[0].shape == (6, 29, 64)
        assert torch.equal(model(**batch, use_cache=True).logits, expected)
        model(**batch)
    left = [what for what in counters() if "left" in what]
    assert len(left) == 3 and counters()["batch with shared prefixes"] == 1
    assert any("puts tokens of its own before every sequence" in what for what in left)
    assert "a batch is left as it is: the forward has a cache" in capsys.readouterr().out
    assert "forward" not in vars(model.model) and "forward" not in vars(other.model)
