"""rope, rotary embeddings: what `posttrain bench rope` runs, and its target."""

from elementwise import hold_to_target, suite_of

from posttrain.bench.cases.elementwise import rope
from posttrain.bench.suite import pytest_generate_tests, test_case

__all__ = ["pytest_generate_tests", "test_case"]
OPS = ("rope",)


def test_target(publish) -> None:
    (case,) = rope(suite_of(tokens=2048))
    hold_to_target(publish, "rope", case)
