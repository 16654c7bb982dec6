"""The fused operations: each one function, its reference, and the backends that compute it."""

from posttrain.ops.backend import BackendError, backend_for, explain, use_backend
from posttrain.ops.rms_norm import rms_norm

__all__ = ["BackendError", "backend_for", "explain", "rms_norm", "use_backend"]
