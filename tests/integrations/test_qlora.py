"""QLoRA through bitsandbytes under enable(): transformers' Trainer over 4 bits, with and without our hooks."""

import pytest
import torch
from prompted_batches import padded
from tiny_models import tiny
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import posttrain
from posttrain.integrations import counters
from posttrain.integrations.counting import forget
from posttrain.models import families
from posttrain.models.quantized import quantize

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional")


def quantized(folder, dtype, **options):
    from transformers import BitsAndBytesConfig

    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, **options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=bits, dtype=dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", intermediate_size=128, hidden_size=64).save_pretrained(folder)
    return folder


def trained(folder, output_dir):
    """Losses and gradient norms of three steps, and the trainer."""
    from peft import LoraConfig, get_peft_model

    model = quantized(folder, torch.float32)
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
def test_steps_are_the_same_by_our_ops(folder, tmp_path):
    expected, _ = trained(folder, tmp_path / "theirs")
    posttrain.enable()
    try:
        found, trainer = trained(folder, tmp_path / "ours")
        mlp = trainer.model.get_base_model().model.layers[0].mlp
        assert type(mlp).__mro__[1].__name__ == "GatedMLP" and len(mlp.lora().layers) == 3
        assert counters()["loss by linear_logprob"] == counters()["batch with shared prefixes"] == 3
    finally:
        posttrain.disable()
    assert all(abs(one - other) <= 1e-4 for one, other in zip(found, expected, strict=True))


LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_in_4_bits_are_looked_at(folder, dtype):
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    forget()
    model = quantized(folder, dtype, bnb_4bit_use_double_quant=True)
    posttrain.patch(model)
    rows = padded("right")
    model(**rows)
    wrapped = get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(**LORA))
    posttrain.patch(wrapped)
    wrapped(**rows)
    assert counters() == {"self-check of the layers of LlamaModel passed": 2}
    assert model.model.layers[0].mlp.up_proj.base_layer.weight.quant_state is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_layers_in_4_bits_are_looked_at(dtype):
    forget()
    model = tiny("llama", dtype)
    quantize(model)
    posttrain.patch(model)
    model(**padded("right"))
    assert counters() == {"self-check of the layers of LlamaModel passed": 1}


@pytest.mark.filterwarnings("ignore")
def test_what_is_wrong_in_4_bits_raises(folder, monkeypatch):
    right = families.nf4_linear
    monkeypatch.setattr(families, "nf4_linear", lambda *arguments: 1.001 * right(*arguments))
    model = quantized(folder, torch.float32)
    posttrain.patch(model)
    with pytest.raises(ValueError, match=r"layers of LlamaModel .*: layer 0: hidden states are up to"):
        model(**padded("right"))
