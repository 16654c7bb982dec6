import io
import sys

import pytest

from posttrain.train.progress import Progress, peak_memory

RECORD = {"loss": 1.25, "tokens_per_second": 12345.0}


def test_lines_when_not_a_terminal(capsys):
    with Progress(num_steps=10, first_step=0, bar=True) as progress:
        progress.advance(5)
        progress.report(5, RECORD)
        progress.report(5, {"eval_loss": 0.5})
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("step 5/10: loss 1.25, 12,345 tokens/s, ") and first.endswith(" left")
    assert second.startswith("step 5/10: eval_loss 0.5, 12,345 tokens/s, ")


def test_an_evaluation_before_the_first_log_has_no_speed(capsys):
    with Progress(num_steps=10, first_step=0, bar=False) as progress:
        progress.report(1, {"eval_loss": 0.5})
    line = capsys.readouterr().err
    assert line.startswith("step 1/10: eval_loss 0.5, ") and "tokens/s" not in line


@pytest.mark.parametrize("bar", [True, False])
def test_a_bar_only_on_a_terminal_that_wants_one(monkeypatch, bar):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Progress(num_steps=10, first_step=2, bar=bar) as progress:
        progress.advance(4)
        progress.report(4, RECORD)
    shown = terminal.getvalue()
    assert "loss 1.25, 12,345 tokens/s" in shown
    assert ("\x1b[" in shown) == bar
    assert ("4/10" in shown) and (shown.startswith("step 4/10") != bar)


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory()
    assert 10 << 20 < before < 1 << 40
    held = bytearray(256 << 20)
    held[::4096] = b"x" * len(held[::4096])
    assert peak_memory() >= before
    assert peak_memory() > 256 << 20
