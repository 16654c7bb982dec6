"""Every Triton kernel compiles for every architecture, fits its shared memory and spills no register."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from aot import ARCHITECTURES, SHARED_MEMORY, launching_modules


@pytest.fixture(scope="module")
def compiler() -> Iterator[subprocess.Popen]:
    """A process where Triton compiles instead of interpreting."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), "-"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        yield process


def _compile(compiler: subprocess.Popen, module: str) -> list[dict]:
    """The reports of one module's kernels."""
    print(module, file=compiler.stdin, flush=True)
    reports = []
    while (line := compiler.stdout.readline()).strip():
        reports.append(json.loads(line))
    assert line, f"the compiler ended with {compiler.wait()}; what it wrote is shown below"
    return reports


@pytest.mark.parametrize("module", launching_modules())
def test_kernels_fit_every_architecture(module: str, compiler: subprocess.Popen) -> None:
    reports = _compile(compiler, module)
    assert {report["capability"] for report in reports} >= set(ARCHITECTURES)
    for report in reports:
        assert report["spilled"] == 0, report
        assert report["shared"] <= SHARED_MEMORY[report["capability"]], report
        assert 0 < report["registers"] <= 255, report
