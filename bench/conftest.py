"""Collects the tables of all benchmarks and prints them at the end, passed or failed; runs the suite of the package."""

from collections.abc import Callable

import pytest

from posttrain.bench.interleave import Comparison
from posttrain.bench.record import record
from posttrain.bench.session import Session

_TABLES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """The suite's part is what `posttrain bench` runs."""
    config.pluginmanager.register(Session())


@pytest.fixture
def publish(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`publish(name, title, comparison, **facts)` records a comparison as JSON and prints its table at the end."""

    def call(name: str, title: str, comparison: Comparison, **facts: object) -> None:
        path = record(name, {"title": title, **comparison.as_dict(), **facts})
        notes = [
            f"{key}: {value:.3g}" if isinstance(value, float) else f"{key}: {value}" for key, value in facts.items()
        ]
        table = "\n".join([comparison.table(title), *notes, f"-> {path}"])
        request.config.stash.setdefault(_TABLES, []).append(table)

    return call


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`report(name, lines, **facts)` records facts as JSON and prints `lines` at the end."""

    def call(name: str, lines: list[str], **facts: object) -> None:
        path = record(name, {"title": lines[0], **facts})
        request.config.stash.setdefault(_TABLES, []).append("\n".join([*lines, f"-> {path}"]))

    return call


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the tables."""
    for table in config.stash.get(_TABLES, []):
        terminalreporter.write_line("")
        terminalreporter.write_line(table)
