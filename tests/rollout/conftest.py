"""Engines over tiny models. After every test no engine holds a page or runs."""

from collections.abc import Callable, Iterator

import pytest
import torch
from tiny_model import build_model
from tiny_models import tiny

from posttrain.models import load, prepare
from posttrain.rollout import Engine


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """One token for each byte."""
    return load(build_model(tmp_path_factory.mktemp("tiny") / "model"))[1]


@pytest.fixture(scope="session")
def model(tokenizer):
    """A Llama whose logits differ a lot, for the vocabulary of the tokenizer."""
    llama = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=256, bos_token_id=None, eos_token_id=1)
    prepare(llama)
    return llama


@pytest.fixture
def make_engine(model, tokenizer) -> Iterator[Callable[..., Engine]]:
    """`make_engine(model=..., **options)`."""
    engines = []

    def make(other=None, **options) -> Engine:
        options = {"memory": 1 << 20, "page_size": 8, **options}
        engines.append(Engine(other or model, tokenizer, **options))
        return engines[-1]

    yield make
    for engine in engines:
        assert engine.pages_held == 0
        engine.release()  # which refuses while something runs


@pytest.fixture
def engine(make_engine) -> Engine:
    """With room for everything."""
    return make_engine()


@pytest.fixture
def prompts() -> list[list[int]]:
    """Random tokens: 1, 5, 23 and 40."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 97, (length,), generator=generator).tolist() for length in (1, 5, 23, 40)]
