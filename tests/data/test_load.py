"""load_rows: what it reads, and what it says when it can't."""

import json
import logging
import subprocess
import sys

import pytest

from posttrain.data import DataError, load_rows

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")

ROWS = [{"text": "one"}, {"text": 'two, "quoted"\nlines é'}, {"text": "three"}]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    sources = [
        write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, ROWS)) + "\n"),
        write(tmp_path / "b.json", json.dumps(ROWS, indent=2)),
        write(tmp_path / "c.json", b"\xef\xbb\xbf" + "\n".join(map(json.dumps, ROWS)).encode()),
        write(tmp_path / "d.csv", 'text\none\n"two, ""quoted""\nlines é"\n\nthree\n'),
        tmp_path / "e.parquet",
    ]
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), sources[-1])
    for source in [*sources, *map(str, sources), ROWS, datasets.Dataset.from_list(ROWS)]:
        assert list(load_rows(source)) == ROWS
    assert load_rows(sources[0]).where(1) == f"{sources[0]}, line 3"
    assert load_rows(sources[3]).where(2) == f"{sources[3]}, line 6"
    assert load_rows(sources[4]).where(2) == f"{sources[4]}[2]"
    assert load_rows(ROWS).where(2) == "rows[2]"


def test_rows_and_folders(tmp_path, monkeypatch):
    rows = load_rows(ROWS)
    assert load_rows(rows) is rows
    monkeypatch.setattr(datasets, "load_dataset", lambda source, split: datasets.Dataset.from_list(ROWS[: len(split)]))
    assert list(load_rows(tmp_path, "xy")) == ROWS[:2]
    assert list(load_rows("somebody/something", "x")) == ROWS[:1]
    with pytest.raises(DataError, match=r"somebody/something \(\): no rows"):
        load_rows("somebody/something", "")


def test_csv_values_stay_text(tmp_path):
    rows = load_rows(write(tmp_path / "a.csv", "prompt,completion\n1+1,2\n2+2,\n" + "7" * 200_000 + ",8\n"))
    assert list(rows)[:2] == [{"prompt": "1+1", "completion": "2"}, {"prompt": "2+2", "completion": ""}]
    assert len(rows[2]["prompt"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl: the file is empty"),
        ("a.jsonl", "\n\n", r"a\.jsonl: no rows"),
        ("a.csv", "text\n", r"a\.csv: no rows"),
        ("a.json", "[]", r"a\.json: no rows"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: broken JSON: Expecting value, at character 9"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"a\.jsonl, line 2: a row must be a JSON object, not a list"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, line 1: the text is not UTF-8"),
        ("a.json", '[{"text": "x"},\n{"text"}]', r"a\.json, line 2: broken JSON: .*, at character 8"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, r"a\.jsonl, line 1: broken JSON: nested too deeply"),
        ("a.json", "[" * 100_000, r"a\.json: broken JSON: nested too deeply"),
        ("a.json", '[{"text": "x"}, 5]', r"a\.json\[1\]: a row must be a JSON object, not a number"),
        ("a.json", b'["\xff"]', r"a\.json: the text is not UTF-8, at byte 2"),
        ("a.csv", 'a,b\n"x\ny",z\nx\n', r"a\.csv, line 4: 1 fields, but the header has 2"),
        ("a.csv", 'a,b\n"x"y,z\n', r"a\.csv, line 2: broken CSV"),
        ("a.csv", b"a,b\n\xff,z\n", r"a\.csv, line 2: the text is not UTF-8"),
        ("a.csv", "text,b,text\nx,y,z\n", r"a\.csv, line 1: column 'text' is there 2 times"),
        ("a.csv", '"text\nx\n', r"a\.csv, line 1: broken CSV: unexpected end of data"),
        ("a.parquet", "no parquet", r"a\.parquet: broken Parquet: "),
        ("a.txt", "hello", r"a\.txt: unknown kind of file '\.txt'; known are \.jsonl, \.json, \.csv, \.parquet"),
    ],
)
def test_a_bad_file_is_one_line_that_says_where(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        load_rows(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=rf"no such file; did you mean {tmp_path}/train\.jsonl\?"):
        load_rows(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"zzz\.csv: no such file$"):
        load_rows(tmp_path / "zzz.csv")
    with pytest.raises(DataError, match=rf"the folder {tmp_path}/nowhere does not exist"):
        load_rows(tmp_path / "nowhere" / "train.jsonl")


def test_a_path_into_a_folder_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "arithmetic").mkdir(parents=True)
    with pytest.raises(DataError, match=r"^data/aritmetic: no such file; did you mean data/arithmetic\?$"):
        load_rows("data/aritmetic")


def test_an_unreachable_hub_id_is_one_line(monkeypatch):
    def fail(source, split):
        raise ConnectionError("could not reach the hub\nlong\nstory")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"^a/b \(train\) is no file here, and as a hub id: could not reach the hub$"):
        load_rows("a/b")


@pytest.mark.parametrize("source", [{"text": ["x"]}, 5, iter(ROWS)])
def test_other_objects_are_refused(source):
    with pytest.raises(DataError, match=f"got {type(source).__name__}"):
        load_rows(source)
    with pytest.raises(DataError, match="rows: no rows"):
        load_rows([])


def test_several_splits_are_named():
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS))
    with pytest.raises(DataError, match=r"^DatasetDict holds the splits 'train', 'test'; give one of them$"):
        load_rows(splits)


def test_unnamed_csv_columns_may_repeat(tmp_path):
    assert [row["text"] for row in load_rows(write(tmp_path / "a.csv", "text,,\none,,\n"))] == ["one"]


def test_skipping_counts_and_lists(tmp_path, caplog):
    lines = ['{"text": "good"}', "{broken", "7", '{"text": "also good"}'] + ["x"] * 10
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    with caplog.at_level(logging.WARNING, "posttrain"):
        rows = load_rows(path, skip_bad_rows=True)
    assert [rows.where(i) for i in range(len(rows))] == [f"{path}, line 1", f"{path}, line 4"]
    (message,) = caplog.messages
    assert f"{path}: skipped 12 bad rows, kept 2:" in message
    assert f"\n  {path}, line 2: broken JSON" in message
    assert f"\n  {path}, line 3: a row must be a JSON object, not a number" in message
    assert message.endswith("and 2 more")
    with pytest.raises(DataError, match=r"all 1 rows are bad; the first: .*line 1: broken JSON"):
        load_rows(write(tmp_path / "b.jsonl", "{broken"), skip_bad_rows=True)
    with pytest.raises(DataError, match="line 2: broken JSON"):
        load_rows(path)


def test_importing_data_imports_no_heavy_library():
    code = "import sys, posttrain.data; print([m for m in ('datasets', 'transformers', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
