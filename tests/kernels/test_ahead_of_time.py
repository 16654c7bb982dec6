"""Every Triton kernel compiles for every architecture, fits its shared memory and spills no register."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from aot import ARCHITECTURES, SHARED_MEMORY, launching_modules


class Compiler:
    """A process where Triton compiles instead of interpreting, and another one after it has ended."""

    def __init__(self) -> None:
        self._process = _start()

    def reports(self, module: str) -> list[dict]:
        """Those of one module's kernels."""
        if self._process.poll() is not None:
            self.close()
            self._process = _start()
        print(module, file=self._process.stdin, flush=True)
        reports = []
        while (line := self._process.stdout.readline()).strip():
            reports.append(json.loads(line))
        assert line, f"the compiler ended with {self._process.wait()}; what it wrote is shown below"
        return reports

    def close(self) -> None:
        with self._process:
            pass  # its end closes the pipes and waits


def _start() -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), "-"]
    return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with closing(Compiler()) as compiler:
        yield compiler


@pytest.mark.parametrize("module", launching_modules())
def test_kernels_fit_every_architecture(module: str, compiler: Compiler) -> None:
    reports = compiler.reports(module)
    assert {report["capability"] for report in reports} >= set(ARCHITECTURES)
    for report in reports:
        assert report["spilled"] == 0, report
        assert report["shared"] <= SHARED_MEMORY[report["capability"]], report
        assert 0 < report["registers"] <= 255, report
