"""The fused operations: each one function, its reference, and the backends that compute it."""

from posttrain.ops.backend import BackendError, backend_for, explain, use_backend
from posttrain.ops.glu import geglu, swiglu
from posttrain.ops.logprob import TokenLogprobs, linear_logprob
from posttrain.ops.packed_attention import packed_attention
from posttrain.ops.rms_norm import rms_norm
from posttrain.ops.rope import rope

__all__ = [
    "BackendError",
    "TokenLogprobs",
    "backend_for",
    "explain",
    "geglu",
    "linear_logprob",
    "packed_attention",
    "rms_norm",
    "rope",
    "swiglu",
    "use_backend",
]
