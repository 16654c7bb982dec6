"""The suite as plain pytest: one test for each column of each pass of each case.

`posttrain bench` runs this file; bench/bench_<op>.py run a part of it, which they name in OPS.
"""

from typing import Any

import pytest

from posttrain.bench.cases import CASES
from posttrain.bench.session import Entry, Replay, session_of

OPS = tuple(CASES)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cases of the module's ops."""
    if "entry" not in metafunc.fixturenames:
        return
    entries = session_of(metafunc.config).entries(metafunc.module.OPS)
    replays = [Replay() for _ in entries]
    values = [
        pytest.param(entry, replay, id=str(entry), marks=pytest.mark.benchmark(timer=replay))
        for entry, replay in zip(entries, replays, strict=True)
    ]
    metafunc.parametrize(("entry", "replay"), values)


def test_case(entry: Entry, replay: Replay, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Right, and how fast."""
    session_of(request.config).run(entry, benchmark, replay)
