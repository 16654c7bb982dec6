"""tokenize_sft: targets as TRL sets them, templates without generation blocks, and clear errors."""

import logging
from pathlib import Path

import numpy as np
import pytest

from posttrain.data import DataError, tokenize_sft

USER, HELLO = {"role": "user", "content": "hi é"}, {"role": "assistant", "content": "hello é"}
TALK = [USER, HELLO, {"role": "user", "content": "12 + 3 = ?"}, {"role": "assistant", "content": "Answer: 15"}]
PLAIN_TEMPLATE = (
    "{%- for message in messages -%}<|{{ message.role }}|>{{ message.content }}<|end|>\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {}}}]


def trained(example, tokenizer) -> str:
    return tokenizer.decode(example.input_ids[example.loss_mask])


def text(example, tokenizer) -> str:
    return tokenizer.decode(example.input_ids)


TRL_CASES = {
    "text": ([{"text": "Compute 1 + 2."}, {"text": "ends<|end|>"}], {}),
    "messages": ([{"messages": TALK}, {"messages": TALK[:2]}], {}),
    "assistant only": ([{"messages": TALK}, {"messages": TALK[:2]}], {"assistant_only_loss": True}),
    "prompt and completion": ([{"prompt": "1 + 1 = ", "completion": "2"}, {"prompt": "W", "completion": "hat"}], {}),
    "prompt and completion, all": ([{"prompt": "1 + 1 = ", "completion": "2"}], {"completion_only_loss": False}),
    "chat prompt": ([{"prompt": TALK[:3], "completion": TALK[3:]}, {"prompt": [USER], "completion": [HELLO]}], {}),
    "chat prompt, assistant only": (
        [{"prompt": TALK[:1], "completion": TALK[1:]}],
        {"assistant_only_loss": True},
    ),
    "truncated": ([{"prompt": "1 + 1 = ", "completion": "2"}, {"prompt": "1", "completion": "2"}], {"max_length": 4}),
    "truncated chat": ([{"messages": TALK}, {"messages": TALK[:2]}], {"max_length": 12, "assistant_only_loss": True}),
}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(("rows", "options"), TRL_CASES.values(), ids=TRL_CASES)
def test_tokens_and_targets_equal_those_of_trl(rows, options, tokenizer, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=8)
    )
    config = trl.SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, **options)
    trainer = trl.SFTTrainer(model, config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    ours = tokenize_sft(rows, tokenizer, **options, skip_bad_rows=True)
    assert len(ours) == len(trainer.train_dataset)
    for example, theirs in zip(ours, trainer.train_dataset, strict=True):
        assert example.input_ids.tolist() == theirs["input_ids"]
        assert np.where(example.loss_mask, example.input_ids, -100).tolist() == theirs["labels"]
        assert (example.input_ids.dtype, example.loss_mask.dtype) == (np.int32, np.bool_)


def test_what_is_trained(tokenizer):
    (example,) = tokenize_sft([{"messages": TALK}], tokenizer, assistant_only_loss=True)
    assert trained(example, tokenizer) == "hello é<|end|>Answer: 15<|end|>"
    assert example.origin == "rows[0]"
    (example,) = tokenize_sft([{"prompt": "a", "completion": "b"}], tokenizer)
    assert (text(example, tokenizer), trained(example, tokenizer)) == ("ab<|end|>", "b<|end|>")
    (example,) = tokenize_sft([{"prompt": [USER], "completion": [HELLO]}], tokenizer)
    assert trained(example, tokenizer) == "hello é<|end|>"


def test_prompt_whose_last_token_changes_counts_as_completion(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "posttrain"):
        (example,) = tokenize_sft([{"prompt": "W", "completion": "hat"}], tokenizer)
    assert trained(example, tokenizer) == "What<|end|>"
    assert "in 1 of 1 rows the prompt's last tokens are different" in caplog.text


def test_template_without_generation_block_is_rendered_turn_by_turn(tokenizer):
    tokenizer.chat_template = PLAIN_TEMPLATE
    (example,) = tokenize_sft([{"messages": TALK}], tokenizer, assistant_only_loss=True)
    assert trained(example, tokenizer) == "hello é<|end|>Answer: 15<|end|>"
    (example,) = tokenize_sft([{"messages": TALK}], tokenizer)
    assert text(example, tokenizer).count("<|end|>") == 4 and example.loss_mask.all()


@pytest.mark.parametrize("family", ["gemma", "gemma3", "cohere", "lfm2", "qwen3_instruct_2507", "qwen3_vl"])
def test_turn_by_turn_equals_the_generation_blocks_of_trls_templates(family, tokenizer):
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    masks = []
    for name in (family, f"{family}_training"):
        tokenizer.chat_template = (folder / f"{name}.jinja").read_text()
        (example,) = tokenize_sft([{"messages": TALK}], tokenizer, assistant_only_loss=True)
        masks.append((example.input_ids.tolist(), example.loss_mask.tolist()))
    assert masks[0] == masks[1]
    assert 0 < sum(masks[0][1]) < len(masks[0][1])


def test_template_that_rewrites_history_is_an_error_without_generation_block(tokenizer):
    tokenizer.chat_template = (
        "{%- for message in messages -%}<|{{ message.role }}|>"
        "{{ message.content if loop.last or message.role == 'user' else '...' }}<|end|>{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
    )
    with pytest.raises(DataError, match=r"rows\[0\]: assistant_only_loss can't tell where message 2 lies"):
        tokenize_sft([{"messages": TALK}], tokenizer, assistant_only_loss=True)
    (example,) = tokenize_sft([{"messages": TALK[:2]}], tokenizer, assistant_only_loss=True)
    assert trained(example, tokenizer) == "hello é<|end|>"


def test_tools_reach_the_template(tokenizer):
    tokenizer.chat_template = "{{ tools[0].function.name if tools else 'none' }}" + PLAIN_TEMPLATE
    rows = [
        {"messages": TALK[:2], "tools": TOOLS},
        {"messages": TALK[:2], "tools": '[{"function": {"name": "text"}}]'},
        {"messages": TALK[:2], "tools": None},
    ]
    starts = [text(example, tokenizer).split("<")[0] for example in tokenize_sft(rows, tokenizer)]
    assert starts == ["add", "text", "none"]
    with pytest.raises(DataError, match=r"rows\[0\]: column 'tools' holds broken JSON"):
        tokenize_sft([{"messages": TALK, "tools": "[{"}], tokenizer)


def test_no_end_of_sequence_token(tokenizer):
    tokenizer.eos_token = None
    (example,) = tokenize_sft([{"text": "abc"}], tokenizer)
    assert text(example, tokenizer) == "abc"


def test_many_rows_keep_their_order(tokenizer):
    rows = [{"prompt": "n", "completion": str(n)} for n in range(2500)]
    examples = tokenize_sft(rows, tokenizer)
    assert [trained(example, tokenizer) for example in examples] == [f"{n}<|end|>" for n in range(2500)]
    assert [example.origin for example in examples] == [f"rows[{n}]" for n in range(2500)]


MESSAGES = r"rows\[0\]: column 'messages' "


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"question": "x"}, {}, r"rows\[0\]: SFT needs the column 'text', or .*'completion'; found 'question'"),
        ({}, {}, "found no columns"),
        ("x", {}, r"rows\[0\]: SFT needs .*; the row is a string"),
        ({"text": 5}, {}, r"rows\[0\]: column 'text' must be a string, not a number"),
        ({"text": "\ud800"}, {}, "column 'text' holds half of a surrogate pair"),
        ({"prompt": [USER], "completion": "x"}, {}, "column 'completion' must be a list of messages, not a string"),
        ({"messages": "x"}, {}, MESSAGES + "must be a list of messages, not a string"),
        ({"messages": []}, {}, MESSAGES + "has no messages"),
        ({"messages": [USER, {"content": "x"}]}, {}, MESSAGES + ".*; message 2 has no role"),
        ({"messages": [USER, {"role": "assistant"}]}, {}, MESSAGES + r"has no content in message 2 \(assistant\)"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            {},
            MESSAGES + r"has a number as content of message 1 \(user\)",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, {}, "half of a surrogate pair in message 1"),
        ({"messages": TALK, "tools": 5}, {}, "column 'tools' must be a list or a JSON string, not a number"),
        ({"text": "x"}, {"completion_only_loss": True}, "needs columns 'prompt' and 'completion'; this is 'text'"),
        ({"text": "x"}, {"assistant_only_loss": True}, "assistant_only_loss needs chat messages; .* 'text'"),
        ({"prompt": "12", "completion": "3"}, {"max_length": 2}, "no token to train on among the first 2 of 4"),
        ({"messages": [USER]}, {"assistant_only_loss": True}, r"rows\[0\]: no token to train on$"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, {}, "the chat template rejects it: "),
    ],
)
def test_a_bad_row_is_one_line_that_says_what(row, options, message, tokenizer):
    with pytest.raises(DataError, match=message) as caught:
        tokenize_sft([row], tokenizer, **options)
    assert "\n" not in str(caught.value)


def test_bad_rows_name_file_and_line_or_are_skipped(tokenizer, tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": null}\nbroken\n{"text": "b"}\n{"txt": "c"}\n')
    with pytest.raises(DataError, match=rf"^{path}, line 3: broken JSON"):
        tokenize_sft(path, tokenizer)
    with caplog.at_level(logging.WARNING, "posttrain"):
        examples = tokenize_sft(path, tokenizer, skip_bad_rows=True)
    assert [example.origin for example in examples] == [f"{path}, line 1", f"{path}, line 4"]
    assert f"line 2: column 'text' is missing; found no columns\n  {path}, line 5: " in caplog.text
    assert "column 'text' is missing; found 'txt'" in caplog.text
    path.write_text('{"text": "a"}\n{"txt": "c"}\n')
    with pytest.raises(DataError, match=rf"^{path}, line 2: column 'text' is missing; found 'txt'$"):
        tokenize_sft(path, tokenizer)


def test_truncation_is_reported_once(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "posttrain"):
        examples = tokenize_sft([{"text": "123456"}, {"text": "12"}, {"text": "1234"}], tokenizer, max_length=4)
    assert [text(example, tokenizer) for example in examples] == ["1234", "12<|end|>", "1234"]
    assert caplog.messages == ["rows: 2 of 3 rows were longer than max_length 4 and lost their end"]


def test_a_tokenizer_without_template_is_an_error(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="the tokenizer has no chat template, but the data holds chats in 'messages'"):
        tokenize_sft([{"messages": TALK}], tokenizer)
