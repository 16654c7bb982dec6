"""`posttrain bench` from start to file, in a process of its own, and what it says when it can't."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain.bench import record
from posttrain.bench.device import Roofline, device_name
from posttrain.bench.memory import peak_of
from posttrain.bench.results import Key, read
from posttrain.bench.session import Selection, Session
from posttrain.cli import main

_PROGRAM = """
import sys
from dataclasses import replace
from posttrain.bench import device, measure, peers, session
from posttrain.bench.cases import elementwise
from posttrain.bench.shapes import SUITES
from posttrain.cli import main

suite = SUITES["quick"]
SUITES["quick"] = replace(suite, models=suite.models[:1], tokens=16, rounds=2)
measure.cache_bytes = lambda: 1
peers.compiled = lambda problem: problem.plain
session.measure_roofline = lambda: device.Roofline(1e12, 1e11)
if "wrong" in sys.argv:
    elementwise.ops.rms_norm = lambda x, weight, *rest: 2 * x * weight
sys.exit(main(["bench", *sys.argv[1:]] if "wrong" not in sys.argv else ["bench", "rms_norm"]))
"""


def run(folder, *arguments):
    """The command on a tiny suite, from a folder that is no checkout, without git."""
    environment = {**os.environ, "OUT": str(folder / "out"), "PATH": "", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)  # pytest-benchmark writes no file within a worker
    command = [sys.executable, "-c", _PROGRAM, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_run_writes_one_file_for_pytest_benchmark_and_compare(tmp_path):
    folder = record.device_folder(str(tmp_path / "out"))
    folder.mkdir(parents=True)
    older, before = (folder / f"2026-01-0{day}T00-00-00-abc-quick.json" for day in (1, 2))
    for path in (older, before):
        path.write_text(json.dumps({"machine_info": {"device": device_name()}, "benchmarks": []}))
    done = run(tmp_path, "swiglu", "--peers")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = set((tmp_path / "out").glob("*/*.json")) - {older, before}
    assert path.name.endswith("-quick.json") and f"-> {path}" in done.stdout
    assert f"since {before} and 1 earlier run:\n{before} and {path} have no figure in common" in done.stdout
    assert "swiglu: Liger runs on GPUs only" in done.stdout
    result = read(path)
    assert result.device == device_name() and result.machine["commit"] is None
    assert result.machine["roofline"] == {"copy": 1e12, "gemm": 1e11}
    assert {"torch", "triton", "posttrain"} <= set(result.machine["versions"])
    assert result.machine["left_out"] == ["swiglu: Liger runs on GPUs only"]
    assert result.machine["not_run"] == []
    key = Key("swiglu", "[16, 3584]", "forward", "posttrain")
    facts = result.extra[key]
    assert facts["bytes"] == 3 * 16 * 3584 * 4 and facts["flops"] == facts["tflops"] == 0
    assert facts["gbytes"] == pytest.approx(facts["bytes"] / facts["seconds"]["median"] / 1e9)
    assert facts["roofline"] == pytest.approx(facts["bytes"] / 1e12 / facts["seconds"]["median"])
    assert facts["error"] == result.figures[key].error >= 0
    assert set(result.figures) >= {key, key._replace(column="plain PyTorch"), key._replace(column="torch.compile")}
    benchmark = json.loads(path.read_text())["benchmarks"][0]
    assert benchmark["stats"]["rounds"] == 2 and benchmark["group"] == f"{key.op} {key.case} forward"
    spread = benchmark["extra_info"]["seconds"]
    assert benchmark["stats"]["median"] == pytest.approx(spread["median"])


def test_a_wrong_op_fails_and_has_no_figures(tmp_path):
    done = run(tmp_path, "wrong")
    assert done.returncode == 1
    assert "rms_norm [16, 1024]: no figures: posttrain is wrong" in done.stdout
    (path,) = (tmp_path / "out").glob("*/*.json")
    result = read(path)
    assert not result.figures and all("posttrain is wrong" in reason for reason in result.machine["left_out"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["rope", "rms"], "unknown op 'rms'; there are rms_norm, rope, "),
        (["rope", "--peers", "rms"], "unknown op 'rms'; there are rms_norm, rope, "),
        (["rope", "--readme", "a"], "--readme belongs to posttrain bench report\n"),
        (["scaling", "--suite", "quick"], "--suite belongs to posttrain bench\n"),
        (["compare", "a", "b", "--out", "c"], "--out belongs to posttrain bench and posttrain bench scaling and "),
        (["report", "--peers"], "--peers belongs to posttrain bench and posttrain bench scaling\n"),
        (["rope", "--out", "a", "rms"], "unknown op 'rms'; there are rms_norm, rope, "),
        (["rope", "--out", "a", "--size", "b"], "unknown argument --size\n"),
        (["rope", "--out", ""], "--out needs a path, and got an empty one\n"),
        (["report", "--readme", ""], "--readme needs a path, and got an empty one\n"),
        (["report", "--out", "a", "no folder"], "no folder: "),
        (["--suite", "slow"], "unknown suite 'slow'; there are quick, full"),
    ],
)
def test_unknown_names_and_options_are_one_line(arguments, line, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"posttrain: error: {line}") and error.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_an_error_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["bench", "rope", "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert f"results can't be written to {tmp_path / 'file'}" in error and "Not a directory" in error
    assert error.count("\n") == 1


def test_a_run_that_is_terminated_ends_as_if_interrupted(tmp_path, monkeypatch):
    def run(arguments, plugins):
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return pytest.ExitCode.INTERRUPTED

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(pytest, "main", run)
    assert main(["bench", "rope", "--out", str(tmp_path)]) == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupted_run_says_what_it_did_not_get_to():
    session, lines = Session(Selection(("swiglu",), "quick")), []
    cases = {str(entry.case) for entry in session.entries(("rope", "swiglu"))}
    assert len(cases) > 1
    reporter = SimpleNamespace(write_line=lines.append)
    session.pytest_terminal_summary(reporter, pytest.ExitCode.INTERRUPTED)
    assert lines[0] == "not run:" and {line.removeprefix("  ") for line in lines[1:]} == cases
    lines.clear()
    session.pytest_terminal_summary(reporter, pytest.ExitCode.OK)
    assert lines == []


def test_a_folder_whose_name_is_too_long_is_one_line(tmp_path, capsys):
    folder = tmp_path / ("x" * 300)
    assert main(["bench", "rope", "--out", str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"results can't be written to {folder}" in error and error.count("\n") == 1


def test_results_go_into_the_current_folder_where_the_checkout_is_not_writable(monkeypatch, tmp_path):
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setenv("POSTTRAIN_CHECKOUT", str(tmp_path))
    assert str(record.results_folder()) == "bench/results"
    (tmp_path / "bench" / "results").mkdir(parents=True)
    assert record.results_folder() == tmp_path / "bench" / "results"
    assert record.circumstances()["commit"] is None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_package_that_lies_elsewhere_knows_the_commit_of_its_checkout(monkeypatch, tmp_path):
    """As bench/gpu.sh has it, which builds into a folder of its own."""
    names = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    git = partial(subprocess.run, cwd=tmp_path, env={**os.environ, **names}, check=True, capture_output=True, text=True)
    monkeypatch.setenv("POSTTRAIN_CHECKOUT", str(tmp_path))
    monkeypatch.delenv("OUT", raising=False)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    run = record.device_folder() / "2026-01-01T00-00-00-abc-quick.json"
    run.parent.mkdir()
    run.write_text("{}")
    git(["git", "init", "-q"])
    git(["git", "add", "."])
    git(["git", "commit", "-qm", "results"])
    commit = git(["git", "rev-parse", "HEAD"]).stdout.strip()
    found = record.circumstances()
    assert (found["commit"], found["changed"]) == (commit, False)
    assert f"-{commit[:9]}-quick.json" in record.run_file("quick").name
    assert record.earlier_runs("quick", str(tmp_path / "out")) == [run]
    run.write_text("{ }")
    assert record.circumstances()["changed"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_run_on_a_gpu_names_its_checkout(tmp_path):
    """bench/gpu.sh with a python that has a GPU and says how it is called."""
    for folder in ("bench", "bin", "build/gpu/posttrain"):
        (tmp_path / folder).mkdir(parents=True)
    script = shutil.copy(Path(__file__).parents[2] / "bench" / "gpu.sh", tmp_path / "bench")
    python = tmp_path / "bin" / "python3"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && echo 90 H100 || echo "$POSTTRAIN_CHECKOUT $*"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", script, "bench", "rope"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"{tmp_path} -m posttrain.cli bench --suite full --peers rope"


def test_a_folder_of_results_is_compared_where_there_is_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("POSTTRAIN_CHECKOUT", str(tmp_path))
    monkeypatch.delenv("OUT", raising=False)
    names = ("2026-01-02T00-00-00-abc-quick.json", "2026-01-01T00-00-00-abc-quick.json", "rope.json")
    folder = record.device_folder(str(tmp_path / "out"))
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text("{}")
    assert record.earlier_runs("quick", str(tmp_path / "out")) == [folder / names[1], folder / names[0]]
    assert record.earlier_runs("full", str(tmp_path / "out")) == []


@pytest.mark.skipif(record.LOAD is None, reason="the system tells no load")
def test_the_load_is_that_from_before_the_run(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (1e6, 1e6, 1e6))
    assert record.circumstances()["load"] == record.LOAD < 1e3


def test_share_of_the_roofline_is_that_of_the_slower_part():
    roofline = Roofline(copy=10.0, gemm=100.0)
    assert roofline.share(flops=50.0, moved=1.0, seconds=1.0) == 0.5
    assert roofline.share(flops=50.0, moved=8.0, seconds=1.0) == 0.8


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_what_a_call_touches_at_most():
    def work():
        for _ in range(3):
            bytearray(b"x" * (32 << 20))

    work()
    assert 60 << 20 <= peak_of(work) <= 72 << 20
