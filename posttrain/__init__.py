"""posttrain: fused kernels and thin trainers for LLM post-training."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "DPOConfig": "posttrain.train.dpo",
    "DPOTrainer": "posttrain.train.dpo",
    "GRPOConfig": "posttrain.train.grpo",
    "GRPOTrainer": "posttrain.train.grpo",
    "SFTConfig": "posttrain.train.sft",
    "SFTTrainer": "posttrain.train.sft",
    "disable": "posttrain.integrations",
    "enable": "posttrain.integrations",
    "patch": "posttrain.integrations",
    "shared_prefix": "posttrain.integrations",
    "unpatch": "posttrain.integrations",
}
__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "SFTConfig",
    "SFTTrainer",
    "__version__",
    "disable",
    "enable",
    "patch",
    "shared_prefix",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """Import trainers and hooks on first use: `import posttrain` alone costs next to nothing."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
