"""Prompts for on-policy methods: the column `prompt`, a text or a chat, and the other columns for the rewards."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.data.load import load_rows
from posttrain.data.rows import BadRows, DataError
from posttrain.data.values import first_line, is_unicode, kind

_OWN = ("prompt", "completion", "completion_ids")  # names that reward functions get from the trainer


@dataclass(frozen=True)
class Prompt:
    """A prompt, as it was given and in tokens.

    Attributes:
        given: a text, or the messages of a chat.
        token_ids: what the model continues.
        columns: the row's other columns, by name.
        origin: the file and line it came from.
    """

    given: str | list[Any]
    token_ids: list[int]
    columns: Mapping[str, Any]
    origin: str

    @property
    def chat(self) -> bool:
        """Whether the answer is a message."""
        return not isinstance(self.given, str)


def tokenize_prompts(rows: Any, tokenizer: Any, *, skip_bad_rows: bool = False) -> list[Prompt]:
    """The prompts of `rows` (anything that `load_rows` takes); a chat ends where the assistant's answer begins.

    Raises:
        DataError: a row without a usable `prompt`, in one line that names the file and line.
    """
    rows = load_rows(rows, skip_bad_rows=skip_bad_rows)
    bad = BadRows(rows.name, skip_bad_rows)
    prompts = []
    for index, row in enumerate(rows):
        where = rows.where(index)
        try:
            ids = _token_ids(row, tokenizer)
        except DataError as error:
            bad.add(where, str(error))
        else:
            columns = {name: value for name, value in row.items() if name not in _OWN}
            prompts.append(Prompt(row["prompt"], ids, columns, where))
    bad.report(len(prompts))
    return prompts


def _token_ids(row: Any, tokenizer: Any) -> list[int]:
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be an object, not {kind(row)}")
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        if not is_unicode(prompt):
            raise DataError("column 'prompt' holds half of a surrogate pair, which no tokenizer can read")
        ids = tokenizer(prompt, return_attention_mask=False)["input_ids"]
    elif isinstance(prompt, list) and prompt:
        ids = _chat_ids(prompt, row.get("tools"), tokenizer)
    elif prompt is None:
        raise DataError(f"column 'prompt' is missing; found {', '.join(map(repr, row)) or 'no columns'}")
    else:
        what = "an empty list" if prompt == [] else kind(prompt)
        raise DataError(f"column 'prompt' must be a string or a list of messages, not {what}")
    if not ids:
        raise DataError("column 'prompt' has no tokens")
    return list(ids)


def _chat_ids(messages: list[Any], tools: Any, tokenizer: Any) -> list[int]:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError("column 'prompt' is a chat, but the tokenizer has no chat template")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        encoded = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=True)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise DataError(f"column 'prompt': the chat template rejects it: {first_line(error)}") from error
    return encoded["input_ids"]
