"""Rows to preference pairs: a prompt with a chosen and a rejected answer, tokenised as TRL's DPOTrainer does it.

Prompt, prompt + chosen and prompt + rejected are tokenised each as a whole; plain text ends with the end-of-sequence
token, a chat as its template says. The answers start where one of them parts from the prompt, and what the prompt has
behind that place (a token that merges with the answer, an opening that the template drops) is left out.

Without a column `prompt`, the prompt is what chosen and rejected begin with alike: messages, or characters without a
space at their end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from posttrain.data.encoder import Encoder, common_length, parse_tools, warn
from posttrain.data.example import Example, Pair
from posttrain.data.formats import detect_preference
from posttrain.data.load import load_rows
from posttrain.data.rows import BadRows, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize_preference(
    rows: Any,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None = None,
    skip_bad_rows: bool = False,
) -> list[Pair]:
    """Tokenise `rows` (anything that `load_rows` takes) as pairs whose answers are the targets.

    Args:
        rows: in one of the preference formats of `posttrain.data.formats`.
        tokenizer: a Hugging Face tokenizer; for chats, one with a chat template.
        max_length: prompt and answer keep their first `max_length` tokens; how many pairs were cut is logged.
        skip_bad_rows: skip rows that can't be used, and log how many and which, instead of failing on the first.

    Raises:
        DataError: wrong columns or types, a chat its template rejects, a prompt of `max_length` tokens or more, an
            answer without a token, in one line that names the file and line.
    """
    rows = load_rows(rows, skip_bad_rows=skip_bad_rows)
    encoder = _Encoder(detect_preference(rows), tokenizer)
    bad = BadRows(rows.name, skip_bad_rows)
    pairs, cut = [], 0
    for where, ids in encoder.encode(rows, bad):
        chosen, rejected = (_example(whole, ids.start, max_length, where) for whole in (ids.chosen, ids.rejected))
        if max_length is not None and ids.start >= max_length:
            bad.add(where, f"the prompt has {ids.start} tokens, which leaves none of max_length {max_length}")
        elif not (chosen.num_targets and rejected.num_targets):
            bad.add(where, f"no token to train on in {'rejected' if chosen.num_targets else 'chosen'!r}")
        else:
            pairs.append(Pair(chosen, rejected))
            cut += max(len(ids.chosen), len(ids.rejected)) > max(len(chosen), len(rejected))
    bad.report(len(pairs))
    if cut:
        warn(f"{rows.name}: {cut} of {len(rows)} pairs were longer than max_length {max_length} and lost their end")
    if encoder.forked:
        warn(
            f"{rows.name}: in {encoder.forked} of {len(rows)} rows the prompt's last tokens are different with an "
            "answer behind it; the answers start before them"
        )
    return pairs


def _example(ids: list[int], start: int, max_length: int | None, origin: str) -> Example:
    return Example(np.array(ids[:max_length], np.int32), np.arange(len(ids[:max_length])) >= start, origin=origin)


class _Encoded(NamedTuple):
    """Token ids, each with the prompt's, and where the answers start."""

    chosen: list[int]
    rejected: list[int]
    start: int


@dataclass
class _Encoder(Encoder[_Encoded]):
    """Turns preference rows of one format into token ids."""

    forked: int = 0  # rows whose prompt isn't a prefix of prompt + answer in tokens

    def _texts(self, rows: list[tuple[str, Row]]) -> Iterator[tuple[str, _Encoded]]:
        parts = [self._parts(row) for _, row in rows]
        prompts = self._tokenize([prompt for prompt, _, _ in parts])
        chosen = self._tokenize([prompt + self._ended(answer) for prompt, answer, _ in parts])
        rejected = self._tokenize([prompt + self._ended(answer) for prompt, _, answer in parts])
        for (where, _), *ids in zip(rows, prompts, chosen, rejected, strict=True):
            yield where, self._encoded(*ids)

    def _chat(self, row: Row) -> _Encoded:
        tools = parse_tools(row.get("tools"))
        prompt, chosen, rejected = self._parts(row)

        def render(messages: list[Any], **options: Any) -> list[int]:
            return self.tokenizer.apply_chat_template(messages, tools=tools, return_dict=True, **options)["input_ids"]

        return self._encoded(
            render(prompt, add_generation_prompt=True), render(prompt + chosen), render(prompt + rejected)
        )

    def _parts(self, row: Row) -> tuple[Any, Any, Any]:
        """Prompt, chosen and rejected, of characters or of messages."""
        if "prompt" in self.format.columns:
            return row["prompt"], row["chosen"], row["rejected"]
        return _split(row["chosen"], row["rejected"])

    def _encoded(self, prompt: list[int], chosen: list[int], rejected: list[int]) -> _Encoded:
        start = min(common_length(prompt, chosen), common_length(prompt, rejected))
        self.forked += start < len(prompt)
        return _Encoded(chosen, rejected, start)


def _split(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """What both begin with, and the rest of each."""
    shorter = min(len(chosen), len(rejected))
    end = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if end is None:
        end = max(shorter - 1, 0)  # one is the beginning of the other: its last character or message is the answer
    elif end and chosen[end - 1] == " ":
        end -= 1
    return chosen[:end], chosen[end:], rejected[end:]
