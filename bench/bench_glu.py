"""swiglu and geglu, gated activations: the part of the suite that `posttrain bench swiglu geglu` runs."""

from posttrain.bench.suite import pytest_generate_tests, test_case

__all__ = ["pytest_generate_tests", "test_case"]
OPS = ("swiglu", "geglu")
