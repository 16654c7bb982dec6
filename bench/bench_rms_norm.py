"""rms_norm, norms of the residual stream: what `posttrain bench rms_norm` runs, and its target."""

import pytest
from elementwise import hold_to_target, suite_of

from posttrain.bench.cases.elementwise import rms_norm
from posttrain.bench.suite import pytest_generate_tests, test_case

__all__ = ["pytest_generate_tests", "test_case"]
OPS = ("rms_norm",)
NAMES = ("rms_norm", "rms_norm_residual")


@pytest.mark.parametrize("name", NAMES)
def test_target(name, publish) -> None:
    case = rms_norm(suite_of(tokens=4096))[NAMES.index(name)]
    hold_to_target(publish, name, case)
