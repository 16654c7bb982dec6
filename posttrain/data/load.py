"""Rows from a file, the hub or memory.

JSONL, JSON and CSV are read here, line by line, so that an error can name its line; values of a CSV file stay strings.
Parquet is read by pyarrow, everything else by `datasets`; both are imported only when used.
"""

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from posttrain.data.rows import BadRows, DataError, Row, Rows
from posttrain.data.values import first_line, is_unicode, kind


def load_rows(source: Any, split: str = "train", *, skip_bad_rows: bool = False) -> Rows:
    """Load a data set.

    Args:
        source: path of a JSONL, JSON, CSV or Parquet file; a folder or hub id that `datasets` can load; a list of
            dicts; a `datasets.Dataset`; or `Rows`, returned as they are.
        split: which split of a folder or hub id.
        skip_bad_rows: skip rows that can't be read, and log how many and which, instead of failing on the first.

    Raises:
        DataError: one line with the file, the line and what is wrong.
    """
    if isinstance(source, Rows):
        return source
    if isinstance(source, str | Path):
        return _load(source, split, skip_bad_rows)
    if isinstance(source, Mapping) and any(hasattr(part, "column_names") for part in source.values()):
        raise DataError(f"{type(source).__name__} holds the splits {', '.join(map(repr, source))}; give one of them")
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")) or hasattr(source, "keys"):
        raise DataError(f"rows must be a path, a hub id, a list of dicts or a Dataset; got {type(source).__name__}")
    name = "rows" if isinstance(source, list | tuple) else type(source).__name__
    if not len(source):
        raise DataError(f"{name}: no rows")
    return Rows(name, source)


def _load(source: str | Path, split: str, skip_bad_rows: bool) -> Rows:
    path = Path(source)
    if path.is_file():
        read = _READERS.get(path.suffix.lower())
        if read is None:
            raise DataError(f"{path}: unknown kind of file {path.suffix!r}; known are {', '.join(_READERS)}")
        return _read(path, read, skip_bad_rows)
    if path.is_dir() or _looks_like_hub_id(str(source)):
        return _from_datasets(str(source), split)
    raise DataError(_missing(path))


def _read(path: Path, read: Any, skip_bad_rows: bool) -> Rows:
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    bad = BadRows(str(path), skip_bad_rows)
    try:
        rows, lines = read(path, bad)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    bad.report(len(rows))
    return Rows(str(path), rows, lines)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines. Bytes that aren't UTF-8 become lone surrogates, for `is_unicode` to find."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield number, line.decode("utf-8", "surrogateescape")


def _read_jsonl(path: Path, bad: BadRows) -> tuple[list[Row], list[int]]:
    rows: list[Row] = []
    lines: list[int] = []
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            bad.add(f"{path}, line {number}", f"broken JSON: {error.msg}, at character {error.colno}")
            continue
        except RecursionError:
            bad.add(f"{path}, line {number}", "broken JSON: nested too deeply")
            continue
        if not isinstance(row, dict):
            bad.add(f"{path}, line {number}", f"a row must be a JSON object, not {kind(row)}")
        elif not is_unicode(line):
            bad.add(f"{path}, line {number}", "the text is not UTF-8")
        else:
            rows.append(row)
            lines.append(number)
    return rows, lines


def _read_json(path: Path, bad: BadRows) -> tuple[list[Row], list[int] | None]:
    """One array of objects; or JSON lines under the name .json, as `datasets` allows."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the text is not UTF-8, at byte {error.start}") from error
    if not text.lstrip().startswith("["):
        if text.lstrip().split("\n")[0].strip() == "{":
            raise DataError(f"{path}: rows are an array of objects, or one object on each line; this is one object")
        return _read_jsonl(path, bad)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: broken JSON: {error.msg}, at character {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"{path}: broken JSON: nested too deeply") from error
    rows: list[Row] = []
    for index, row in enumerate(values):
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad.add(f"{path}[{index}]", f"a row must be a JSON object, not {kind(row)}")
    return rows, None


def _read_csv(path: Path, bad: BadRows) -> tuple[list[Row], list[int]]:
    rows: list[Row] = []
    lines: list[int] = []
    before = csv.field_size_limit(sys.maxsize)
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise DataError(f"{path}, line 1: broken CSV: {error}") from error
        if twice := [name for name, times in Counter(header).items() if name and times > 1]:
            raise DataError(f"{path}, line 1: column {twice[0]!r} is there {header.count(twice[0])} times")
        while True:
            first = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                bad.add(f"{path}, line {first}", f"broken CSV: {error}")
                continue
            if fields is None:
                return rows, lines
            if len(fields) != len(header):
                if fields:
                    bad.add(f"{path}, line {first}", f"{len(fields)} fields, but the header has {len(header)}")
            elif not all(map(is_unicode, fields)):
                bad.add(f"{path}, line {first}", "the text is not UTF-8")
            else:
                rows.append(dict(zip(header, fields, strict=True)))
                lines.append(first)
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path, bad: BadRows) -> tuple[list[Row], None]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist(), None
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: broken Parquet: {first_line(error)}") from error


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def _from_datasets(source: str, split: str) -> Rows:
    import datasets

    name = f"{source} ({split})"
    try:
        dataset = datasets.load_dataset(source, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if not Path(source).exists():
            name = f"{name} is no file here, and as a hub id"
        raise DataError(f"{name}: {first_line(error)}") from error
    if not len(dataset):
        raise DataError(f"{name}: no rows")
    return Rows(name, dataset)


def _looks_like_hub_id(source: str) -> bool:
    """`name` or `owner/name`, unless it names a kind of file or something in a folder that is here."""
    parts = source.split("/")
    if not 1 <= len(parts) <= 2 or not all(parts) or parts[0][0] in ".~":
        return False
    return Path(source).suffix.lower() not in _READERS and not (len(parts) == 2 and Path(parts[0]).is_dir())


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path}: no such file; the folder {path.parent} does not exist"
    near = get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"{path}: no such file" + (f"; did you mean {path.parent / near[0]}?" if near else "")
