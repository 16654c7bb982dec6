"""The tokenizer that the data tests share."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """Bytes, a few words, and a chat template with {% generation %}; a fresh one for each test."""
    return AutoTokenizer.from_pretrained(EXAMPLES / "tiny-model")
