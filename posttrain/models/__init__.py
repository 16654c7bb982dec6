"""Hugging Face causal LMs with our ops in them."""

from posttrain.models.adapters import add_adapter, add_lora, load_adapter
from posttrain.models.causal_lm import ModelError
from posttrain.models.forward import hidden_states, token_logprobs
from posttrain.models.head import Head, head
from posttrain.models.load import load
from posttrain.models.prepare import Report, prepare, restore
from posttrain.models.quantized import dequantize

__all__ = [
    "Head",
    "ModelError",
    "Report",
    "add_adapter",
    "add_lora",
    "dequantize",
    "head",
    "hidden_states",
    "load",
    "load_adapter",
    "prepare",
    "restore",
    "token_logprobs",
]
