"""Encoder: what turns rows of one format into token ids, whatever they are then used for."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Generic, TypeVar

from posttrain.data.formats import Format, problem
from posttrain.data.rows import BadRows, DataError, Row, Rows
from posttrain.data.values import first_line

_CHUNK = 1000  # rows tokenised at a time

Encoded = TypeVar("Encoded")


@dataclass
class Encoder(ABC, Generic[Encoded]):
    """Turns rows of one format into what `Encoded` stands for."""

    format: Format
    tokenizer: Any

    def __post_init__(self) -> None:
        if self.format.chat and not self.tokenizer.chat_template:
            raise DataError(f"the tokenizer has no chat template, but the data holds chats in {self._named()}")

    def encode(self, rows: Rows, bad: BadRows) -> Iterator[tuple[str, Encoded]]:
        """Origin and tokens of every good row."""
        good: list[tuple[str, Row]] = []
        for index, row in enumerate(rows):
            wrong = problem(row, self.format)
            if wrong:
                bad.add(rows.where(index), wrong)
            else:
                good.append((rows.where(index), row))
            if len(good) == _CHUNK or index == len(rows) - 1:
                yield from self._chats(good, bad) if self.format.chat else self._texts(good)
                good = []

    @abstractmethod
    def _texts(self, rows: list[tuple[str, Row]]) -> Iterator[tuple[str, Encoded]]:
        """Plain text, tokenised in one batch."""

    @abstractmethod
    def _chat(self, row: Row) -> Encoded:
        """One chat."""

    def _chats(self, rows: list[tuple[str, Row]], bad: BadRows) -> Iterator[tuple[str, Encoded]]:
        """Chats, one by one: a template may reject a conversation."""
        from jinja2 import TemplateError

        for where, row in rows:
            try:
                encoded = self._chat(row)
            except DataError as error:
                bad.add(where, str(error))
            except (TemplateError, TypeError, ValueError) as error:
                bad.add(where, f"the chat template rejects it: {first_line(error)}")
            else:
                yield where, encoded

    def _named(self) -> str:
        return " and ".join(map(repr, self.format.columns))

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, return_attention_mask=False)["input_ids"] if texts else []

    def _ended(self, text: str) -> str:
        end = self.tokenizer.eos_token
        return text if end is None or text.endswith(end) else text + end


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def parse_tools(value: Any) -> Any:
    """The column `tools`: a list, or its JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"column 'tools' holds broken JSON: {error}") from error
    except RecursionError as error:
        raise DataError("column 'tools' holds broken JSON: nested too deeply") from error


def warn(message: str) -> None:
    """Say something about the data that is no error."""
    logging.getLogger("posttrain").warning(message)
