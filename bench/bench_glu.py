"""swiglu and geglu, gated activations: what `posttrain bench swiglu geglu` runs, and their target."""

import pytest
from elementwise import hold_to_target, suite_of

from posttrain.bench.cases import CASES
from posttrain.bench.suite import pytest_generate_tests, test_case

__all__ = ["pytest_generate_tests", "test_case"]
OPS = ("swiglu", "geglu")


@pytest.mark.parametrize("name", OPS)
def test_target(name, publish) -> None:
    (case,) = CASES[name](suite_of(tokens=4096, gate=name))
    hold_to_target(publish, name, case)
