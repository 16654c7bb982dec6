"""Completions on disk: what was drawn, with its rewards, as Parquet."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write a table, one row for each completion. What Parquet has no type for (mixed kinds) becomes JSON text."""
    import pyarrow
    import pyarrow.parquet

    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
            arrays[name] = pyarrow.array([json.dumps(value, default=str) for value in values])
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(arrays), path)
