"""`posttrain bench compare`: what is beyond the noise, and one line for what can't be compared."""

import json
from pathlib import Path

import pytest

from posttrain.bench.compare import compare
from posttrain.bench.record import runs_of
from posttrain.bench.results import ResultError, read
from posttrain.cli import main

_COMMITTED = Path(__file__).parents[2] / "bench" / "results"


def write(
    path: Path,
    speeds,
    seconds=(0.9, 1.0, 1.1),
    peak=10 << 20,
    device="A",
    cuda=None,
    left_out=(),
    op="rope",
    not_run=(),
    suite="quick",
) -> Path:
    """A run of an op with one case for each of `speeds`, (p20, median, p80) by title."""
    benchmarks = []
    for case, speed in speeds.items():
        facts = {"op": op, "case": case, "pass": "forward", "column": "posttrain", "error": 0.0, "peak_bytes": peak}
        for name, (p20, median, p80) in (("seconds", seconds), ("speed", speed)):
            facts[name] = {"p20": p20, "median": median, "p80": p80}
        benchmarks.append({"extra_info": facts})
    machine = {"device": device, "cuda": cuda, "suite": suite, "left_out": left_out, "not_run": not_run}
    path.write_text(json.dumps({"machine_info": machine, "benchmarks": benchmarks}))
    return path


def both(tmp_path, before, after, **of_after):
    return str(write(tmp_path / "a.json", before)), str(write(tmp_path / "b.json", after, **of_after))


def test_slower_beyond_the_noise_is_named_and_exits_1(tmp_path, capsys):
    before = {"one": (2.9, 3.0, 3.1), "two": (2.9, 3.0, 3.1), "three": (2.0, 3.0, 4.0), "four": (2.9, 3.0, 3.1)}
    after = {"one": (1.9, 2.0, 2.1), "two": (2.7, 2.8, 2.85), "three": (1.9, 2.0, 2.1), "four": (4.9, 5.0, 5.1)}
    assert main(["bench", "compare", *both(tmp_path, before, after)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "worse: rope one forward posttrain: 3.00 to 2.00 times plain PyTorch's speed (0.67 times as good)",
        "better: rope four forward posttrain: 3.00 to 5.00 times plain PyTorch's speed (1.67 times as good)",
        "1 worse, 1 better, 2 as before",
    ]


def test_the_same_twice_exits_0(tmp_path, capsys):
    before = {"one": (2.9, 3.0, 3.1)}
    assert main(["bench", "compare", *both(tmp_path, before, before)]) == 0
    assert capsys.readouterr().out == "0 worse, 0 better, 1 as before\n"


def test_more_memory_is_worse(tmp_path):
    before, after = both(tmp_path, {"one": (1, 1, 1)}, {"one": (1, 1, 1)}, peak=20 << 20)
    assert [change.what for change in compare(read(before), read(after)).worse] == ["10.0 to 20.0 MB"]


def test_memory_that_was_none_is_worse(tmp_path):
    paths = [write(tmp_path / f"{peak}.json", {"one": (1, 1, 1)}, peak=peak) for peak in (0, 20 << 20)]
    runs = [read(path) for path in paths]
    (change,) = compare(*runs).worse
    assert change.what == "0.0 to 20.0 MB" and change.factor == 1 / (20 << 20)
    assert [change.what for change in compare(*reversed(runs)).better] == ["20.0 to 0.0 MB"]


def test_on_a_gpu_seconds_count(tmp_path):
    runs = [
        read(write(tmp_path / f"{name}.json", {"one": (2.9, 3.0, 3.1)}, seconds, cuda="13.0"))
        for name, seconds in (("a", (0.99, 1.0, 1.01)), ("b", (1.08, 1.1, 1.12)))
    ]
    (change,) = compare(*runs).worse
    assert change.what == "1000.000 to 1100.000 ms"
    assert not compare(runs[0], runs[0]).worse


def test_cases_that_are_gone_are_named(tmp_path):
    before, after = both(tmp_path, {"one": (1, 1, 1), "two": (1, 1, 1)}, {"one": (1, 1, 1)})
    assert [key.case for key in compare(read(before), read(after)).lost] == ["two"]


def test_a_case_that_is_wrong_now_is_worse(tmp_path, capsys):
    wrong, full = "posttrain is wrong: an error of 1, where 0.1 are allowed", "needs 9.0 GiB, and 3.0 GiB are free"
    speeds = {name: (1, 1, 1) for name in ("one", "two", "three")}
    paths = both(tmp_path, speeds, {"one": (1, 1, 1)}, left_out=[f"rope three: {full}", f"rope two: {wrong}"])
    assert main(["bench", "compare", *paths]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"worse: rope two has no figure: {wrong}",
        f"gone: rope three forward posttrain: {full}",
        "1 worse, 0 better, 1 as before",
    ]
    paths = both(tmp_path, {"two": (1, 1, 1)}, {}, left_out=[f"rope two: {wrong}"])
    assert main(["bench", "compare", *paths]) == 1


def test_ops_that_were_not_run_are_named(tmp_path, capsys):
    before, after = both(tmp_path, {"one": (1, 1, 1), "two": (1, 1, 1)}, {"one": (1, 1, 1)})
    Path(before).write_text("swiglu".join(Path(before).read_text().rsplit("rope", 1)))
    assert main(["bench", "compare", before, after]) == 0
    assert capsys.readouterr().out.splitlines() == ["not run: swiglu", "0 worse, 0 better, 1 as before"]


def test_of_a_folder_the_suite_that_ran_last_is_read(tmp_path):
    for name, speed in (("2026-01-02T03-04-05-abc-quick", 1.0), ("2026-02-01T00-00-00-abc-quick", 2.0), ("rope", 9.0)):
        write(tmp_path / f"{name}.json", {"one": (speed, speed, speed)})
    write(tmp_path / "2026-03-01T00-00-00-abc-full.json", {"one": (3.0, 3.0, 3.0)})
    assert [figure.speed.median for figure in read(tmp_path).figures.values()] == [3.0]
    quick = ["2026-01-02T03-04-05-abc-quick.json", "2026-02-01T00-00-00-abc-quick.json"]
    assert [path.name for path in runs_of(tmp_path.glob("*"), "quick")] == quick
    assert [path.name for path in runs_of(tmp_path.glob("*"))] == ["2026-03-01T00-00-00-abc-full.json"]


def test_runs_op_by_op_are_one_result(tmp_path, capsys):
    before, after = tmp_path / "before", tmp_path / "after"
    for folder, speed in ((before, 3.0), (after, 2.0)):
        folder.mkdir()
        for day, op in enumerate(("rope", "swiglu", "geglu"), 1):
            write(folder / f"2026-01-0{day}-abc-full.json", {"one": (speed,) * 3}, op=op, left_out=[f"{op}: quack no"])
    write(before / "2026-01-09-abc-full.json", {"two": (3.0, 3.0, 3.0)}, op="swiglu")
    found = read(before)
    assert {key[:2] for key in found.figures} == {("rope", "one"), ("swiglu", "two"), ("geglu", "one")}
    assert found.machine["left_out"] == ["geglu: quack no", "rope: quack no", "swiglu: quack no"]
    assert main(["bench", "compare", str(before), str(after)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        *([verdict, op] for verdict, op in (("worse:", "rope"), ("worse:", "geglu"), ("gone:", "swiglu"))),
        ["2", "worse,"],
    ]


def test_what_an_interrupted_run_did_not_get_to_stays(tmp_path):
    old, new = {name: (1.0, 1.0, 1.0) for name in ("one", "two", "three")}, {"one": (2.0, 2.0, 2.0)}
    write(tmp_path / "2026-01-01-abc-quick.json", old)
    write(tmp_path / "2026-01-02-abc-quick.json", new, not_run=["rope three"])
    assert {key.case: figure.speed.median for key, figure in read(tmp_path).figures.items()} == {"one": 2, "three": 1}
    lost = compare(*(read(path) for path in sorted(tmp_path.glob("*")))).lost
    assert {key.case: why for key, why in lost.items()} == {"two": None, "three": "not run"}


def test_a_run_with_only_reasons_says_what_became_of_figures(tmp_path, capsys):
    full = "needs 9.0 GiB, and 3.0 GiB are free"
    assert main(["bench", "compare", *both(tmp_path, {"one": (1, 1, 1)}, {}, left_out=[f"rope one: {full}"])]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"gone: rope one forward posttrain: {full}",
        "0 worse, 0 better, 0 as before",
    ]


def test_older_reasons_count_for_what_the_newest_run_did_not_get_to(tmp_path):
    full = "rope three: needs 9.0 GiB, and 3.0 GiB are free"
    speeds = {"one": (1.0, 1.0, 1.0)}
    write(tmp_path / "2026-01-01-abc-quick.json", speeds, left_out=[full, "rope four: no", "rope: quack is old"])
    write(tmp_path / "2026-01-02-abc-quick.json", speeds, not_run=["rope two", "rope three"])
    write(tmp_path / "2026-01-03-abc-quick.json", speeds, op="swiglu", not_run=["swiglu two"])
    machine = read(tmp_path).machine
    assert (machine["left_out"], machine["not_run"]) == ([full, "rope: quack is old"], ["rope two", "swiglu two"])
    write(tmp_path / "2026-01-04-abc-quick.json", speeds | {"three": (1.0, 1.0, 1.0)}, left_out=["rope: Liger is new"])
    machine = read(tmp_path).machine
    assert (machine["left_out"], machine["not_run"]) == (["rope: Liger is new"], ["swiglu two"])


def test_a_case_that_fails_in_the_newest_run_has_no_older_figures(tmp_path):
    wrong = "rope two: posttrain is wrong: an error of 1, where 0.1 are allowed"
    write(tmp_path / "2026-01-01-abc-quick.json", {"one": (1.0, 1.0, 1.0), "two": (1.0, 1.0, 1.0)})
    write(tmp_path / "2026-01-02-abc-quick.json", {"one": (1.0, 1.0, 1.0)}, left_out=[wrong])
    found = read(tmp_path)
    assert ([key.case for key in found.figures], found.machine["left_out"]) == (["one"], [wrong])


def test_committed_results_are_readable():
    files = sorted(_COMMITTED.glob("*/*.json"))
    assert files
    for path in files:
        assert read(path).device


def test_what_cannot_be_compared_is_one_line(tmp_path, capsys):
    good, other = both(tmp_path, {"one": (1, 1, 1)}, {"one": (1, 1, 1)}, device="B")
    broken, strange, empty = tmp_path / "broken.json", tmp_path / "strange.json", tmp_path / "empty"
    broken.write_text('{"machine_info": ')
    strange.write_text("[]")
    empty.mkdir()
    apart = write(tmp_path / "apart.json", {"one": (1, 1, 1)}, op="swiglu")
    full = write(tmp_path / "full.json", {"two": (1, 1, 1)}, suite="full")
    for names, line in (
        ((good, other), f"{good} is of A, {other} of B: not comparable"),
        ((good, str(apart)), f"{good} and {apart} have no figure in common"),
        ((good, str(full)), f"{good} is of the suite quick, {full} of full: no figure in common"),
        ((good, str(broken)), f"{broken}: not readable as JSON: "),
        ((good, str(strange)), f"{strange}: not a result of posttrain bench: "),
        ((good, str(empty)), f"{empty}: no results of posttrain bench in this folder"),
        ((good, str(tmp_path / "none")), f"{tmp_path / 'none'}: no such file or folder"),
        ((good,), "posttrain bench compare takes two files or folders, got 1"),
    ):
        assert main(["bench", "compare", *names]) == 2
        out, error = capsys.readouterr()
        assert out == "" and error.startswith(f"posttrain: error: {line}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ('"median": 1,', '"median": null,', "'median' is null"),
        ('"left_out": []', '"left_out": null', "'left_out' is null"),
        ('"not_run": []', '"not_run": [1]', "'not_run' is [1]"),
        ('"peak_bytes": 10485760', '"peak_bytes": "10 MB"', '"10 MB" is not a number'),
    ],
)
def test_a_file_with_a_wrong_value_is_one_line(tmp_path, capsys, old, new, line):
    before, after = both(tmp_path, {"one": (1, 1, 1)}, {"one": (1, 1, 1)})
    Path(after).write_text(Path(after).read_text().replace(old, new))
    assert main(["bench", "compare", before, after]) == 2
    assert capsys.readouterr().err == f"posttrain: error: {after}: not a result of posttrain bench: TypeError {line}\n"


def test_errors_of_reading_are_of_one_kind(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ResultError):
        read(tmp_path / "a.json")
