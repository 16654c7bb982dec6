"""sample, drawing tokens: the part of the suite that `posttrain bench sample` runs."""

from posttrain.bench.suite import pytest_generate_tests, test_case

__all__ = ["pytest_generate_tests", "test_case"]
OPS = ("sample",)
