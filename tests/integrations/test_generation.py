"""Completions of TRL's GRPO and RLOO trainers, drawn by our engine under enable()."""

import pytest
import torch
import trl
from peft import LoraConfig
from tiny_models import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GenerationMixin

import posttrain
from posttrain.integrations import counters
from posttrain.integrations.trl_generation import _check_model, _sampling, _Unfit
from posttrain.models import prepare
from posttrain.models.causal_lm import causal_lm
from posttrain.rollout import SamplingParams
from posttrain.rollout.paged import PagedRunner

pytestmark = pytest.mark.filterwarnings("ignore")
ENGINE = "completions by the engine"
PROMPTS = ["What is 1 + 2? ", "And 30 + 400, what is that? ", "What is 1 + 2? ", "One"]


def trainer_of(kind, model_dir, output_dir, *, ends=None, peft_config=None, **options):
    """A trainer of TRL, which generates without sampling unless told otherwise."""
    from datasets import Dataset

    settings = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 12, "bf16": False}
    settings |= {"generation_kwargs": {"do_sample": False}, "gradient_checkpointing": False, **options}
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
    model.generation_config.eos_token_id = ends
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for weight in (p for p in model.parameters() if p.ndim == 2):  # large, so that tokens don't repeat themselves
            weight.normal_(0, 0.3)
    return getattr(trl, f"{kind}Trainer")(
        model,
        reward_funcs=lambda completions, **columns: [float(len(one)) for one in completions],
        args=getattr(trl, f"{kind}Config")(
            output_dir=str(output_dir), use_cpu=True, report_to="none", disable_tqdm=True, **settings
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        peft_config=peft_config,
    )


def completions(trainer, prompts=PROMPTS):
    """The ids that the trainer's own method returns."""
    ids = trainer.processing_class(text=prompts)["input_ids"]
    if isinstance(trainer, trl.GRPOTrainer):
        return trainer._generate_single_turn(ids, None, {}, 2)[0]
    return trainer._generate_single_turn(ids, None, {})


def both(*arguments, **options):
    """Completions of one trainer with and then without the hooks, and what these counted."""
    posttrain.enable()
    try:
        trainer = trainer_of(*arguments, **options)
        found = completions(trainer)
        assert "generate" not in vars(causal_lm(trainer.model))
    finally:
        posttrain.disable()
    return found, completions(trainer), counters()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GRPO", {}),
        ("RLOO", {}),
        ("GRPO", {"gradient_checkpointing": True}),
        ("GRPO", {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)}),
    ],
    ids=["GRPO", "RLOO", "checkpointing", "LoRA"],
)
def test_without_sampling_the_tokens_are_those_of_transformers(kind, options, model_dir, tmp_path):
    found, expected, fired = both(kind, model_dir, tmp_path, **options)
    assert found == expected
    assert found[0] == found[2] != found[1]
    assert fired[ENGINE] == 1
    assert fired["self-check of the layers of Qwen3Model passed"] == 1


def test_completions_end_where_the_model_says_so(model_dir, tmp_path):
    whole = completions(trainer_of("GRPO", model_dir, tmp_path))
    end = next(token for token in whole[1][4:] if token not in whole[1][:4])
    found, expected, fired = both("GRPO", model_dir, tmp_path, ends=[end])
    assert found == expected
    assert found[1] == whole[1][: whole[1].index(end) + 1]
    assert fired[ENGINE] == 1


def test_samples_of_equal_prompts_differ_and_follow_the_seed(model_dir, tmp_path, enabled):
    trainer = trainer_of("GRPO", model_dir, tmp_path, generation_kwargs=None)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(completions(trainer))
    assert counters()[ENGINE] == 3
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][2]


def test_the_forward_that_trl_replaces_does_not_keep_the_engine_from_its_decoder(
    model_dir, tmp_path, enabled, monkeypatch
):
    obstacles, begin = [], PagedRunner.begin

    def watched(runner):
        begin(runner)
        obstacles.append(runner.obstacle)

    monkeypatch.setattr(PagedRunner, "begin", watched)
    trainer = trainer_of("GRPO", model_dir, tmp_path)
    assert "forward" in vars(trainer.model)
    completions(trainer)
    assert obstacles == [None]


def test_a_run_trains_on_what_the_engine_draws(model_dir, tmp_path, enabled):
    trainer = trainer_of("GRPO", model_dir, tmp_path, generation_kwargs=None, max_steps=2, logging_steps=1)
    before = trainer.model.get_input_embeddings().weight.detach().clone()
    trainer.train()
    assert counters()[ENGINE] == 2
    assert not torch.equal(trainer.model.get_input_embeddings().weight, before)


def test_adapters_that_look_for_tokens_of_the_prompt_are_left_to_transformers(model_dir, tmp_path):
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "init_lora_weights": False}
    activated = LoraConfig(alora_invocation_tokens=[5, 6], **options)
    found, expected, fired = both("GRPO", model_dir, tmp_path, peft_config=activated)
    assert found == expected
    assert fired["completions by transformers: PEFT's layers get alora_offsets for each row of the batch"] == 1


def test_a_generate_of_the_scripts_own_is_called_and_stays(model_dir, tmp_path, enabled):
    trainer = trainer_of("GRPO", model_dir, tmp_path)
    theirs, calls = trainer.model.generate, []

    def own(**inputs):
        calls.append(len(inputs["input_ids"]))
        return theirs(**inputs)

    trainer.model.generate = own
    completions(trainer)
    assert calls == [4] and trainer.model.generate is own
    assert counters()["completions by transformers: the model has a generate of its own"] == 1


def test_without_memory_for_a_sequence_transformers_draws(model_dir, tmp_path, enabled, monkeypatch):
    trainer = trainer_of("GRPO", model_dir, tmp_path)
    monkeypatch.setattr("posttrain.rollout.engine.free_memory", lambda device: 1 << 12)
    assert [len(one) for one in completions(trainer)] == [12] * 4
    assert counters()["completions by transformers: there is no memory for the keys and values of a sequence"] == 1


def test_mixed_precision_on_a_cpu(model_dir, tmp_path, enabled):
    trainer = trainer_of("GRPO", model_dir, tmp_path, bf16=True)
    assert [len(one) for one in completions(trainer)] == [12] * 4
    assert counters()[ENGINE] == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty is 1.2"),
        ({"cache_implementation": "dynamic"}, "cache_implementation is 'dynamic'"),
        ({"generation_kwargs": {"do_sample": False, "num_beams": 2}}, "num_beams is 2"),
        ({"generation_kwargs": {"do_sample": False, "eos_token_id": [7]}}, "eos_token_id is [7]"),
        ({"max_completion_length": 5000}, "completions may go beyond the model's"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_engine_cannot_follow_is_left_to_transformers(
    options, reason, model_dir, tmp_path, enabled, capsys, monkeypatch
):
    trainer = trainer_of("GRPO", model_dir, tmp_path, **options)
    for name in ("_sample", "_beam_search"):  # as if done after a token
        monkeypatch.setattr(GenerationMixin, name, lambda self, ids, **kwargs: torch.cat([ids, ids[:, -1:]], 1))
    assert {len(one) for one in completions(trainer)} == {1}
    [counted] = [what for what in counters() if what.startswith("completions")]
    assert counted.startswith("completions by transformers") and reason in counted
    assert capsys.readouterr().out.count(reason) == 1


def settings(**given):
    """As transformers completes them."""
    defaults = GenerationConfig._get_default_generation_params()
    return GenerationConfig(**{**defaults, "max_length": None, "pad_token_id": 0, "max_new_tokens": 9, **given})


def test_settings_of_the_engine():
    sampled = settings(do_sample=True, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1)
    assert _sampling(sampled) == SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, max_tokens=9)
    assert _sampling(settings(do_sample=True, top_k=0)) == SamplingParams(max_tokens=9)
    assert _sampling(settings(top_k=5)) == SamplingParams(temperature=0, max_tokens=9)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"max_new_tokens": None}, "max_new_tokens is None"),
        ({"pad_token_id": None}, "pad_token_id is None"),
        ({"do_sample": True, "temperature": 1e-9}, "temperature must be 0, or finite"),
        ({"min_new_tokens": 4}, "min_new_tokens is 4"),
        ({"suppress_tokens": [3]}, r"suppress_tokens is \[3\]"),
        ({"guidance_scale": 0.0}, "guidance_scale is 0.0"),
    ],
)
def test_settings_that_the_engine_has_not(given, reason):
    with pytest.raises(_Unfit, match=reason):
        _sampling(settings(**given))


class FullyShardedDataParallel(torch.nn.Module):
    """By its name."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model, "_tp_size", 2), "divided among processes"),
        (lambda model: setattr(model.lm_head.weight, "ds_id", 1), "divided among processes"),
        (lambda model: model.add_module("part", FullyShardedDataParallel()), "divided among processes"),
        (lambda model: model.lm_head.register_forward_hook(print), "language head has hooks"),
        (lambda model: model.lm_head.to("meta"), "several devices"),
        (lambda model: setattr(model.to("meta"), "_original_forward", None), "mixed precision on meta"),
        (lambda model: model.set_attn_implementation("sdpa"), "attention is not ours"),
    ],
    ids=["tensor parallelism", "ZeRO-3", "FSDP", "hooks", "devices", "mixed precision", "attention"],
)
def test_models_that_the_engine_has_not(change, reason):
    model = tiny("llama")
    prepare(model)
    _check_model(model)
    change(model)
    with pytest.raises(_Unfit, match=reason):
        _check_model(model)
