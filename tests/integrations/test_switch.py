"""enable and disable: TRL's own trainers with and without our hooks, and that nothing stays behind."""

import operator

import pytest
import torch
import transformers
import trl
from lora_models import filled
from peft import PeftModel, get_peft_model
from tiny_models import tiny
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl.trainer import utils

import posttrain
from posttrain.integrations import counters
from posttrain.integrations.switch import _refuse_parts_of_sequences
from posttrain.integrations.trl_batches import BATCHES, methods
from posttrain.integrations.trl_generation import GENERATION
from posttrain.models import prepare
from posttrain.models.families import LoraLinear
from posttrain.models.prepare import is_prepared

STEPS = 4
COMMON = {
    "optim": "sgd",  # AdamW makes much of the rounding of gradients that are almost 0
    "learning_rate": 0.1,
    "per_device_train_batch_size": 4,
    "max_steps": STEPS,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "bf16": False,
    "use_cpu": True,
    "train_sampling_strategy": "sequential",
}
HOOKS = (
    (PreTrainedModel, "from_pretrained"),
    (PeftModel, "__init__"),
    (Trainer, "__init__"),
    (utils, "_ChunkedLogProbFunction"),
)
HOOKS = (*HOOKS, *((Trainer, name) for name in ("compute_loss", "prediction_step", "train", "evaluate", "predict")))
if hasattr(utils, "_use_triton"):  # since TRL 1.16
    HOOKS = (*HOOKS, (utils, "_use_triton"))


class Recorder(TrainerCallback):
    """The gradients of every step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, *args, model, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def hooks() -> list:
    return [vars(owner)[name] for owner, name in HOOKS]


def methods_of(trainer) -> list:
    return [vars(cls)[name] for names in (BATCHES, GENERATION) for cls, name in methods(type(trainer), names)]


def prompts_and_completions(rows):
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]


def labelled(rows):
    good = [{**row, "label": True} for row in prompts_and_completions(rows)]
    bad = [{"prompt": row["prompt"], "completion": row["rejected"], "label": False} for row in rows]
    return [row for pair in zip(good, bad, strict=True) for row in pair]


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)


def short(completions, **kwargs):
    return [-float(len(completion)) for completion in completions]


OFFLINE = {"max_length": 40}
ON_POLICY = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1}
ON_POLICY["cache_implementation"] = "dynamic"  # so that transformers draws the completions, the same ones for both
CASES = {
    "SFT": ("SFT", prompts_and_completions, OFFLINE, {}),
    "SFT packed": ("SFT", prompts_and_completions, {**OFFLINE, "packing": True}, {}),
    "SFT LoRA": ("SFT", prompts_and_completions, OFFLINE, {"peft_config": lora}),
    "DPO": ("DPO", list, OFFLINE, {}),
    "DPO weighted": ("DPO", list, {**OFFLINE, "use_weighting": True}, {}),
    "KTO": ("KTO", labelled, OFFLINE, {}),
    "GRPO": ("GRPO", prompts_and_completions, ON_POLICY, {"reward_funcs": lambda: short}),
    "RLOO": ("RLOO", prompts_and_completions, ON_POLICY, {"reward_funcs": lambda: short}),
}


def trained(case, model_dir, output_dir, rows):
    """The log of TRL's trainer, the gradients of every step, and the trainer."""
    from datasets import Dataset

    method, shape, options, extras = CASES[case]
    torch.manual_seed(0)
    recorder = Recorder()
    trainer = getattr(trl, f"{method}Trainer")(
        AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32"),
        args=getattr(trl, f"{method}Config")(output_dir=str(output_dir), **COMMON, **options),
        train_dataset=Dataset.from_list(shape(rows)),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        callbacks=[recorder],
        **{name: make() for name, make in extras.items()},
    )
    trainer.train()
    return [record for record in trainer.state.log_history if "loss" in record], recorder.gradients, trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_trainers_of_trl(case, model_dir, rows, tmp_path):
    expected, their_gradients, trainer = trained(case, model_dir, tmp_path / "theirs", rows)
    before = hooks() + methods_of(trainer)
    posttrain.enable()
    try:
        found, gradients, trainer = trained(case, model_dir, tmp_path / "ours", rows)
        fired = counters()
        assert is_prepared(trainer.model)
        assert all(map(operator.is_not, hooks() + methods_of(trainer), before))
    finally:
        posttrain.disable()
    assert len(found) == len(expected) == len(gradients) == STEPS
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in (name for name in one if "time" not in name):
            assert abs(float(one[name]) - float(other[name])) <= 1e-4, name
    for one, other in zip(gradients, their_gradients, strict=True):
        assert one.keys() == other.keys() and len(one) > 0
        for name in one:
            torch.testing.assert_close(one[name], other[name])
    assert any(gradient.any() for gradient in gradients[-1].values())
    assert fired["trainer made"] == 1
    assert fired["model prepared"] == (1 if case.startswith("SFT") else 2)  # the policy and its reference
    assert fired["language head by linear_logprob"] >= STEPS
    assert fired["self-check of the layers of Qwen3Model passed"] == fired["model prepared"]
    assert fired["self-check of the language head passed"] == 1
    alone = fired.get("batch without padding", 0) if case.startswith("SFT") else 0
    assert alone + fired.get("batch with shared prefixes", 0) >= STEPS
    assert not [what for what in fired if "left" in what]
    assert hooks() + methods_of(trainer) == before
    assert not is_prepared(trainer.model)
    assert trainer.model.config._attn_implementation == "sdpa"


def test_enable_says_what_and_twice_is_once(model_dir, enabled, capsys):
    hooked = hooks()
    posttrain.enable()
    assert hooks() == hooked
    for _ in range(2):
        AutoModelForCausalLM.from_pretrained(model_dir)
    assert counters() == {"model prepared": 2}
    assert capsys.readouterr().out.count("Qwen3ForCausalLM: replaced attention (2)") == 1


def test_enable_prints_once(capsys):
    posttrain.enable()
    posttrain.disable()
    said = capsys.readouterr().out
    assert f"transformers {transformers.__version__}" in said
    assert "language head in TRL's trainers: linear_logprob" in said
    assert "transformers' own Trainer: its loss by linear_logprob" in said


def test_an_untested_version_raises_and_replaces_nothing(monkeypatch):
    from posttrain.integrations import versions

    before = hooks()
    monkeypatch.setitem(versions.TESTED, "trl", ("1.10", "1.14"))
    with pytest.raises(ValueError, match=rf"tested with trl 1\.10\.\* to 1\.14\.\*, and {trl.__version__} is"):
        posttrain.enable()
    assert hooks() == before
    posttrain.enable(allow_untested=True)
    assert hooks() != before
    posttrain.disable()
    assert hooks() == before


def test_a_failure_half_way_leaves_no_hooks(monkeypatch):
    def fails(theirs):
        raise RuntimeError("half way")

    before = hooks()
    monkeypatch.setattr("posttrain.integrations.switch.language_head", fails)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="half way"):
            posttrain.enable()
        assert hooks() == before


def test_models_that_were_prepared_by_hand_stay_so(model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    prepare(model)
    posttrain.enable()
    from posttrain.integrations.models import attach

    attach(model)
    posttrain.disable()
    assert is_prepared(model)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"attn_implementation": "eager"}, "'eager'"), ({"attention_dropout": 0.1}, "attention_dropout is 0.1")],
)
def test_attention_that_stays(model_dir, enabled, capsys, options, reason):
    model = AutoModelForCausalLM.from_pretrained(model_dir, **options)
    assert model.config._attn_implementation == options.get("attn_implementation", "sdpa")
    assert is_prepared(model)
    assert reason in capsys.readouterr().out


def test_attention_whose_default_is_eager_is_replaced(enabled, tmp_path):
    model, ids = tiny("gemma2"), torch.arange(3, 40).repeat(2, 1)
    model.save_pretrained(tmp_path)
    assert model.config._attn_implementation == "eager"
    expected = model.double()(ids).logits
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert ours.config._attn_implementation == "posttrain"
    torch.testing.assert_close(ours(ids).logits, expected.float())
    assert counters()["self-check of the layers of Gemma2Model passed"] == 1
    posttrain.disable()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)  # whose default is "sdpa" in some releases
    assert ours.config._attn_implementation == loaded.config._attn_implementation


def test_a_model_made_from_a_configuration_gets_our_ops_with_its_trainer(enabled, tmp_path):
    model = tiny("llama")
    assert not is_prepared(model)
    Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"))
    assert is_prepared(model)
    assert counters() == {"trainer made": 1, "model prepared": 1}
    posttrain.disable()
    assert not is_prepared(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["late", "again"])
def test_a_trainer_that_exists_gets_our_ops_when_it_is_used(model_dir, rows, tmp_path, when):
    from datasets import Dataset

    if when == "again":
        posttrain.enable()
    models = [AutoModelForCausalLM.from_pretrained(model_dir) for _ in range(2)]
    settings = {"max_steps": 1, **OFFLINE}
    trainer = trl.DPOTrainer(
        *models,
        args=trl.DPOConfig(output_dir=str(tmp_path), **{**COMMON, **settings}),
        train_dataset=Dataset.from_list(rows[:4]),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )
    posttrain.disable()
    assert not any(map(is_prepared, models))
    posttrain.enable()
    try:
        trainer.train()
        fired = counters()
        assert all(map(is_prepared, models))
    finally:
        posttrain.disable()
    assert fired["model prepared"] == 2 and fired["language head by linear_logprob"] >= 1
    assert fired["batch with shared prefixes"] >= 1
    assert not any(map(is_prepared, models))


@pytest.mark.parametrize("use", ["train", "evaluate", "predict"])
def test_transformers_own_trainer_that_exists(use, tmp_path):
    model, ids = tiny("llama"), list(range(3, 23))
    args = TrainingArguments(output_dir=str(tmp_path), **{**COMMON, "max_steps": 1}, prediction_loss_only=True)
    rows = [{"input_ids": ids, "labels": ids}] * 4
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)
    posttrain.enable()
    try:
        trainer.predict(rows) if use == "predict" else getattr(trainer, use)()
        assert is_prepared(model)
        assert counters()["model prepared"] == 1 and counters()["batch with shared prefixes"] >= 1
    finally:
        posttrain.disable()
    assert not is_prepared(model)


def forwards(module):
    """The functions of the bound methods that Accelerate keeps in a module, and in what it calls in their place."""
    held = (module.__dict__, getattr(module.__dict__.get("forward"), "__dict__", {}))
    return [each.__func__ for part in held for each in part.values() if hasattr(each, "__func__")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("by", ["enable", "patch"])
def test_what_accelerate_dispatched_gets_its_own_forwards_back(model_dir, by):
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_module

    ids = torch.arange(3, 23)[None]
    expected = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")(ids).logits
    if by == "enable":
        posttrain.enable()
    try:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
        if by == "patch":
            posttrain.patch(model)
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
        torch.testing.assert_close(model(ids).logits, expected)
        noted = sum(len(forwards(module)) for module in model.modules())
    finally:
        posttrain.unpatch(model) if by == "patch" else posttrain.disable()
    assert torch.equal(model(ids).logits, expected)
    kept = [(module, forward) for module in model.modules() for forward in forwards(module)]
    assert len(kept) == noted > 0 and all(forward is type(module).forward for module, forward in kept)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.filterwarnings("ignore")
def test_what_accelerate_noted_for_mixed_precision_is_the_models_own(tmp_path):
    model = tiny("llama")
    own = type(model).forward
    args = TrainingArguments(output_dir=str(tmp_path), **{**COMMON, "max_steps": 1, "bf16": True})
    rows = [{"input_ids": list(range(3, 23)), "labels": list(range(3, 23))}] * 4
    posttrain.enable()
    try:
        trainer = Trainer(model=model, args=args, train_dataset=rows)
        trainer.train()
        assert vars(model)["_original_forward"].__func__ is not own
    finally:
        posttrain.disable()
    assert vars(model)["_original_forward"].__func__ is own
    trainer.train()


def test_parts_of_sequences_are_refused():
    from accelerate import Accelerator, ParallelismConfig

    accelerator = Accelerator(cpu=True)
    _refuse_parts_of_sequences(accelerator)
    accelerator.state.parallelism_config = ParallelismConfig(cp_size=2)
    try:
        with pytest.raises(ValueError, match=r"takes whole sequences.*\(cp_size 2, sp_size 1\)"):
            _refuse_parts_of_sequences(accelerator)
    finally:
        accelerator.state.parallelism_config = None


def test_other_models_are_left_alone_with_the_reason(enabled, capsys, tmp_path):
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=32, **shape)).save_pretrained(tmp_path)
    BertModel.from_pretrained(tmp_path)
    reason = "BertModel is not a causal language model of transformers"
    assert counters() == {f"model left alone: {reason}": 1}
    assert reason in capsys.readouterr().out


def test_checkpoints_are_the_same(model_dir, enabled, tmp_path):
    AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (model_dir / name).read_bytes()


def test_adapters_in_a_loop_of_ones_own(model_dir, enabled):
    ids = torch.arange(3, 40)[None]

    def gradients(model):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]

    posttrain.disable()
    torch.manual_seed(0)
    theirs = gradients(filled(get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32"), lora())))
    posttrain.enable()
    torch.manual_seed(0)
    model = filled(get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32"), lora()))
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    assert len(layers) == 6  # three in each of two layers
    torch.testing.assert_close(gradients(model), theirs)
    assert len(theirs[1]) == 12
    posttrain.disable()
    assert not any(isinstance(module, LoraLinear) for module in model.modules())


def test_patch_and_unpatch(model_dir, capsys):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    classes = [type(module) for module in model.modules()]
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        expected = model.double()(ids).logits
        report = posttrain.patch(model.float())
        assert str(report) in capsys.readouterr().out
        assert report.replaced["attention"] == 2 and report.replaced["rms_norm"] == 9
        torch.testing.assert_close(model(ids).logits, expected.float())
    posttrain.unpatch(model)
    assert [type(module) for module in model.modules()] == classes
    assert model.config._attn_implementation == "sdpa"
