"""LoRA through PEFT, in PEFT's file format.

y = W x + (alpha / r) B A x, with only A and B trained (Hu et al., "LoRA", 2021). The frozen model with the adapter
switched off (`with model.disable_adapter():`) is the reference policy.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.models.causal_lm import ModelError, causal_lm
from posttrain.models.prepare import is_prepared, replace_adapters
from posttrain.models.quantized import NF4Linear

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

_STARTS_IN_FULL = ("orthogonal", "pissa", "olora", "corda")  # of PEFT, from the dtype or the values of the weight


def add_lora(
    model: Any,
    r: int = 16,
    alpha: int = 32,
    target_modules: str | Sequence[str] = "all-linear",
    dropout: float = 0.0,
) -> "PeftModel":
    """Freeze `model` and put a LoRA adapter into it.

    Args:
        model: a transformers model, prepared or not.
        r: rank.
        alpha: the adapter is scaled by alpha / r.
        target_modules: names of the layers that get one, or "all-linear" for all but the language head.
        dropout: on the adapters' inputs, in training.

    Raises:
        ValueError: a rank below 1, an alpha that isn't positive, or names that match no layer.
    """
    from peft import LoraConfig

    if alpha <= 0:
        raise ValueError(f"alpha must be positive, got {alpha}")

    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM")
    return add_adapter(model, config)


def add_adapter(model: Any, config: "PeftConfig") -> "PeftModel":
    """Put an adapter of any of PEFT's kinds into `model`; where the model is prepared, LoRA runs our ops.

    Raises `ModelError` for a start that PEFT can't compute from 4-bit weights.
    """
    from peft import get_peft_model

    start = getattr(config, "init_lora_weights", True)
    if str(start).startswith(_STARTS_IN_FULL) and any(isinstance(module, NF4Linear) for module in model.modules()):
        raise ModelError(f"init_lora_weights={start!r} needs weights in full precision; load without load_in_4bit")
    return _prepared(get_peft_model(model, config))


def load_adapter(model: Any, folder: str | Path, *, trainable: bool = True) -> "PeftModel":
    """Put the adapter saved in `folder` (by PEFT's `save_pretrained`) into `model`."""
    from peft import PeftModel

    return _prepared(PeftModel.from_pretrained(model, str(folder), is_trainable=trainable))


def _prepared(model: Any) -> Any:
    """`model`, whose adapters are new, with our ops in them if it has our ops elsewhere."""
    if is_prepared(model):
        replace_adapters(causal_lm(model))
    return model


def is_adapter(folder: str | Path) -> bool:
    """Whether `folder` holds an adapter rather than a whole model."""
    return (Path(folder) / "adapter_config.json").is_file() and not (Path(folder) / "config.json").is_file()
