"""paged_attention and rope_cache, decoding over a paged cache: the part of the suite that `posttrain bench` runs."""

from posttrain.bench.suite import pytest_generate_tests, test_case

__all__ = ["pytest_generate_tests", "test_case"]
OPS = ("rope_cache", "paged_attention")
