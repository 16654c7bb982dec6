"""paged_attention, decoding over a paged cache: the part of the suite that `posttrain bench paged_attention` runs."""

from posttrain.bench.suite import pytest_generate_tests, test_case

__all__ = ["pytest_generate_tests", "test_case"]
OPS = ("paged_attention",)
