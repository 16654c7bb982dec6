"""The CUDA sources compile for every architecture we ship, without spills, in the registers of a committed table.

`python tests/cuda/test_compile.py --write [op ...]` writes the table's rows (of those sources, or all) from ptxas'
report: look at what grew before committing it. A register more can cost a block per multiprocessor, so no row may grow
unseen; shared memory and stack are held to the table too. Spills are never allowed. The registers are those of one
release of nvcc; another one is held to "no spills" only.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TABLE = Path(__file__).with_name("ptxas.json")
ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120a")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
LISTED = re.findall(r"csrc/cuda/\w+\.cu", (ROOT / "CMakeLists.txt").read_text())

_USED = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)

Use = tuple[int, int, int]  # registers, bytes of static shared memory, bytes of stack
Report = dict[str, dict[str, Use]]  # kernel -> architecture -> use


def ptxas_report(source: Path) -> Report:
    """What ptxas says of every kernel of a source; an `AssertionError` if it doesn't compile, warns or spills."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outputs = list(pool.map(lambda architecture: _compile(source, architecture), ARCHITECTURES))
    report: Report = {}
    for architecture, output in zip(ARCHITECTURES, outputs, strict=True):
        kernels = _USED.findall(output)
        assert len(kernels) == output.count("Compiling entry function"), output
        for name, (_, stack, stores, loads, registers, rest) in zip(_names(kernels), kernels, strict=True):
            assert (stores, loads) == ("0", "0"), f"{name} spills {stores} + {loads} bytes on sm_{architecture}"
            shared = re.search(r"(\d+) bytes smem", rest)
            use = (int(registers), int(shared.group(1)) if shared else 0, int(stack))
            report.setdefault(name, {})[architecture] = use
    return report


def _compile(source: Path, architecture: str) -> str:
    assert NVCC is not None
    with tempfile.TemporaryDirectory() as folder:
        target = [f"-arch=sm_{architecture}", "-cubin", "-o", f"{folder}/kernel.cubin"]
        command = [NVCC, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Werror", "all-warnings", "-Xptxas", "-v", *target]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def _names(kernels: list[tuple[str, ...]]) -> list[str]:
    """`fold_kernel` or `fold_kernel<float>` of `_ZN9posttrain4cuda...`."""
    mangled = "\n".join(kernel for kernel, *_ in kernels)
    demangled = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout
    plain = demangled.replace("(anonymous namespace)::", "").replace("posttrain::cuda::", "")
    return [_without_parameters(line).removeprefix("void ") for line in plain.splitlines()]


def _without_parameters(signature: str) -> str:
    depth = 0
    for i, character in enumerate(signature):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return signature[:i]
    return signature


def nvcc_release() -> str:
    """Such as "13.0"."""
    assert NVCC is not None
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", version)
    assert found is not None, version
    return found.group(1)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc: CUDA kernels are not built here")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_registers(source: Path) -> None:
    report = ptxas_report(source)
    table = json.loads(TABLE.read_text())
    if table["nvcc"] != nvcc_release():
        return
    row = table["kernels"].get(source.stem, {})
    assert report.keys() == row.keys(), "kernels came or went: write the table anew (--write)"
    for kernel, uses in report.items():
        for architecture, use in uses.items():
            allowed = row[kernel][architecture]
            grew = any(now > before for now, before in zip(use, allowed, strict=True))
            assert not grew, f"{kernel} on sm_{architecture} uses {use}, the table has {allowed}"


def test_every_source_is_built() -> None:
    assert sorted(LISTED) == [str(source.relative_to(ROOT)) for source in SOURCES]


def _write(sources: list[Path]) -> None:
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"nvcc": "", "kernels": {}}
    kernels = table["kernels"] | {source.stem: ptxas_report(source) for source in sources}
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
