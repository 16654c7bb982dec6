"""The file that `posttrain generate` writes: a JSON line for each prompt, in the order in which they get done.

A line is written, and on the disk, before the next prompt counts as done. So a run that was killed goes on where it
stopped: what is whole in the file stays, a last line that was cut off is removed, and its prompt is done again.
"""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from posttrain.data.rows import DataError
from posttrain.data.values import first_line
from posttrain.rollout.params import Completion

_OWN = ("index", "generated_by", "completions")  # names of a line that no column of a row may have


def check_row(row: Any, where: str) -> None:
    """Raises `DataError` for a row that a line can't hold, with `where` it came from: it has a column of a name that
    the line needs, or a value that JSON doesn't know."""
    taken = next((name for name in _OWN if name in row), None)
    if taken is not None:
        raise DataError(f"{where}: column {taken!r} has the name of something in the results; rename it")
    for name, value in row.items():
        try:
            _line({name: value})
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{where}: column {name!r} can't be written as JSON: {first_line(error)}") from error


class Results:
    """The file, open for more lines. Use as a context.

    Args:
        path: of the file, which may hold lines already.
        prompts: what the lines are about, by their index.
        settings: what else the completions depend on, by name; every line holds it.

    Attributes:
        done: indices of the prompts that have a line.

    Raises:
        DataError: lines that aren't of these prompts and settings, by their number; the file is left as it is.
    """

    def __init__(self, path: Path, prompts: list[Any], settings: dict[str, Any]) -> None:
        self.done: set[int] = set()
        self._settings = settings
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._read(path, prompts) if path.exists() else 0
        self._file = path.open("ab")
        self._file.truncate(whole)

    def _read(self, path: Path, prompts: list[Any]) -> int:
        """Notes what is done; returns where the last whole line ends."""
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                index, same = row["index"], row["prompt"] == prompts[row["index"]]
                before = dict(row["generated_by"])
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise DataError(f"{path}, line {number}: not a line of results for these prompts") from error
            if not same or index in self.done:
                raise DataError(f"{path}, line {number}: has results for other prompts; write to another file")
            for name, value in self._settings.items():
                if name not in before or before[name] != value:
                    had = repr(before[name]) if name in before else "not there"
                    raise DataError(f"{path}, line {number}: {name} was {had}, now {value!r}; write to another file")
            self.done.add(index)
        return whole

    def add(self, index: int, prompt: Any, columns: dict[str, Any], completions: list[Completion]) -> None:
        """Write the line of a prompt, with the other columns of its row."""
        row = {
            "index": index,
            "prompt": prompt,
            **{name: value for name, value in columns.items() if name != "prompt"},
            "generated_by": self._settings,
            "completions": [
                {
                    "text": completion.text,
                    "finish_reason": completion.finish_reason,
                    "num_tokens": len(completion.token_ids),
                    "logprob": sum(completion.logprobs),
                }
                for completion in completions
            ],
        }
        self._file.write(_line(row))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.add(index)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
