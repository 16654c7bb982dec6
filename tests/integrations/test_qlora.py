"""QLoRA through bitsandbytes under enable(): transformers' Trainer over 4 bits, with and without our hooks."""

import pytest
import torch
from prompted_batches import padded
from tiny_models import tiny
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import posttrain
from posttrain.integrations import counters

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional")


def trained(folder, output_dir):
    """Losses and gradient norms of three steps, and the trainer."""
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=bits, dtype=torch.float32)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    rows = padded("right")
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    options = {"max_steps": 3, "optim": "sgd", "logging_steps": 1, "per_device_train_batch_size": 3}
    options |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    trainer = Trainer(
        model=get_peft_model(model, lora),
        args=TrainingArguments(output_dir=str(output_dir), learning_rate=0.01, **options),
        train_dataset=[{**{name: x[i] for name, x in rows.items()}, "labels": labels[i]} for i in range(6)],
    )
    trainer.train()
    return [entry[name] for entry in trainer.state.log_history[:3] for name in ("loss", "grad_norm")], trainer


@pytest.mark.filterwarnings("ignore")
def test_steps_are_the_same_by_our_ops(tmp_path):
    tiny("llama", intermediate_size=128, hidden_size=64).save_pretrained(tmp_path / "model")
    expected, _ = trained(tmp_path / "model", tmp_path / "theirs")
    posttrain.enable()
    try:
        found, trainer = trained(tmp_path / "model", tmp_path / "ours")
        mlp = trainer.model.get_base_model().model.layers[0].mlp
        assert type(mlp).__mro__[1].__name__ == "GatedMLP" and len(mlp.lora().layers) == 3
        assert counters()["loss by linear_logprob"] == counters()["batch with shared prefixes"] == 3
    finally:
        posttrain.disable()
    assert all(abs(one - other) <= 1e-4 for one, other in zip(found, expected, strict=True))
