"""The demo's stages, short; `make demo` runs them in full."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def demo():
    sys.path.insert(0, str(EXAMPLES))
    try:
        specification = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
        module = importlib.util.module_from_spec(specification)
        sys.modules["demo"] = module
        specification.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(EXAMPLES))


def test_stages_leave_a_run_folder(demo, tmp_path, monkeypatch):
    scored = []
    monkeypatch.setattr(demo, "score", lambda run, stage: scored.append((stage, run.model_dir)))
    run = demo.Demo(tmp_path, tmp_path / "start", {"max_steps": 3, "logging_steps": 1})
    for stage in demo.STAGES:
        stage(run)
    assert scored == [("start", tmp_path / "start"), ("sft", tmp_path / "sft" / "checkpoint-3")]
    lines = (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 3]
    assert (tmp_path / "sft" / "metrics.png").is_file()


def test_answers_do_not_depend_on_padding(demo, tmp_path, monkeypatch):
    demo.make_tiny_model.write(tmp_path, seed=0)
    prompts = [[{"role": "user", "content": text}] for text in ("1 + 2 = ?", "What is 4321 + 987?", "3")]
    together = demo.generate(tmp_path, prompts)
    monkeypatch.setattr(demo, "BATCH", 1)
    assert together == demo.generate(tmp_path, prompts)
    assert any(together)


@pytest.mark.parametrize(("before", "after", "code"), [(0.0, 0.5, 0), (0.5, 0.5, 1), (0.5, 0.1, 1)])
def test_exit_code_says_whether_the_model_got_better(demo, tmp_path, monkeypatch, capsys, before, after, code):
    values = {"start": before, "sft": after}

    def stage(name):
        def run(demo_run):
            demo_run.output_dir.mkdir(exist_ok=True)
            demo_run.scores[name] = values[name]

        run.__name__ = name
        return run

    monkeypatch.setattr(demo, "STAGES", [stage("start"), stage("sft")])
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output_dir", str(tmp_path / "run")])
    assert demo.main() == code
    assert json.loads((tmp_path / "run" / "scores.json").read_text()) == values
    assert f"{before:.1%} before, {after:.1%} after" in capsys.readouterr().out
