"""The vector functions of csrc/cpu/simd.h are accurate, and every instruction set gives true results."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from posttrain import _C

_ROOT = Path(__file__).parents[2]
_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
}
# Reads floats, writes exp, tanh and exp_or_zero of each, one whole vector after the other.
_PROGRAM = """
#include <cstdio>
#include "cpu/simd.h"
using namespace posttrain::POSTTRAIN_ISA;
int main() {
  constexpr int n = Lanes<float>::n;
  float x[n], y[3 * n];
  while (fread(x, sizeof(float), n, stdin) == n) {
    store(y, exp(load(x)));
    store(y + n, tanh(load(x)));
    store(y + 2 * n, exp_or_zero(load(x)));
    fwrite(y, sizeof(float), 3 * n, stdout);
  }
}
"""


def _best_isa() -> int:
    """Index in _FLAGS of the best instruction set this CPU has."""
    code = "from posttrain import _C; print(_C.isa())"
    environment = {key: value for key, value in os.environ.items() if key != "POSTTRAIN_ISA"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return list(_FLAGS).index(done.stdout.strip())


@pytest.fixture(scope="module", params=_FLAGS)
def isa(request) -> str:
    """Each instruction set that this CPU has."""
    if list(_FLAGS).index(request.param) > _best_isa():
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


def _evaluate(isa: str, folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """exp, tanh and exp_or_zero of `x`, by the functions compiled for `isa`."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, program = folder / "simd.cpp", folder / "simd"
    source.write_text(_PROGRAM)
    options = ["-std=gnu++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", *_FLAGS[isa]]
    define = [f"-DPOSTTRAIN_ISA={isa}", f"-I{_ROOT / 'csrc'}"]
    subprocess.run([compiler, *options, *define, str(source), "-o", str(program)], check=True)
    output = subprocess.run([program], input=x.tobytes(), capture_output=True, check=True).stdout
    lanes = {"baseline": 4, "avx2": 8, "avx512": 16}[isa]
    exp, tanh, exp_or_zero = np.frombuffer(output, np.float32).reshape(-1, 3, lanes).swapaxes(0, 1).reshape(3, -1)
    return exp, tanh, exp_or_zero


def _ulps(result: np.ndarray, truth: np.ndarray) -> float:
    """Largest distance from the float64 truth in units of the last place of float32."""
    return (np.abs(result - truth) / np.spacing(np.abs(truth).astype(np.float32)).astype(np.float64)).max()


def test_exp_and_tanh_are_accurate(isa, tmp_path) -> None:
    x = np.concatenate([np.linspace(-87.3, 88.7, 1 << 18), np.linspace(-1, 1, 1 << 18)]).astype(np.float32)
    x[:2] = -87, 88
    small = np.float32(10) ** np.linspace(-37, -1, 1 << 10, dtype=np.float32)
    x = np.concatenate([x, small, -small])
    exp, tanh, exp_or_zero = _evaluate(isa, tmp_path, x)
    assert _ulps(exp, np.exp(x.astype(np.float64))) <= 2
    normal = (x >= -87) & (x <= 88)
    assert _ulps(exp_or_zero[normal], np.exp(x[normal].astype(np.float64))) <= 2
    assert (exp_or_zero[x < -87] == 0).all()
    assert _ulps(tanh, np.tanh(x.astype(np.float64))) <= 3


def test_exp_and_tanh_at_the_ends_of_the_range(isa, tmp_path) -> None:
    infinity, nan = np.inf, np.nan
    x = np.array([-infinity, -1e30, -104, -100, -90, 88.72, 89, 1e30, infinity, nan, 0, -0.0, 9, -9, 1e4, -1e4], "f4")
    exp, tanh, exp_or_zero = _evaluate(isa, tmp_path, x)
    assert (exp_or_zero[:5] == 0).all() and np.isnan(exp_or_zero[9])
    assert (exp_or_zero[[10, 11]] == 1).all() and exp_or_zero[-1] == 0
    with np.errstate(over="ignore"):
        truth = np.exp(x.astype(np.float64)).astype(np.float32)
    # below the smallest normal number the last place is fixed
    assert np.allclose(exp, truth, rtol=3e-7, atol=2e-45, equal_nan=True)
    assert np.allclose(tanh, np.tanh(x.astype(np.float64)), rtol=3e-7, atol=0, equal_nan=True)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86 has several instruction sets")
@pytest.mark.parametrize("isa", [name for name in _FLAGS if name != _C.isa()], indirect=True)
def test_ops_are_true_with_every_other_instruction_set(isa) -> None:
    """The tests named here run with the one that is chosen anyway, too: outside of this test."""
    code = (
        "import sys, pytest; from posttrain import _C; assert _C.isa() == sys.argv[1], _C.isa(); "
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', 'agrees', *sys.argv[2:]]))"
    )
    ops = ["rms_norm", "rope", "glu", "packed_attention", "paged_attention", "rope_cache", "nf4", "sample", "logprob"]
    files = [str(Path(__file__).with_name(f"test_{op}.py")) for op in ops]
    environment = {**os.environ, "POSTTRAIN_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", code, isa, *files],
        cwd=_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
