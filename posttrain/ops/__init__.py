"""The fused operations: each one function, its reference, and the backends that compute it."""

from posttrain.ops.backend import BackendError, backend_for, explain, use_backend
from posttrain.ops.glu import geglu, swiglu
from posttrain.ops.logprob import TokenLogprobs, linear_logprob
from posttrain.ops.lora import lora_linear, lora_qkv
from posttrain.ops.lora_layer import LoraLayer
from posttrain.ops.lora_mlp import lora_mlp
from posttrain.ops.nf4 import nf4_dequantize, nf4_linear
from posttrain.ops.nf4_weight import NF4Weight, quantize_nf4
from posttrain.ops.packed_attention import packed_attention
from posttrain.ops.paged_attention import paged_attention, write_cache
from posttrain.ops.rms_norm import rms_norm
from posttrain.ops.rope import rope
from posttrain.ops.rope_cache import rope_cache
from posttrain.ops.sample import sample

__all__ = [
    "BackendError",
    "LoraLayer",
    "NF4Weight",
    "TokenLogprobs",
    "backend_for",
    "explain",
    "geglu",
    "linear_logprob",
    "lora_linear",
    "lora_mlp",
    "lora_qkv",
    "nf4_dequantize",
    "nf4_linear",
    "packed_attention",
    "paged_attention",
    "quantize_nf4",
    "rms_norm",
    "rope",
    "rope_cache",
    "sample",
    "swiglu",
    "use_backend",
    "write_cache",
]
