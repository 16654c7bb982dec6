"""Rows: a data set in memory that knows where each of its rows came from."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

_LISTED = 10


class DataError(ValueError):
    """Data that can't be used; one line that says where and why."""


class Rows:
    """Rows and their origin.

    Attributes:
        name: the file, hub id or kind of object they came from.
    """

    def __init__(self, name: str, rows: Sequence[Row], lines: Sequence[int] | None = None) -> None:
        """`lines[i]` is the line of `rows[i]` in a text file; without it a row is named by its index."""
        self.name = name
        self._rows = rows
        self._lines = lines

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def where(self, index: int) -> str:
        """The origin of row `index` in words."""
        return f"{self.name}[{index}]" if self._lines is None else f"{self.name}, line {self._lines[index]}"


class BadRows:
    """What happens to rows that can't be used: the first is an error, or all are skipped and listed."""

    def __init__(self, name: str, skip: bool) -> None:
        self._name = name
        self._skip = skip
        self._found: list[str] = []

    def add(self, where: str, problem: str) -> None:
        """Take note of a bad row. Raises `DataError` unless bad rows are skipped."""
        found = f"{where}: {problem}"
        if not self._skip:
            raise DataError(found)
        self._found.append(found)

    def report(self, kept: int) -> None:
        """Log what was skipped. Raises `DataError` if no row was kept."""
        if not kept:
            bad = f"all {len(self._found)} rows are bad; the first: {self._found[0]}" if self._found else "no rows"
            raise DataError(f"{self._name}: {bad}")
        if self._found:
            listed = "".join(f"\n  {found}" for found in self._found[:_LISTED])
            more = f"\n  and {len(self._found) - _LISTED} more" if len(self._found) > _LISTED else ""
            logging.getLogger("posttrain").warning(
                "%s: skipped %d bad rows, kept %d:%s%s", self._name, len(self._found), kept, listed, more
            )
