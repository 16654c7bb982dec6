"""Prompts for on-policy methods: the column `prompt`, a text or a chat, and the other columns for the rewards."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.data.encoder import parse_tools
from posttrain.data.formats import Format, problem
from posttrain.data.load import load_rows
from posttrain.data.rows import BadRows, DataError
from posttrain.data.values import first_line

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
    chat = isinstance(row, Mapping) and isinstance(row.get("prompt"), list)
    if wrong := problem(row, Format(("prompt",), chat)):
        raise DataError(wrong.replace("must be a string,", "must be a string or a list of messages,"))
    if chat:
        ids = _chat_ids(row["prompt"], row.get("tools"), tokenizer)
    else:
        ids = tokenizer(row["prompt"], return_attention_mask=False)["input_ids"]
    if not ids:
        raise DataError("column 'prompt' has no tokens")
    return list(ids)


def _chat_ids(messages: list[Any], tools: Any, tokenizer: Any) -> list[int]:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError("column 'prompt' is a chat, but the tokenizer has no chat template")
    try:
        tools = parse_tools(tools)
        encoded = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=True)
    except DataError:
        raise
    except (TemplateError, TypeError, ValueError, KeyError, RecursionError) as error:
        raise DataError(f"column 'prompt': the chat template rejects it: {first_line(error)}") from error
    return encoded["input_ids"]
