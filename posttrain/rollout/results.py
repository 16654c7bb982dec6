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
from posttrain.rollout.params import Completion


class Results:
    """The file, open for more lines. Use as a context.

    Args:
        path: of the file, which may hold lines already.
        prompts: what the lines are about, by their index.
        n: completions of each.

    Attributes:
        done: indices of the prompts that have a line.

    Raises:
        DataError: lines that aren't of these prompts, by their number; the file is left as it is.
    """

    def __init__(self, path: Path, prompts: list[Any], n: int) -> None:
        self.done: set[int] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._read(path, prompts, n) if path.exists() else 0
        self._file = path.open("ab")
        self._file.truncate(whole)

    def _read(self, path: Path, prompts: list[Any], n: int) -> int:
        """Notes what is done; returns where the last whole line ends."""
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                index, same = row["index"], row["prompt"] == prompts[row["index"]]
                count = len(row["completions"])
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise DataError(f"{path}, line {number}: not a line of results for these prompts") from error
            if not same or index in self.done:
                raise DataError(f"{path}, line {number}: has results for other prompts; write to another file")
            if count != n:
                raise DataError(f"{path}, line {number}: has {count} completions, not {n}; write to another file")
            self.done.add(index)
        return whole

    def add(self, index: int, prompt: Any, columns: dict[str, Any], completions: list[Completion]) -> None:
        """Write the line of a prompt, with the other columns of its row."""
        row = {
            "index": index,
            "prompt": prompt,
            **{name: value for name, value in columns.items() if name not in ("index", "prompt", "completions")},
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
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.add(index)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
