"""The bundled model: loads by name, keeps every text, and is what its script writes."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from posttrain.data import tokenize_sft

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "tiny-model"


@pytest.fixture(scope="module")
def write():
    return runpy.run_path(str(EXAMPLES / "make_tiny_model.py"))["write"]


def texts() -> list[str]:
    lines = [line for name in ("train", "test") for line in (EXAMPLES / f"data/arithmetic-{name}.jsonl").open()]
    return [message["content"] for line in lines for message in json.loads(line)["messages"]]


def test_the_script_writes_what_is_committed(write, tmp_path):
    write(tmp_path, None)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
    written, committed = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, FOLDER))
    assert written | {"transformers_version": ""} == committed | {"transformers_version": ""}


def test_the_tokenizer_keeps_every_text():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    every = [*texts(), "  two  spaces\n\ttab é 漢字 \U0001f642 <|end|>", "I don't  know..."]
    encoded = tokenizer(every)["input_ids"]
    assert tokenizer.batch_decode(encoded) == every
    assert len(tokenizer) <= 288


def test_digits_are_tokens_and_answers_are_short():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert tokenizer.tokenize("12 + 345") == ["1", "2", "Ġ+", "Ġ", "3", "4", "5"]
    assert tokenizer.tokenize("Tens: 4+8+1=13") == ["Tens", ":", "Ġ", "4", "+", "8", "+", "1", "=", "1", "3"]
    examples = tokenize_sft(EXAMPLES / "data/arithmetic-train.jsonl", tokenizer, assistant_only_loss=True)
    targets = np.array([example.num_targets for example in examples])
    assert targets.min() >= 20 and targets.max() <= 60
    assert all(tokenizer.eos_token_id == example.input_ids[-1] for example in examples)


def test_weights_are_seeded_and_load(write, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(tmp_path / name, seed)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert 3e5 <= model.num_parameters() <= 3e6
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert AutoConfig.from_pretrained(FOLDER).vocab_size == len(tokenizer)
