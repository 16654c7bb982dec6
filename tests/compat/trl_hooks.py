"""A pytest plugin: our hooks are on while TRL's own tests run, and at the end it says how often they fired."""

import pytest

import posttrain
from posttrain.integrations import counters


def pytest_configure(config: pytest.Config) -> None:
    """Before TRL's tests import what we replace."""
    posttrain.enable(allow_untested=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run in which our head was never called shows nothing."""
    if session.testscollected and not counters().get("language head by linear_logprob"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the counters."""
    terminalreporter.write_line(f"posttrain's counters: {counters()}")
