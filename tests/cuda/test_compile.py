"""The CUDA sources compile for the architectures we ship, and no kernel spills a register."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a", "100a")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc: CUDA kernels are not built here")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles_without_spills(source: Path, tmp_path: Path) -> None:
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command = [NVCC, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Werror", "all-warnings", "-Xptxas", "-v", *targets]
    done = subprocess.run(
        [*command, "-c", str(source), "-o", str(tmp_path / "kernel.o")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", done.stderr)
    assert {architecture for _, architecture in kernels} == {f"sm_{arch}" for arch in ARCHITECTURES}
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) == len(kernels)
    assert set(spills) == {("0", "0")}, done.stderr
