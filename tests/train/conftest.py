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
