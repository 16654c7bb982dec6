"""The emulation of blocks, threads, barriers and shuffles does what a GPU does, and tells what a kernel does wrong."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
CHECKS = ["-fsanitize=alignment,bounds,null,shift", "-ffp-contract=off", "-fno-strict-aliasing"]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulation")
    compile_cpp = [COMPILER, "-std=gnu++17", "-O1", f"-I{SOURCES}", "-x", "c++"]
    cases = Path(__file__).with_name("emulation_cases.cu")
    subprocess.run([*compile_cpp, *CHECKS, "-c", cases, "-o", folder / "cases.o"], check=True)
    parts = [SOURCES / "cuda" / name for name in ("emulation.cpp", "status.cu")]
    subprocess.run([*compile_cpp, *parts, "-x", "none", folder / "cases.o", "-o", folder / "cases"], check=True)
    return folder / "cases"


@pytest.fixture(params=["ascending", "descending"])
def results(request: pytest.FixtureRequest, program: Path) -> dict[str, list[str]]:
    """What each case printed, in the order of blocks and threads that the parameter names."""
    arguments = [request.param] if request.param == "descending" else []
    done = subprocess.run([program, *arguments], check=True, capture_output=True, text=True, timeout=60)
    lines = [line.split(": ", 1) for line in done.stdout.splitlines()]
    return {"direction": [request.param]} | {
        name: [value for key, value in lines if key == name] for name in dict(lines)
    }


def numbers(*values: float) -> str:
    return " ".join(f"{x:g}" for x in values)


def test_shuffles_and_votes(results):
    lanes = range(32)
    expected = [lane // 8 * 8 + 3 for lane in lanes]
    expected += [lane - 3 if lane % 16 >= 3 else lane for lane in lanes]
    expected += [lane + 5 if lane + 5 < 32 else lane for lane in lanes]
    expected += [lane ^ 17 for lane in lanes]
    expected += [sum(1 << lane for lane in range(0, 32, 3))] * 32
    expected += [2] * 32
    assert results["shuffles"] == [numbers(*expected)]


def test_half_warps_apart_and_a_lane_that_returned(results):
    expected = [lane ^ 1 for lane in range(16)] + [lane ^ 2 for lane in range(16, 32)]
    expected[20] = expected[22] = -1  # 22 asked 20, which had returned
    assert results["halves"] == ["0 no error", numbers(*expected)]


def test_reductions_and_atomics(results):
    assert results["sums"] == [numbers(*[sum(range(96)) + 1000 * 49] * 3)]
    by_eights = [sum(39 - lane for lane in range(first, first + 8)) for first in range(0, 40, 8)]
    assert results["part_of_a_warp"] == [numbers(*(x for x in by_eights for _ in range(8)))]
    first = 1 if results["direction"] == ["ascending"] else 16
    assert results["atomics"] == [numbers(15, -1, first), numbers(0.5 * 4 * 32)]


def test_half_precision_rounds_to_nearest_even(results):
    assert results["halves_of"] == ["65504 inf 1 1.00195 5.96046e-08 -0"]
    assert results["bfloats_of"] == ["1 1.01562 inf -9.18355e-41 nan"]


def test_order_of_blocks_and_threads(results):
    order = range(8) if results["direction"] == ["ascending"] else range(7, -1, -1)
    assert results["order"] == [numbers(*order)]


def test_shared_memory_is_unwritten_before_each_block(results):
    assert re.fullmatch(r"(-?nan ?){2}", *results["unwritten"])


def test_a_missing_barrier_shows_in_one_of_the_orders(results):
    values = results["without_barrier"][0].replace("-nan", "nan")
    assert values == ("1 1" if results["direction"] == ["ascending"] else "1 nan")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "barrier_in_a_branch",
            r"wait at different barriers: \S*cases.cu:\d+ and \S*cases.cu:\d+ \(block [01], 0, 0\)",
        ),
        ("absent_lane", r"never come: 31 for a warp's meeting at \S*:\d+; 1 for the barrier at \S*:\d+ \(block"),
        ("wrong_mask", r"cases.cu:\d+: lane \d+ isn't in its own mask 0xfffe"),
        ("other_lines", r"never come: 16 for a warp's meeting at \S*:\d+; 16 for a warp's meeting at"),
        ("misaligned", r"misaligned address 0x\w+ for an access that wants 16 bytes aligned"),
        ("beyond_shared", r"cases.cu:\d+: index 8 is out of the array's bounds"),
        ("large_block", r"9 invalid configuration argument"),
        ("large_grid", r"9 invalid configuration argument"),
    ],
)
def test_what_is_wrong_is_said(results, name, message):
    assert re.search(message, *results[name])


@pytest.mark.parametrize("name", ["within_shared", "empty_grid"])
def test_what_is_right_passes_after_failures(results, name):
    assert results[name] == ["0 no error"]
