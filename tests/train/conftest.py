"""A tiny model, and rows to train it on."""

import json
import random
from pathlib import Path

import pytest
from tiny_model import build_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    """64 short sums of mixed length."""
    draw = random.Random(0)
    pairs = [(draw.randrange(10 ** draw.randint(1, 4)), draw.randrange(10 ** draw.randint(1, 4))) for _ in range(64)]
    return [{"prompt": f"{a} + {b} = ", "completion": f"{a + b}" + "!" * draw.randrange(12)} for a, b in pairs]


@pytest.fixture(scope="session")
def data_file(rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shared_rows() -> list[dict[str, str]]:
    """8 prompts with 4 completions each, one prompt after the other."""
    draw = random.Random(1)
    prompts = [f"Question {n}: what is {draw.randrange(1000)} + {draw.randrange(1000)}? " for n in range(8)]
    return [{"prompt": prompt, "completion": f"It is {draw.randrange(2000)}."} for prompt in prompts for _ in range(4)]


@pytest.fixture(scope="session")
def conversation_trees() -> list[dict[str, list[dict[str, str]]]]:
    """4 openings, each with two answers, after which the conversation goes on in two ways: 16 conversations."""
    draw = random.Random(2)

    def say(role: str) -> dict[str, str]:
        return {"role": role, "content": f"{role} says {draw.randrange(10**8)} and {draw.randrange(10**8)}"}

    rows = []
    for _ in range(4):
        opening = say("user")
        for answer in (say("assistant"), say("assistant")):
            rows += [{"messages": [opening, answer, say("user"), say("assistant")]} for _ in range(2)]
    return rows


@pytest.fixture(scope="session")
def pair_rows() -> list[dict[str, str]]:
    """24 questions, some of them twice in a row, with a right and a wrong answer of different lengths."""
    draw = random.Random(3)
    rows = []
    while len(rows) < 24:
        a, b = draw.randrange(1000), draw.randrange(100)
        for _ in range(draw.randint(1, 2)):
            wrong = "?" * draw.randrange(1, 12)
            rows.append({"prompt": f"What is {a} + {b}? ", "chosen": f"It is {a + b}.", "rejected": f"It's {wrong}"})
    return rows[:24]
