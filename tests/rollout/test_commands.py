"""`posttrain generate` and `posttrain chat`: what they write, and how a run that was stopped goes on."""

import json
import shutil
from datetime import date

import pytest
from tiny_model import build_model

from posttrain.cli import main
from posttrain.models import load
from posttrain.rollout import Engine, SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model."""
    return build_model(tmp_path_factory.mktemp("commands") / "model")


@pytest.fixture
def prompts(tmp_path):
    """Rows with a column besides the prompt."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} + {i} =", "answer": 2 * i}) + "\n" for i in range(4)))
    return path


def generate(folder, prompts, out, *more):
    """Run the command."""
    options = ["--model", str(folder), "--prompts", str(prompts), "--out", str(out), "--n", "2", "--max-tokens", "5"]
    return main(["generate", *options, *more])


def rows_of(out):
    """The lines of a file of results, by index."""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["index"])


def test_results(folder, prompts, tmp_path, capsys):
    out = tmp_path / "new" / "out.jsonl"
    assert generate(folder, prompts, out) == 0
    assert "4 prompts done, 0 were done before" in capsys.readouterr().out
    for i, row in enumerate(rows_of(out)):
        assert (row["index"], row["prompt"], row["answer"]) == (i, f"{i} + {i} =", 2 * i)
        assert len(row["completions"]) == 2
        for completion in row["completions"]:
            ended = completion["finish_reason"] == "stop"
            assert completion["num_tokens"] == 5 or (ended and completion["num_tokens"] < 5)
        assert all(c["logprob"] < 0 and isinstance(c["text"], str) for c in row["completions"])


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_going_on(folder, prompts, tmp_path, capsys, cut):
    """After a kill in the middle of a line, everything is there once, as if nothing had happened."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    generate(folder, prompts, whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:2]) + lines[2][:cut])
    capsys.readouterr()
    assert generate(folder, prompts, out) == 0
    assert "2 prompts done, 2 were done before" in capsys.readouterr().out
    assert rows_of(out) == rows_of(whole)
    assert generate(folder, prompts, out) == 0
    assert "0 prompts done, 4 were done before" in capsys.readouterr().out


def test_results_of_something_else(folder, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    generate(folder, prompts, out)
    before = out.read_bytes()
    capsys.readouterr()
    for name, now, was in (("n", "3", "2"), ("seed", "1", "0"), ("top_p", "0.5", "1.0"), ("stop", "x", "[]")):
        assert generate(folder, prompts, out, f"--{name.replace('_', '-')}", now) == 2
        error = capsys.readouterr().err
        assert f"out.jsonl, line 1: {name} was {was}, now " in error and error.count("\n") == 1
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert generate(moved, prompts, out) == 2
    assert f"model was '{folder}', now '{moved}'; write to another file" in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "something else"}) + "\n")
    assert generate(folder, other, out) == 2
    assert "out.jsonl, line 1: " in capsys.readouterr().err
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "a"}, "line 1: no column 'prompt' or 'messages', only 'text'"),
        ({"prompt": 3}, "line 1: column 'prompt' must be a text or a list of messages, got 3"),
        ({"prompt": "a", "index": 7}, "line 1: column 'index' has the name of something in the results; rename it"),
        ({"prompt": "a", "generated_by": "b"}, "line 1: column 'generated_by' has the name of something"),
        ({"prompt": "a", "completions": "b"}, "line 1: column 'completions' has the name of something in the results"),
        ({"prompt": "a", "x": float("nan")}, "line 1: column 'x' can't be written as JSON: Out of range float values"),
        ({"prompt": "a", "x": ["\ud800"]}, "line 1: column 'x' can't be written as JSON: 'utf-8' codec can't encode"),
        ({"prompt": "a\ud800"}, "line 1: column 'prompt' can't be written as JSON: 'utf-8' codec can't encode"),
        ({"messages": []}, "line 1: column 'messages' must be a text or a list of messages, got []"),
        ({"prompt": ""}, "prompt 0 has no tokens, and the tokenizer no beginning-of-sequence token to start from"),
        ({"prompt": "x" * 300}, "prompt 0 has 300 tokens, more than the 256 of the context"),
    ],
)
def test_bad_rows(folder, tmp_path, capsys, row, problem):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert generate(folder, path, tmp_path / "out.jsonl") == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1


def test_rows_with_values_that_json_lacks(folder, tmp_path, capsys):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "prompts.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a", "when": date(2020, 1, 1)}]), path)
    assert generate(folder, path, tmp_path / "out.jsonl") == 2
    error = capsys.readouterr().err
    assert "prompts.parquet[0]: column 'when' can't be written as JSON: Object of type" in error
    assert not (tmp_path / "out.jsonl").exists()


def test_bad_options(folder, prompts, tmp_path, capsys):
    assert generate(folder, prompts, tmp_path / "out.jsonl", "--top-p", "2") == 2
    assert "top_p must be in (0, 1], got 2.0" in capsys.readouterr().err
    assert generate(tmp_path / "none", prompts, tmp_path / "out.jsonl") == 2
    assert "no such folder" in capsys.readouterr().err


def test_chat(folder, capsys, monkeypatch):
    said = iter(["hello", "and again", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    options = ["--max-tokens", "4", "--temperature", "0", "--system", "be brief"]
    assert main(["chat", "--model", str(folder), *options]) == 0
    engine = Engine(*load(folder))
    messages = [{"role": "system", "content": "be brief"}]
    for text in ("hello", "and again"):
        messages.append({"role": "user", "content": text})
        [[answer]] = engine.generate([messages], SamplingParams(max_tokens=4, temperature=0))
        messages.append({"role": "assistant", "content": answer.text})
    assert capsys.readouterr().out == "".join(messages[i]["content"] + "\n" for i in (2, 4))


def test_a_system_text_without_a_template(tmp_path, capsys):
    path = build_model(tmp_path / "model")
    tokenizer = load(path)[1]
    tokenizer.chat_template = None
    (path / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(path)
    assert main(["chat", "--model", str(path), "--system", "be brief"]) == 2
    assert "--system needs a chat template, and the tokenizer of" in capsys.readouterr().err
