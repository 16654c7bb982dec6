"""A tiny model, rows to train it on, and hooks that are gone after each test."""

import random
from pathlib import Path

import pytest
from tiny_model import build_model

import posttrain


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    """12 questions, each with a right and a wrong answer of different lengths."""
    draw = random.Random(0)
    pairs = [(draw.randrange(1000), draw.randrange(100)) for _ in range(12)]
    return [
        {"prompt": f"What is {a} + {b}? ", "chosen": f"It is {a + b}.", "rejected": "?" * draw.randrange(1, 12)}
        for a, b in pairs
    ]


@pytest.fixture
def enabled():
    """The hooks; `posttrain.disable` afterwards, whatever the test did."""
    posttrain.enable()
    yield
    posttrain.disable()
