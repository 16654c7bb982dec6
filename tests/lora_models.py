"""Tiny models with adapters whose values matter, by PEFT alone."""

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import alone, tiny

LENGTHS = [9, 3, 17, 1, 6]


def filled(model):
    """The adapters' B matrices start at zero; give them values."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def stock(family, config: LoraConfig, dtype=torch.float64):
    """PEFT on a model that posttrain never saw."""
    model = tiny(family)
    torch.manual_seed(1)
    return filled(get_peft_model(model, config)).to(dtype)


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def target_logprobs(model, batch) -> torch.Tensor:
    logits = alone(model, batch)[1][batch.rows]
    return logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
