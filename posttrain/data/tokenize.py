"""Rows to examples for supervised fine-tuning.

What is a target follows TRL's SFTTrainer:

    text, messages        every token; with assistant_only_loss only what the assistant says
    prompt, completion    the completion; every token with completion_only_loss=False

Plain text (a completion, or a text) ends with the end-of-sequence token; a chat ends as its template says. The
completion starts where the tokens of prompt and of prompt + completion part. What the assistant says is what the
template's {% generation %} blocks hold; a template without them is rendered turn by turn: a turn of the assistant is
what comes between the conversation up to it, with the generation prompt, and the conversation with it. That is exact
where both are prefixes of the whole, and an error where they are not.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from posttrain.data.encoder import Encoder, common_length, parse_tools, warn
from posttrain.data.example import Example
from posttrain.data.formats import detect_sft
from posttrain.data.load import load_rows
from posttrain.data.rows import BadRows, DataError, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Encoded = tuple[list[int], NDArray[np.bool_]]  # token ids, and which of them are targets


def tokenize_sft(
    rows: Any,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None = None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    skip_bad_rows: bool = False,
) -> list[Example]:
    """Tokenise `rows` (anything that `load_rows` takes) and mark the targets.

    Args:
        rows: in one of the formats of `posttrain.data.formats`.
        tokenizer: a Hugging Face tokenizer; for chats, one with a chat template.
        max_length: longer examples keep their first `max_length` tokens; how many were cut is logged.
        completion_only_loss: whether the prompt is left out of the loss; None means: if the rows have one.
        assistant_only_loss: whether only what the assistant says is in the loss.
        skip_bad_rows: skip rows that can't be used, and log how many and which, instead of failing on the first.

    Raises:
        DataError: wrong columns or types, a chat its template rejects, an example without a target, in one line that
            names the file and line.
    """
    rows = load_rows(rows, skip_bad_rows=skip_bad_rows)
    encoder = _Encoder(detect_sft(rows), tokenizer, completion_only_loss, assistant_only_loss)
    bad = BadRows(rows.name, skip_bad_rows)
    examples, cut = [], 0
    for where, (ids, mask) in encoder.encode(rows, bad):
        example = Example(np.array(ids[:max_length], np.int32), mask[:max_length], origin=where)
        if example.num_targets:
            examples.append(example)
            cut += len(example) < len(ids)
        else:
            within = f" among the first {max_length} of {len(ids)}" if len(example) < len(ids) else ""
            bad.add(where, f"no token to train on{within}")
    bad.report(len(examples))
    if cut:
        warn(f"{rows.name}: {cut} of {len(rows)} rows were longer than max_length {max_length} and lost their end")
    if encoder.forked:
        warn(
            f"{rows.name}: in {encoder.forked} of {len(rows)} rows the prompt's last tokens are different with a "
            "completion behind it; they count as part of the completion"
        )
    return examples


@dataclass
class _Encoder(Encoder[Encoded]):
    """Turns rows of one format into token ids and targets."""

    completion_only: bool | None
    assistant_only: bool
    forked: int = 0  # rows whose prompt isn't a prefix of prompt + completion in tokens

    def __post_init__(self) -> None:
        has_prompt = self.format.columns[0] == "prompt"
        if self.completion_only is None:
            self.completion_only = has_prompt
        if self.completion_only and not has_prompt:
            raise DataError(f"completion_only_loss needs columns 'prompt' and 'completion'; this is {self._named()}")
        if self.assistant_only and not self.format.chat:
            raise DataError(f"assistant_only_loss needs chat messages; this is plain text in {self._named()}")
        super().__post_init__()

    def _texts(self, rows: list[tuple[str, Row]]) -> Iterator[tuple[str, Encoded]]:
        prompt, last = self.format.columns[:-1], self.format.columns[-1]
        wholes = ["".join(row[column] for column in prompt) + self._ended(row[last]) for _, row in rows]
        every = self._tokenize(wholes)
        if not self.completion_only:
            yield from (
                (where, (ids, np.ones(len(ids), np.bool_))) for (where, _), ids in zip(rows, every, strict=True)
            )
            return
        prompts = self._tokenize([row[prompt[0]] for _, row in rows])
        for (where, _), ids, before in zip(rows, every, prompts, strict=True):
            yield where, (ids, self._behind(before, ids))

    def _behind(self, prompt: list[int], ids: list[int]) -> NDArray[np.bool_]:
        """True from where `ids` part from `prompt`."""
        shared = common_length(prompt, ids)
        self.forked += shared < len(prompt)
        return np.arange(len(ids)) >= shared

    def _chat(self, row: Row) -> Encoded:
        messages = [message for column in self.format.columns for message in row[column]]
        tools = parse_tools(row.get("tools"))

        def render(messages: list[Any], **options: Any) -> Any:
            return self.tokenizer.apply_chat_template(messages, tools=tools, **options)

        marked = self.assistant_only and bool(_GENERATION.search(self.tokenizer.get_chat_template(tools=tools)))
        whole = render(messages, return_dict=True, return_assistant_tokens_mask=marked)
        ids = whole["input_ids"]
        mask = np.ones(len(ids), np.bool_)
        if marked:
            mask = np.array(whole["assistant_masks"], np.bool_)
        elif self.assistant_only:
            mask = self._assistant(messages, render)
        if self.completion_only:
            mask &= self._behind(render(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"], ids)
        return ids, mask

    def _assistant(self, messages: list[Any], render: Callable[..., Any]) -> NDArray[np.bool_]:
        """True for the tokens of the assistant's turns, by rendering the conversation turn by turn."""
        if not self.tokenizer.is_fast:
            raise DataError("assistant_only_loss needs a fast tokenizer or {% generation %} in the chat template")
        text = render(messages, tokenize=False)
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
        mask = np.zeros(len(starts), np.bool_)
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = render(messages[:index], tokenize=False, add_generation_prompt=True)
                after = render(messages[: index + 1], tokenize=False)
                if not (text.startswith(after) and after.startswith(before)):
                    raise DataError(
                        f"assistant_only_loss can't tell where message {index + 1} lies: the chat template renders it "
                        "differently in context and has no {% generation %} block around what the assistant says"
                    )
                mask |= (ends > len(before)) & (starts < len(after))
        return mask
