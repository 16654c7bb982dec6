"""Every Triton kernel compiles for every architecture, fits its shared memory and spills no register."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from aot import ARCHITECTURES, SHARED_MEMORY, launching_modules


def _compile(module: str) -> list[dict]:
    """The reports of one module's kernels, from a process where Triton compiles instead of interpreting."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("module", launching_modules())
def test_kernels_fit_every_architecture(module: str) -> None:
    reports = _compile(module)
    assert {report["capability"] for report in reports} >= set(ARCHITECTURES)
    for report in reports:
        assert report["spilled"] == 0, report
        assert report["shared"] <= SHARED_MEMORY[report["capability"]], report
        assert 0 < report["registers"] <= 255, report
