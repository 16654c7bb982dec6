"""Prompts: what is wrong with one is said with its place, or skipped."""

import pytest

from posttrain.data.prompts import tokenize_prompts
from posttrain.data.rows import DataError


class Tokenizer:
    """A token for each character."""

    chat_template = "some"

    def __call__(self, text, return_attention_mask=False):
        return {"input_ids": [ord(character) for character in text]}

    def apply_chat_template(self, messages, tools=None, **_):
        return self("".join(message["content"] for message in messages))


CHAT = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ["x"]}, "'prompt' must hold messages .*message 1 has no role"),
        ({"prompt": [[1, 2]]}, "'prompt' must hold messages .*message 1 has no role"),
        ({"prompt": [{"role": "user", "content": "\ud800"}]}, "surrogate pair in message 1"),
        ({"prompt": CHAT, "tools": "{"}, "'tools' holds broken JSON: Expecting"),
        ({"prompt": CHAT, "tools": "[" * 5000 + "]" * 5000}, "'tools' holds broken JSON: nested too deeply"),
        ({"prompt": 3}, "must be a string or a list of messages, not a number"),
    ],
)
def test_bad_prompts(row, message):
    good = {"prompt": CHAT}
    with pytest.raises(DataError, match=rf"rows\[1\]: column {message}|rows\[1\]: .*{message}"):
        tokenize_prompts([good, row], Tokenizer())
    (only,) = tokenize_prompts([good, row], Tokenizer(), skip_bad_rows=True)
    assert only.token_ids == [ord("a")]
