"""rms_norm, norms of the residual stream: the part of the suite that `posttrain bench rms_norm` runs."""

from posttrain.bench.suite import pytest_generate_tests, test_case

__all__ = ["pytest_generate_tests", "test_case"]
OPS = ("rms_norm",)
