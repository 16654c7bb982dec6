"""tokenize_preference: the tokens of TRL's DPOTrainer, and clear errors."""

import json
import logging

import numpy as np
import pytest

from posttrain.data import DataError, tokenize_preference

ASK, AGAIN = {"role": "user", "content": "12 + 3 = ?"}, {"role": "user", "content": "sure é?"}
RIGHT, WRONG = {"role": "assistant", "content": "Answer: 15"}, {"role": "assistant", "content": "Answer: 16, I think"}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {}}}]
TEXT = [
    {"prompt": "1 + 1 = ", "chosen": "2", "rejected": "three"},
    {"prompt": "W", "chosen": "hat", "rejected": "hy<|end|>"},
    {"prompt": "The longest of all prompts: ", "chosen": "yes, it is", "rejected": "no"},
]
CHATS = [
    {"prompt": [ASK], "chosen": [RIGHT], "rejected": [WRONG]},
    {"prompt": [ASK, WRONG, AGAIN], "chosen": [RIGHT, AGAIN, RIGHT], "rejected": [WRONG]},
]
IMPLICIT = [
    {"chosen": "1 + 1 = 2", "rejected": "1 + 1 = three"},
    {"chosen": "the same and more", "rejected": "the same and"},
    {"chosen": "a b", "rejected": "c b"},
]


def without_prompt(row: dict) -> dict:
    return {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}


TRL_CASES = {
    "text": (TEXT, None),
    "text, cut": (TEXT, 12),
    "text, implicit prompt": (IMPLICIT, None),
    "chat": (CHATS, None),
    "chat, cut": (CHATS, 30),
    "chat, implicit prompt": ([without_prompt(row) for row in CHATS], None),
    "chat with tools": ([{**row, "tools": json.dumps(TOOLS)} for row in CHATS], None),
}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(("rows", "max_length"), TRL_CASES.values(), ids=TRL_CASES)
def test_tokens_equal_those_of_trl(rows, max_length, tokenizer, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = Qwen3Config(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=8)
    config = trl.DPOConfig(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_length=max_length,
    )
    trainer = trl.DPOTrainer(
        Qwen3ForCausalLM(shape),
        ref_model=Qwen3ForCausalLM(shape),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    ours = tokenize_preference(rows, tokenizer, max_length=max_length, skip_bad_rows=True)
    assert len(ours) == len(trainer.train_dataset)
    for pair, theirs in zip(ours, trainer.train_dataset, strict=True):
        for example, name in ((pair.chosen, "chosen_ids"), (pair.rejected, "rejected_ids")):
            whole = (theirs["prompt_ids"] + theirs[name])[:max_length]
            assert example.input_ids.tolist() == whole
            assert np.flatnonzero(example.loss_mask).tolist() == list(range(len(theirs["prompt_ids"]), len(whole)))


def test_a_pair_knows_where_it_came_from(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(TEXT[0]) + "\n")
    (pair,) = tokenize_preference(path, tokenizer)
    assert pair.origin == pair.rejected.origin == f"{path}, line 2"


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"prompt": "a", "chosen": "b"}, "rows[1]: column 'rejected' is missing; found 'prompt', 'chosen'"),
        ({**TEXT[0], "chosen": 3}, "rows[1]: column 'chosen' must be a string, not a number"),
        ({**TEXT[0], "rejected": [WRONG]}, "rows[1]: column 'rejected' must be a string, not a list"),
        ({**TEXT[0], "prompt": "1" * 30}, "rows[1]: the prompt has 30 tokens, which leaves none of max_length 30"),
    ],
)
def test_bad_rows(row, line, tokenizer, caplog):
    with pytest.raises(DataError) as error:
        tokenize_preference([TEXT[0], row], tokenizer, max_length=30)
    assert str(error.value) == line
    with caplog.at_level(logging.WARNING, "posttrain"):
        assert len(tokenize_preference([TEXT[0], row], tokenizer, max_length=30, skip_bad_rows=True)) == 1
    assert f"skipped 1 bad rows, kept 1:\n  {line}" in caplog.text


def test_rows_of_another_kind(tokenizer):
    with pytest.raises(DataError, match=r"rows\[0\]: preferences need the columns 'chosen', 'rejected'.*found 'text'"):
        tokenize_preference([{"text": "a"}], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template, but the data holds chats in 'prompt' and 'chosen'"):
        tokenize_preference(CHATS, tokenizer)


def test_an_answer_without_a_token(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"rows\[0\]: no token to train on in 'rejected'"):
        tokenize_preference([{"prompt": "a", "chosen": "b", "rejected": ""}], tokenizer)


def test_cut_pairs_are_counted(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "posttrain"):
        tokenize_preference(TEXT[:2], tokenizer, max_length=10)
    assert "1 of 2 pairs were longer than max_length 10 and lost their end" in caplog.text
