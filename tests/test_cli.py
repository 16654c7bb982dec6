"""The command line: every mistake is one line on stderr and exit code 2, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_model import build_model

from posttrain.cli import main
from posttrain.train.checkpoint import find_newest

POSTTRAIN = [sys.executable, "-m", "posttrain.cli"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "train.jsonl", [{"text": f"{n} and {n + 1}"} for n in range(16)])


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sft(model_dir: Path, data: Path, run: Path, *more: str) -> list[str]:
    flags = {"model": model_dir, "data": data, "output_dir": run, "max_steps": 2, "use_cpu": "true"}
    return ["sft", *(str(part) for name, value in flags.items() for part in (f"--{name}", value)), *more]


def error(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The line on stderr of a command that must fail with exit code 2."""
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("posttrain: error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err.removeprefix("posttrain: error: ").rstrip("\n")


def test_sft_from_yaml_with_a_flag(model_dir, data, tmp_path, capsys):
    run = tmp_path / "run"
    config = tmp_path / "a.yaml"
    config.write_text(
        f"model: {model_dir}\ndata: {data}\noutput_dir: {run}\nlearning_rate: 1e-3\nmax_steps: 7\nuse_cpu: true\n"
    )
    assert main(["sft", "--config", str(config), "--max-steps", "3", "--logging_steps=1"]) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert records[0]["learning_rate"] == 1e-3
    assert find_newest(run) == run / "checkpoint-3"
    captured = capsys.readouterr()
    assert f"checkpoint in {run / 'checkpoint-3'}" in captured.out
    assert "step 3/3: loss" in captured.err


def test_unknown_flag_and_command(capsys):
    assert error(capsys, ["sft", "--lerning_rate", "1"]) == (
        "unknown argument --lerning_rate; did you mean --learning_rate?"
    )
    assert "'train'" in error(capsys, ["train"])
    assert "command" in error(capsys, [])


def test_flags_are_not_abbreviated(capsys):
    assert "--learning" in error(capsys, ["sft", "--learning", "1"])


def test_unknown_config_key(capsys, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("modell: a\n")
    assert error(capsys, ["sft", "--config", str(path)]) == f"{path}: unknown key 'modell'; did you mean 'model'?"


def test_wrong_value(capsys):
    assert error(capsys, ["sft", "--max_steps", "ten"]) == "max_steps must be a whole number, got 'ten'"


def broken(path: Path) -> Path:
    path.write_text('{"text": "a"}\n{"text": \n{"text": "b"}\n')
    return path


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (broken, ["rows.jsonl", "2", "JSON"]),
        (lambda path: write(path, []), ["rows.jsonl", "empty"]),
        (lambda path: write(path, [{"question": "a"}]), ["rows.jsonl", "question", "text"]),
        (lambda path: write(path, [{"text": "a"}, {"text": 3}]), ["rows.jsonl", "2", "text"]),
        (lambda path: path, ["rows.jsonl", "no such file"]),
    ],
    ids=["broken JSON", "empty file", "wrong column", "wrong type", "missing file"],
)
def test_bad_data(capsys, model_dir, tmp_path, make, parts):
    line = error(capsys, sft(model_dir, make(tmp_path / "rows.jsonl"), tmp_path / "run"))
    assert all(part in line for part in parts), line
    assert not (tmp_path / "run").exists()


def test_adapter_for_modules_that_do_not_exist(capsys, model_dir, data, tmp_path):
    more = ["--lora_r", "2", "--lora_target_modules", "nothing"]
    assert error(capsys, sft(model_dir, data, tmp_path / "run", *more)).startswith("lora_target_modules nothing: ")
    assert not (tmp_path / "run").exists()


def test_example_over_the_token_budget(capsys, model_dir, tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"text": "short"}, {"text": "long" * 50}])
    line = error(capsys, sft(model_dir, rows, tmp_path / "run", "--max_tokens_per_batch", "100"))
    assert "line 2 has 201 tokens, more than max_tokens_per_batch 100" in line
    assert not (tmp_path / "run").exists()


def test_missing_model(capsys, data, tmp_path):
    line = error(capsys, sft(tmp_path / "nothing", data, tmp_path / "run"))
    assert str(tmp_path / "nothing") in line
    (tmp_path / "hollow").mkdir()
    assert "config.json" in error(capsys, sft(tmp_path / "hollow", data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_output_dir_that_cannot_be_made(capsys, model_dir, data):
    line = error(capsys, sft(model_dir, data, data / "run"))
    assert line == f"output_dir {data / 'run'}: {data} is not a folder"


def test_second_run_into_the_same_folder(capsys, model_dir, data, tmp_path):
    assert main(sft(model_dir, data, tmp_path / "run")) == 0
    assert "already holds checkpoint-2" in error(capsys, sft(model_dir, data, tmp_path / "run"))
    more = ["--max_steps", "4", "--resume_from_checkpoint"]
    assert main(sft(model_dir, data, tmp_path / "run", *more)) == 0
    assert find_newest(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"


def test_ctrl_c_saves_and_exits_with_130(model_dir, data, tmp_path):
    run = tmp_path / "run"
    command = [*POSTTRAIN, *sft(model_dir, data, run, "--max_steps", "1000000", "--logging_steps", "1")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").stat().st_size:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    folder = find_newest(run)
    assert folder is not None
    assert err.splitlines()[-1] == f"posttrain: stopped; checkpoint in {folder}"


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    import torch

    from posttrain import _C
    from posttrain.ops.backend import SUPPORT, explain

    for part in (
        "CPU kernels",
        _C.isa(),
        torch.__version__,
        f"{os.cpu_count()} cores",
        "memory",
        "GPU",
        "transformers",
    ):
        assert part in out
    for op in SUPPORT:
        choice = explain(op, torch.empty(0))
        assert any(op in line and choice.backend in line and choice.reason in line for line in out.splitlines())
        assert any(line.split()[:3] == [f"{op},", "cuda", "bfloat16"] for line in out.splitlines())


def test_help_is_quick_and_complete():
    seconds = []
    for _ in range(3):  # the quickest counts: the machine may be busy with other work
        started = time.perf_counter()
        out = subprocess.run([*POSTTRAIN, "--help"], check=True, capture_output=True, text=True).stdout
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1
    assert "sft" in out and "doctor" in out
    fields = subprocess.run([*POSTTRAIN, "sft", "--help"], check=True, capture_output=True, text=True).stdout
    assert "--learning_rate" in fields and "2e-05" in fields and "--max_tokens_per_batch" in fields


def test_version():
    from posttrain import __version__

    out = subprocess.run([*POSTTRAIN, "--version"], check=True, capture_output=True, text=True).stdout
    assert out == f"posttrain {__version__}\n"
