"""LoRA on prepared models: the numbers of PEFT on the stock model, and PEFT's files."""

import json

import pytest
import torch
from lora_models import LENGTHS, filled, lora, stock, target_logprobs
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import FAMILIES, batch_of, tiny
from tolerance import assert_true_to

from posttrain.models import ModelError, add_lora, head, hidden_states, load_adapter, prepare, restore, token_logprobs
from posttrain.models.families import LoraLinear
from posttrain.models.lora_layers import is_lora
from posttrain.models.prepare import is_prepared


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_log_probabilities_and_gradients_are_those_of_peft(family, when):
    batch = batch_of(LENGTHS)
    exact = stock(family, lora())
    truth = target_logprobs(exact, batch)
    trained = [p for p in exact.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(truth.mean(), trained)

    model = tiny(family)
    if when == "before":
        prepare(model)
    torch.manual_seed(1)
    model = filled(add_lora(model, r=4, alpha=12))
    if when == "after":
        assert prepare(model).replaced["attention"] == 2
    ours = token_logprobs(model, batch).logprob
    assert_true_to(ours, truth)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for mine, true in zip(torch.autograd.grad(ours.mean(), parameters), slopes, strict=True):
        assert_true_to(mine, true)


@pytest.mark.parametrize("family", ["granite", "gpt_neox"])
def test_adapters_in_a_prepared_model_outside_the_families_run_our_ops(family):
    plain = tiny(family)
    prepare(plain)
    model = add_lora(plain, r=4)
    found = [type(module) for module in model.modules() if is_lora(module)]
    assert found and all(issubclass(kind, LoraLinear) for kind in found)
    restore(model)
    assert not is_prepared(model) and not any(isinstance(module, LoraLinear) for module in model.modules())


def test_only_the_adapter_is_trained_and_it_can_be_switched_off():
    batch = batch_of(LENGTHS)
    plain = tiny("llama")
    prepare(plain)
    expected = token_logprobs(plain, batch).logprob
    model = filled(add_lora(plain, r=4, alpha=12))
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())
    assert not torch.allclose(token_logprobs(model, batch).logprob, expected)
    with model.disable_adapter():
        assert torch.equal(token_logprobs(model, batch).logprob, expected)


def test_activation_checkpointing():
    batch = batch_of(LENGTHS)
    model = filled(add_lora(tiny("llama"), r=4, alpha=12)).train()
    prepare(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad(hidden_states(model, batch).pow(2).mean(), parameters)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = torch.autograd.grad(hidden_states(model, batch).pow(2).mean(), parameters)
    assert all(map(torch.equal, plain, again))


def test_files_are_pefts(tmp_path):
    batch = batch_of(LENGTHS)
    model = tiny("llama")
    prepare(model)
    torch.manual_seed(1)
    ours = filled(add_lora(model, r=4, alpha=12))
    ours.save_pretrained(tmp_path / "ours")
    stock("llama", lora(), torch.float32).save_pretrained(tmp_path / "stock")
    mine, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "stock"))
    assert list(mine) == list(theirs) and all(torch.equal(mine[key], theirs[key]) for key in mine)
    settings = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "stock")]
    assert {k: v for k, v in settings[0].items() if k != "target_modules"} == {
        k: v for k, v in settings[1].items() if k != "target_modules"
    }
    assert set(settings[0]["target_modules"]) == set(settings[1]["target_modules"])

    elsewhere = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "ours"))
    torch.testing.assert_close(target_logprobs(elsewhere, batch), token_logprobs(ours, batch).logprob)
    back = tiny("llama")
    prepare(back)
    back = load_adapter(back, tmp_path / "ours")
    assert torch.equal(token_logprobs(back, batch).logprob, token_logprobs(ours, batch).logprob)
    assert any(parameter.requires_grad for parameter in back.parameters())
    assert not any(
        p.requires_grad for p in load_adapter(tiny("llama"), tmp_path / "ours", trainable=False).parameters()
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_adapter_on_the_language_head(family):
    batch = batch_of(LENGTHS)
    config = lora(target_modules=["q_proj", "lm_head"])
    exact = stock(family, config)
    truth = target_logprobs(exact, batch)
    slopes = torch.autograd.grad(truth.mean(), [p for p in exact.parameters() if p.requires_grad])
    model = stock(family, config, torch.float32)
    prepare(model)
    lora_a, lora_b, scaling = head(model).lora
    assert (lora_a.shape, lora_b.shape, scaling) == ((4, 64), (97, 4), 3.0)
    ours = token_logprobs(model, batch).logprob
    assert_true_to(ours, truth)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for mine, true in zip(torch.autograd.grad(ours.mean(), parameters), slopes, strict=True):
        assert_true_to(mine, true)
    with model.disable_adapter():
        assert head(model).lora is None


def test_a_language_head_that_is_trained_whole():
    batch = batch_of(LENGTHS)
    model = stock("llama", lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), torch.float32)
    prepare(model)
    wrapper = model.get_base_model().lm_head
    assert head(model).weight is wrapper.modules_to_save["default"].weight
    token_logprobs(model, batch).logprob.mean().backward()
    assert wrapper.modules_to_save["default"].weight.grad is not None
    with model.disable_adapter():
        assert head(model).weight is wrapper.original_module.weight


def test_trained_norms_are_used():
    batch = batch_of(LENGTHS)
    config = lora(target_modules=["q_proj"], modules_to_save=["post_attention_layernorm", "norm"])
    exact, model = (stock("llama", config, dtype) for dtype in (torch.float64, torch.float32))
    prepare(model)
    with torch.no_grad():
        for wrapped in (exact, model):
            for name, parameter in wrapped.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(0.5)
        assert_true_to(token_logprobs(model, batch).logprob, target_logprobs(exact, batch))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_dropout": 0.1}, "it has dropout"),
        ({"use_dora": True}, "it is DoRA"),
        ({"lora_bias": True}, "its adapter has a bias"),
    ],
    ids=str,
)
def test_adapters_on_the_head_that_are_no_plain_lora_are_refused(options, reason):
    model = stock("llama", lora(target_modules=["lm_head"], **options), torch.float32).train()
    with pytest.raises(ModelError, match=f"must be plain LoRA without dropout: {reason}"):
        head(model)


def test_dropout_on_the_head_is_off_in_evaluation():
    model = stock("llama", lora(target_modules=["lm_head"], lora_dropout=0.1), torch.float32).eval()
    assert head(model).lora is not None


def test_two_active_adapters_on_the_head_add_up():
    batch = batch_of(LENGTHS)
    exact, model = (stock("llama", lora(target_modules=["lm_head"]), dtype) for dtype in (torch.float64, torch.float32))
    for each in (exact, model):
        torch.manual_seed(2)
        each.add_adapter("second", lora(target_modules=["lm_head"], r=3))
        filled(each)
        each.base_model.set_adapter(["default", "second"])
    exact.double()
    assert head(model).lora[0].shape == (7, 64)
    with torch.no_grad():
        assert_true_to(token_logprobs(model, batch).logprob, target_logprobs(exact, batch))


def test_prompt_tuning_is_refused():
    from peft import PromptTuningConfig

    model = get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ModelError, match="PROMPT_TUNING puts tokens of its own"):
        prepare(model)


def test_bad_names_are_an_error():
    with pytest.raises(ValueError, match="nonexistent"):
        add_lora(tiny("llama"), target_modules=["nonexistent"])


@pytest.mark.parametrize("alpha", [0, -16])
def test_an_alpha_that_switches_the_adapter_off_is_an_error(alpha):
    with pytest.raises(ValueError, match=f"alpha must be positive, got {alpha}"):
        add_lora(tiny("llama"), alpha=alpha)
