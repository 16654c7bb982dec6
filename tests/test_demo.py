"""The demo's stages, short; `make demo` runs them in full."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"{n} + 1 = ?"}],
        "chosen": [{"role": "assistant", "content": f"Answer: {n + 1}"}],
        "rejected": [{"role": "assistant", "content": f"Answer: {n}"}],
    }
    for n in range(8)
]


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
    monkeypatch.setattr(demo, "score", lambda run, stage: scored.append((stage, run.model_dir.name)))
    monkeypatch.setattr(demo, "preference_pairs", lambda run: PAIRS)
    run = demo.Demo(
        tmp_path, tmp_path / "start", {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 8}
    )
    for stage in demo.STAGES:
        stage(run)
    last = [(stage, "checkpoint-2") for stage in ("sft", "dpo", "grpo")]
    assert scored == [("start", "start"), *last]
    for stage, _ in last:
        assert {json.loads(line)["step"] for line in (tmp_path / stage / "metrics.jsonl").open()} == {1, 2}
        assert (tmp_path / stage / "metrics.png").is_file()


def test_pairs_are_a_right_and_a_wrong_answer_to_one_problem(demo, tmp_path, monkeypatch, capsys):
    chats = [
        [{"role": "user", "content": f"1 + {n} = ?"}, {"role": "assistant", "content": f"Answer: {1 + n}"}]
        for n in (1, 2)
    ]

    class Engine:
        def __init__(self, *_):
            self.drawn = [["Answer: 3", "Answer: 2", "Answer: 2"], ["Answer: 3", "Answer: 3"]]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def generate(self, prompts, params):
            assert prompts == [chat[:1] for chat in chats] and params.n == 8
            return [[demo.Completion([], text, [], "stop") for text in texts] for texts in self.drawn]

    monkeypatch.setattr(demo, "Engine", Engine)
    monkeypatch.setattr(demo, "load", lambda folder: (None, None))
    monkeypatch.setattr(demo, "read_chats", lambda part: chats)
    pairs = demo.preference_pairs(demo.Demo(tmp_path, tmp_path, {}))
    assert pairs == [
        {
            "prompt": chats[0][:1],
            "chosen": [{"role": "assistant", "content": "Answer: 2"}],
            "rejected": [{"role": "assistant", "content": "Answer: 3"}],
        }
    ]
    assert "1 of 2 problems" in capsys.readouterr().out


def test_answers_do_not_depend_on_padding(demo, tmp_path, monkeypatch):
    demo.make_tiny_model.write(tmp_path, seed=0)
    prompts = [[{"role": "user", "content": text}] for text in ("1 + 2 = ?", "What is 4321 + 987?", "3")]
    together = demo.generate(tmp_path, prompts)
    monkeypatch.setattr(demo, "BATCH", 1)
    assert together == demo.generate(tmp_path, prompts)
    assert any(together)


@pytest.mark.parametrize(("before", "after", "code"), [(0.0, 0.5, 0), (0.5, 0.5, 1), (0.5, 0.1, 1)])
def test_exit_code_says_whether_the_model_got_better(demo, tmp_path, monkeypatch, capsys, before, after, code):
    def stage(name, share):
        def run(demo_run):
            demo_run.output_dir.mkdir(exist_ok=True)
            demo_run.scores[name] = share
            demo_run.answers[name] = [demo.Answer("1 < 2?", "Answer: <1>", share)]

        return run

    monkeypatch.setattr(demo, "STAGES", [stage("start", before), stage("grpo", after)])
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output_dir", str(tmp_path / "run")])
    assert demo.main() == code
    assert json.loads((tmp_path / "run" / "scores.json").read_text()) == {"start": before, "grpo": after}
    assert f"{before:.1%} after start, {after:.1%} after grpo" in capsys.readouterr().out


def test_report_has_scores_curves_and_answers(demo, tmp_path):
    (tmp_path / "grpo").mkdir()
    lines = [{"step": 1, "loss": 0.1, "reward": 0.2}, {"step": 2, "loss": 0.3, "reward": 0.5}]
    (tmp_path / "grpo" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = {"start": [demo.Answer("1 < 2?", "?", 0.0)], "grpo": [demo.Answer("1 + 2 = ?", "Answer: <3>", 1.0)]}
    page = demo.write_report(tmp_path, {"start": 0.0, "grpo": 0.875}, answers).read_text()
    assert "87.5%" in page and "Answer: &lt;3&gt;" in page and "1 &lt; 2?" in page
    assert page.count("<svg") == 2  # the loss and the reward; only grpo has metrics
