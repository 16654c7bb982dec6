"""LoRA and QLoRA in training: TRL's losses with PEFT's own layers, and adapters that go where PEFT's go."""

import math
import runpy
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from posttrain.cli import main
from posttrain.models import ModelError, dequantize, load
from posttrain.models.prepare import is_prepared, prepare
from posttrain.models.quantized import NF4Linear
from posttrain.train.config import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 50
COMMON = {
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "per_device_train_batch_size": 4,
    "max_steps": STEPS,
    "max_length": 24,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "train_sampling_strategy": "sequential",
}
LORA = {"lora_r": 4, "lora_alpha": 16}


@pytest.fixture(scope="module")
def start(model_dir, tmp_path_factory) -> Path:
    """A model with a head (its embeddings) that can tell tokens apart, since LoRA leaves it as it is."""
    folder = tmp_path_factory.mktemp("start")
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return folder


def trainer(model, output_dir: Path, rows, *, processing_class=None, **changes) -> SFTTrainer:
    settings = {"output_dir": str(output_dir), **COMMON, **changes}
    return SFTTrainer(model, SFTConfig(**settings), rows, processing_class=processing_class)


def column(history: list[dict], name: str) -> torch.Tensor:
    return torch.tensor([float(record[name]) for record in history if "loss" in record])


def theirs(model, tokenizer, output_dir: Path, rows) -> list[dict]:
    from datasets import Dataset
    from trl import SFTConfig as TRLConfig
    from trl import SFTTrainer as TRLTrainer

    run = TRLTrainer(
        model,
        TRLConfig(output_dir=str(output_dir), save_strategy="no", disable_tqdm=True, **COMMON),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    run.train()
    return run.state.log_history


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_losses_of_50_steps_are_trls_with_pefts_layers(start, rows, tmp_path):
    ours = trainer(str(start), tmp_path / "ours", rows, **LORA)
    report = prepare(ours.model)
    assert {kind: report.replaced[kind] for kind in ("lora_linear", "lora_qkv", "lora_mlp")} == {
        "lora_linear": 14,
        "lora_qkv": 2,
        "lora_mlp": 2,
    }
    ours.save_model(tmp_path / "start")
    base = AutoModelForCausalLM.from_pretrained(start, dtype="float32")
    peer = PeftModel.from_pretrained(base, str(tmp_path / "start"), is_trainable=True)
    ours.train()
    expected = theirs(peer, AutoTokenizer.from_pretrained(start), tmp_path / "theirs", rows)
    assert not is_prepared(peer)
    losses = column(ours.log_history, "loss")
    assert len(losses) == STEPS and losses[-10:].mean() < 0.7 * losses[:10].mean()
    assert (losses - column(expected, "loss")).abs().max() <= 1e-4
    assert (column(ours.log_history, "grad_norm") - column(expected, "grad_norm")).abs().max() <= 1e-4


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_4_bits_train_as_their_values_in_full(start, rows, tmp_path, nested):
    changes = {**LORA, "max_steps": 20}
    options = {"load_in_4bit": True, "use_bnb_nested_quant": nested}
    ours = trainer(str(start), tmp_path / "ours", rows, **changes, **options)
    assert sum(isinstance(module, NF4Linear) for module in ours.model.modules()) == 14
    assert all(("lora_" in name) == p.requires_grad for name, p in ours.model.named_parameters())
    full, tokenizer = load(start, **options)
    dequantize(full)
    peer = trainer(full, tmp_path / "full", rows, processing_class=tokenizer, **changes)
    for run in (ours, peer):
        run.train()
    difference = column(ours.log_history, "loss") - column(peer.log_history, "loss")
    assert difference.abs().max() <= 1e-4


def test_4_bits_leave_nothing_to_train_but_an_adapter(model_dir, rows, tmp_path):
    with pytest.raises(ConfigError, match="load_in_4bit leaves nothing to train but an adapter: set lora_r"):
        trainer(str(model_dir), tmp_path, rows, load_in_4bit=True)
    model, tokenizer = load(model_dir)
    with pytest.raises(ConfigError, match="load_in_4bit is for a model that is loaded here"):
        trainer(model, tmp_path, rows, processing_class=tokenizer, load_in_4bit=True, **LORA)


def logits(model, words) -> torch.Tensor:
    ids = torch.tensor([words("1 + 2 = 3!")["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_language_head_can_have_an_adapter(model_dir, rows, tmp_path):
    changes = {**LORA, "max_steps": 10, "lora_target_modules": ["q_proj", "lm_head"]}
    run = trainer(str(model_dir), tmp_path / "run", rows, **changes)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    result = run.train()
    moved = [name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])]
    assert sorted(name for name in moved if "lm_head" in name) == [
        f"base_model.model.lm_head.lora_{part}.default.weight" for part in "AB"
    ]
    assert column(run.log_history, "loss")[-1] < column(run.log_history, "loss")[0]
    stock = AutoPeftModelForCausalLM.from_pretrained(result.checkpoint, dtype=torch.float32)
    back, words = load(result.checkpoint)
    run.model.eval()
    for model in (back, stock):
        torch.testing.assert_close(logits(model, words), logits(run.model, words))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_dropout_on_the_head_is_an_error_before_anything_is_written(model_dir, rows, tmp_path):
    changes = {**LORA, "lora_dropout": 0.1, "lora_target_modules": ["lm_head"]}
    with pytest.raises(ModelError, match="must be plain LoRA without dropout: it has dropout"):
        trainer(str(model_dir), tmp_path / "run", rows, **changes)
    assert not (tmp_path / "run").exists()


def any_reward(completion_ids, **columns) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("method", ["dpo", "grpo"])
@pytest.mark.parametrize("bits", [32, 4])
def test_an_adapter_on_the_head_in_other_methods(start, tmp_path, method, bits):
    names = ("learning_rate", "gradient_checkpointing", "use_cpu", "logging_steps")
    settings = {name: COMMON[name] for name in names} | LORA
    settings |= {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "lora_target_modules": ["q_proj", "lm_head"],
        "load_in_4bit": bits == 4,
    }
    prompts = [f"Question {n}: {n} + {n} = " for n in range(4)]
    if method == "dpo":
        pairs = [{"prompt": prompt, "chosen": f"{n}!", "rejected": f"{n}?"} for n, prompt in enumerate(prompts)]
        run = DPOTrainer(str(start), None, DPOConfig(per_device_train_batch_size=4, **settings), pairs)
    else:
        size = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8}
        rows = [{"prompt": prompt} for prompt in prompts]
        run = GRPOTrainer(str(start), any_reward, GRPOConfig(**size, **settings), rows)
    run.train()
    (lora_b,) = [p for name, p in run.model.named_parameters() if "lm_head.lora_B" in name]
    assert lora_b.any()
    for record in run.log_history:
        assert math.isfinite(record["loss"])
        assert record.get("sampling/sampling_logp_difference/max", 0.0) <= 1e-5


@pytest.mark.parametrize("bits", [32, 4])
def test_the_demos_model_from_the_command_line(tmp_path, bits):
    """Trained, saved, loaded again, by PEFT alone too, merged and saved again."""
    runpy.run_path(str(EXAMPLES / "make_tiny_model.py"))["write"](tmp_path / "start", 0)
    data = tmp_path / "train.jsonl"
    data.write_text("".join((EXAMPLES / "data" / "arithmetic-train.jsonl").open().readlines()[:64]))
    run = tmp_path / "run"
    flags = {
        "model": tmp_path / "start",
        "data": data,
        "output_dir": run,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "use_cpu": "true",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_modules": "q_proj,v_proj,up_proj,down_proj",
        "load_in_4bit": str(bits == 4).lower(),
    }
    assert main(["sft", *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]) == 0
    folder = run / "checkpoint-3"
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()

    model, words = load(folder, load_in_4bit=bits == 4)
    expected = logits(model, words)
    with model.disable_adapter():
        assert not torch.equal(logits(model, words), expected)
    if bits == 4:
        dequantize(model)
    else:
        stock = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(logits(stock, words), expected)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    words.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")[0], words), expected)
