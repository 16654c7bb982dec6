"""The CUDA kernels compile for every architecture we ship, spill nothing, and keep within a committed table.

A register more can cost a block per multiprocessor, so no row of tests/cuda/ptxas.json (registers and bytes of static
shared memory, by kernel and architecture) may grow unseen; a stack, which is what spills need, is never allowed. What
ptxas did is read from posttrain._C where that holds the kernels; else, if there is nvcc, the sources are compiled for
three of the architectures. The numbers are those of one release of nvcc; another one is held to "no stack" only.

`python tests/cuda/test_compile.py --write [op ...]` compiles the sources of those ops, or all, and writes their rows:
look at what grew before committing them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import triton

from posttrain import _C

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TABLE = Path(__file__).with_name("ptxas.json")
ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120a")  # that the table has
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
RESERVED = 1024  # bytes of shared memory that the system takes of a block that has some, from sm_90 on

Use = tuple[int, int]  # registers, bytes of static shared memory
Report = dict[str, dict[str, dict[str, Use]]]  # op -> kernel -> architecture -> use


@cache
def built() -> Report:
    """Of the kernels in posttrain._C."""
    return _report(Path(_C.__file__))


def compiled(source: Path, architectures: Sequence[str]) -> Report:
    """Of the kernels of one source."""
    report: Report = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        for one in pool.map(lambda architecture: _compile(source, architecture, folder), architectures):
            for op, kernels in one.items():
                for kernel, uses in kernels.items():
                    report.setdefault(op, {}).setdefault(kernel, {}).update(uses)
    return report


def _compile(source: Path, architecture: str, folder: str) -> Report:
    assert NVCC is not None
    cubin = Path(folder, f"{architecture}.cubin")
    command = [NVCC, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Werror", "all-warnings", f"-arch=sm_{architecture}"]
    done = subprocess.run([*command, "-cubin", source, "-o", cubin], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return _report(cubin, architecture)


def _report(binary: Path, architecture: str = "") -> Report:
    """What a file says of its kernels, an executable also of the `architecture`; an error if one has a stack."""
    command = [CUOBJDUMP, "--dump-resource-usage", binary]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = iter(_names(re.findall(r"Function (\w+):", text)))
    report: Report = {}
    for line in text.splitlines():
        if found := re.match(r"arch = sm_(\w+)", line):
            architecture = found.group(1)
        elif found := re.search(r"Function \w*?_\d+_([a-z]\w*?)_cu_\w+:", line):
            op, kernel = found.group(1), next(names)
        elif "REG:" in line:
            use = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            assert use["STACK"] == use["LOCAL"] == 0, f"{kernel} of {op}.cu spills on sm_{architecture}: {use}"
            reserved = RESERVED if use["SHARED"] and int(architecture.rstrip("af")) >= 90 else 0
            report.setdefault(op, {}).setdefault(kernel, {})[architecture] = (use["REG"], use["SHARED"] - reserved)
    return report


def _names(mangled: list[str]) -> list[str]:
    """`fold_kernel` or `fold_kernel<float>` of `_ZN9posttrain4cuda...`."""
    text = "\n".join(mangled)
    demangled = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    plain = demangled.replace("(anonymous namespace)::", "").replace("posttrain::cuda::", "")
    return [_without_parameters(line).removeprefix("void ") for line in plain.splitlines()]


def _without_parameters(signature: str) -> str:
    depth = 0
    for i, character in enumerate(signature):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return signature[:i]
    return signature


def nvcc_release() -> str | None:
    """Such as "13.0"."""
    if NVCC is None:
        return None
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", version)
    assert found is not None, version
    return found.group(1)


@pytest.mark.slow
@pytest.mark.skipif(not _C.with_cuda() and NVCC is None, reason="no nvcc: CUDA kernels are not built here")
@pytest.mark.skipif(not CUOBJDUMP.exists(), reason=f"no cuobjdump in Triton's package: {CUOBJDUMP}")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_registers(source: Path) -> None:
    op = source.stem
    report = (built() if _C.with_cuda() else compiled(source, ("80", "90a", "100a"))).get(op, {})
    table = json.loads(TABLE.read_text())
    if table["nvcc"] != nvcc_release():
        return
    row = table["kernels"].get(op, {})
    assert report.keys() == row.keys(), "kernels came or went: write the table anew (--write)"
    architectures = {architecture for uses in report.values() for architecture in uses}
    for kernel, uses in report.items():
        for architecture in architectures & {*ARCHITECTURES}:
            use, allowed = uses[architecture], row[kernel][architecture]
            grew = any(now > before for now, before in zip(use, allowed, strict=True))
            assert not grew, f"{kernel} on sm_{architecture} uses {use}, the table has {allowed}"
    if unknown := architectures - {*ARCHITECTURES}:
        pytest.skip(f"the table has no rows of sm_{', sm_'.join(sorted(unknown))}")


def test_every_source_is_built() -> None:
    listed = re.findall(r"csrc/cuda/\w+\.cu", (ROOT / "CMakeLists.txt").read_text())
    assert sorted(listed) == [str(source.relative_to(ROOT)) for source in SOURCES]


def _write(sources: list[Path]) -> None:
    kernels = json.loads(TABLE.read_text())["kernels"]
    kernels |= {source.stem: compiled(source, ARCHITECTURES).get(source.stem, {}) for source in sources}
    present = {source.stem for source in SOURCES}
    lines = [
        f'    "{op}": {{\n'
        + ",\n".join(f"      {json.dumps(name)}: {json.dumps(uses)}" for name, uses in sorted(rows.items()))
        + "\n    }"
        for op, rows in sorted(kernels.items())
        if rows and op in present
    ]
    text = f'{{\n  "nvcc": "{nvcc_release()}",\n  "kernels": {{\n' + ",\n".join(lines) + "\n  }\n}\n"
    TABLE.write_text(text)


if __name__ == "__main__":
    assert sys.argv[1:2] == ["--write"], __doc__
    _write([source for source in SOURCES if not sys.argv[2:] or source.stem in sys.argv[2:]])
