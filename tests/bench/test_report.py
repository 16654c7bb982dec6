"""The report: one page that needs nothing else, newest figures first, and the README's tables from the same files."""

import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.bench.power import fit
from posttrain.bench.readme import filled, rewrite
from posttrain.bench.report import devices, html
from posttrain.bench.results import ResultError
from posttrain.bench.svg import Axis, Chart, Series, short
from posttrain.cli import main

_ROOT = Path(__file__).parents[2]


def write(
    folder: Path,
    name: str,
    milliseconds: float,
    device="A <GPU>",
    suite="quick",
    op="rope",
    left_out=None,
    sizes=(),
    peers=(),
    gemm=1e12,
    not_run=(),
) -> None:
    """A run with figures of one case, or of one for each size N, by whose square time grows, in all columns."""
    benchmarks = []
    columns = (("posttrain", 1), ("plain PyTorch", 2), *((peer, 1) for peer in peers))
    for (column, factor), size in itertools.product(columns, sizes or [1]):
        seconds = {part: factor * size**2 * milliseconds / 1e3 for part in ("median", "p20", "p80")}
        case = {"case": f"N {size}", "axis": "N", "size": size} if sizes else {"case": "[8, 8]"}
        facts = {"op": op, **case, "pass": "forward", "column": column, "seconds": seconds, "error": 1e-7}
        facts |= {"speed": dict.fromkeys(("median", "p20", "p80"), 2 / factor), "peak_bytes": factor << 20}
        facts |= {"flops": 2e9, "bytes": 1e8, "tflops": 0.5, "gbytes": 25.0, "roofline": 0.4}
        benchmarks.append({"extra_info": facts})
    machine = {"device": device, "suite": suite, "date": name, "commit": "0123456789ab", "load": 0.25}
    reasons = [f"{op}: Liger runs on GPUs only"] if left_out is None else left_out
    machine |= {"roofline": {"copy": 1e11, "gemm": gemm}, "left_out": reasons, "not_run": not_run}
    path = folder / device.replace(" ", "-") / f"{name}-{suite}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine_info": machine, "benchmarks": benchmarks}))


def figures(text: str) -> list[ElementTree.Element]:
    """The plots of a page, as trees: an error if one isn't well-formed."""
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_a_page_needs_nothing_else_and_has_every_device(tmp_path, capsys):
    write(tmp_path, "2026-01-01", 3.0)
    write(tmp_path, "2026-01-02", 4.0, device="B")
    assert main(["bench", "report", str(tmp_path), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert capsys.readouterr().out == f"2 devices -> {tmp_path / 'new' / 'page.html'}\n"
    text = (tmp_path / "new" / "page.html").read_text()
    assert not re.search(r"<script|<link|https?:|src=|url\(|@import", text)
    assert set(re.findall(r'href="([^"]*)"', text)) == {"#device0", "#device1"}
    assert "prefers-color-scheme: dark" in text and "A &lt;GPU&gt;" in text and "<GPU>" not in text
    assert "rope: Liger runs on GPUs only" in text and "commit 012345678;" in text
    assert len(figures(text)) == 8  # of each device roofline, speed, share of the roofline and memory


def test_the_newest_figure_of_a_case_counts(tmp_path):
    write(tmp_path, "2026-01-02", 7.25)
    write(tmp_path, "2026-01-01", 5.75)
    write(tmp_path, "2026-01-01b", 9.25, op="swiglu")
    text = html(devices(tmp_path))
    assert ">7.25<" in text and ">9.25<" in text and ">5.75<" not in text


def test_runs_under_one_heading_are_named_with_what_each_op_last_left_out(tmp_path):
    write(tmp_path, "2026-01-01", 3.0, left_out=["rope: quack is old", "swiglu [8, 8]: no memory"])
    write(tmp_path, "2026-01-02", 3.0, op="swiglu", left_out=["swiglu: Liger is new"])
    text = html(devices(tmp_path))
    assert "newest of 2 runs (before it: 2026-01-01 commit 012345678)" in text
    assert re.findall("<li>(.*?)(?=<li>|</ul>)", text) == ["rope: quack is old", "swiglu: Liger is new"]


def test_columns_that_did_not_take_turns_are_not_beside_each_other(tmp_path):
    write(tmp_path, "2026-01-01", 3.0, peers=["torch.compile", "quack"], left_out=["rope: Liger is old"])
    write(tmp_path, "2026-01-02", 4.0, left_out=[])
    (device,) = devices(tmp_path)
    run = device.merged("quick")
    assert {key.column: figure.seconds.median for key, figure in run.figures.items()} == {
        "posttrain": 0.004,
        "plain PyTorch": 0.008,
    }
    older = "was measured in another run than the newest figures (2026-01-01-quick.json)"
    assert run.machine["left_out"] == ["rope: Liger is old", f"rope: quack {older}", f"rope: torch.compile {older}"]
    write(tmp_path, "2026-01-03", 5.0, peers=["torch.compile"], left_out=["rope: quack is old"])
    (device,) = devices(tmp_path)
    run = device.merged("quick")
    assert {key.column for key in run.figures} == {"posttrain", "plain PyTorch", "torch.compile"}
    assert run.machine["left_out"] == ["rope: quack is old"]


def test_shares_are_of_the_roofline_that_is_drawn(tmp_path):
    write(tmp_path, "2026-01-01", 10.0, gemm=2e12)
    write(tmp_path, "2026-01-02", 4.0, op="swiglu", gemm=1e12)  # 2e9 operations in 4 ms, 0.5e12 per second
    (device,) = devices(tmp_path)
    run = device.merged("quick")
    assert run.machine["roofline"] == {"copy": 1e11, "gemm": 2e12}
    shares = {key.op: facts["roofline"] for key, facts in run.extra.items() if key.column == "posttrain"}
    assert shares == {"rope": 0.4, "swiglu": 0.25}  # of the run with the best rates as recorded
    assert "roofline 2 TFLOP/s, 100 GB/s" in html([device])


def test_cases_that_no_run_got_to_are_named(tmp_path):
    write(tmp_path, "2026-01-01", 3.0, left_out=[], not_run=["rope [9, 9]"])
    write(tmp_path, "2026-01-02", 3.0, op="swiglu", left_out=[])
    assert re.findall("<li>(.*?)(?=<li>|</ul>)", html(devices(tmp_path))) == ["rope [9, 9]: not run"]


def test_costs_over_a_size_have_their_exponent(tmp_path):
    write(tmp_path, "2026-01-01", 1e-6, suite="scaling", sizes=(1024, 2048, 4096))
    text = html(devices(tmp_path))
    time, memory = figures(text)
    assert "posttrain ∝ N^2.00 (±0%)" in text and "posttrain ∝ N^0.00 (±0%)" in text
    assert [t.text for t in time.iter("text")][:3] == ["1k", "2k", "4k"]
    places = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in time.iter("circle")][:3]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y1 < y0
    assert len(list(memory.iter("circle"))) == 6


def test_fit_is_least_squares_of_logarithms():
    power = fit([(size, 3 * size**1.5) for size in (1, 10, 100)])
    assert power is not None
    assert (power.factor, power.exponent, power.residual) == pytest.approx((3, 1.5, 1))
    bent = fit([(1, 1), (math.e, math.e), (math.e**2, 1)])  # 0, 1, 0 over 0, 1, 2: flat at 1/3, off by 1/3, 2/3, 1/3
    assert bent is not None and bent.exponent == pytest.approx(0)
    assert bent.residual == pytest.approx(math.exp(math.sqrt(2) / 3)) and bent.text("N").startswith("N^")
    assert fit([(1, 1), (1, 2)]) is None and fit([(1, 0), (2, 1)]) is None


def test_charts_leave_out_what_an_axis_cannot_have():
    points = [(0.0, 1.0), (1.0, 2.0), (10.0, -1.0), (2.0, math.nan), (3.0, math.inf)]
    logarithmic = Chart("a & b", Axis("x", log=True), Axis("y", log=True), [Series("s", points)]).html()
    linear = Chart("a & b", Axis("x"), Axis("y"), [Series("s", points)]).html()
    assert (logarithmic.count("<circle"), linear.count("<circle")) == (1, 3)
    assert "a &amp; b" in linear and len(figures(linear)) == 1
    assert "nothing measured" in Chart("t", Axis("x", log=True), Axis("y"), [Series("s", points[:1])]).html()


@given(st.floats(1e-6, 1e12), st.floats(1, 1e6), st.booleans())
@settings(max_examples=50, deadline=None)
def test_every_range_has_ticks_inside_it(low, factor, log):
    chart = Chart("t", Axis("x", log), Axis("y", log), [Series("s", [(low, low), (low * factor, low * factor)])])
    (figure,) = figures(chart.html())
    labels = [each for each in figure.iter("text") if each.get("text-anchor") == "middle"][:-2]
    assert 2 <= len(labels) <= 12 and len({each.text for each in labels}) == len(labels)
    assert all(0 <= float(each.get("x")) <= chart.width for each in labels)


@pytest.mark.parametrize(
    ("value", "text"), [(0.002, "0.002"), (1.5, "1.5"), (1000, "1000"), (64000, "64k"), (2.1e6, "2.1M"), (3e9, "3G")]
)
def test_short_numbers(value, text):
    assert short(value) == text


def of_the_index(folder: Path) -> Path:
    """README.md and bench/results as git's index has them, copied to `folder`: not what `make bench` has added or
    changed since. All files of the checkout where there is no git."""
    if shutil.which("git") is None:
        return _ROOT
    git = ["git", "-C", str(_ROOT)]
    names = subprocess.run([*git, "ls-files", "-z", "README.md", "bench/results"], capture_output=True, check=False)
    if not names.stdout:
        return _ROOT
    subprocess.run([*git, "checkout-index", "-z", "--stdin", f"--prefix={folder}/"], input=names.stdout, check=True)
    return folder


def test_the_readme_has_the_tables_of_the_committed_results(tmp_path):
    root = of_the_index(tmp_path)
    text = (root / "README.md").read_text()
    assert text.count("<!-- bench:") >= 6
    assert filled(text, root / "bench" / "results") == text, "posttrain bench report --readme README.md mends it"


def test_tables_are_filled_between_marks(tmp_path, capsys):
    write(tmp_path, "2026-01-02", 7.25, device="A")
    document = tmp_path / "document.md"
    document.write_text("before\n<!-- bench:overview A -->\nold\n<!-- /bench -->\nafter\n")
    assert main(["bench", "report", str(tmp_path), "--readme", str(document)]) == 0
    assert capsys.readouterr().out.startswith(f"{document}: 1 tables changed\n")
    assert document.read_text().splitlines() == [
        "before",
        "<!-- bench:overview A -->",
        "| op | pass | shapes | speed against plain PyTorch | share of the roofline "
        "| plain PyTorch's memory over ours |",
        "|---|---|---|---|---|---|",
        "| rope | forward | 1 | 2.00 | 40% | 2.0 |",
        "<!-- /bench -->",
        "after",
    ]


def test_a_document_that_is_no_text_is_named_before_anything_is_written(tmp_path, capsys):
    write(tmp_path, "2026-01-02", 7.25, device="A")
    document, path = tmp_path / "document.md", tmp_path / "page.html"
    document.write_bytes(b"\xff\n")
    for name, line in ((document, "not text in UTF-8: "), (tmp_path / "none.md", "No such file or directory")):
        assert main(["bench", "report", str(tmp_path), "--out", str(path), "--readme", str(name)]) == 2
        out, error = capsys.readouterr()
        assert out == "" and error.startswith(f"posttrain: error: {name}: {line}") and error.count("\n") == 1
    assert not path.exists()


def test_the_overview_has_no_rows_before_the_first_run(tmp_path):
    write(tmp_path, "2026-01-03", 5.0, device="A", suite="scaling")
    table = filled("<!-- bench:overview A -->\n<!-- /bench -->\n", tmp_path).splitlines()
    assert len(table) == 4 and table[1].startswith("| op | pass |")


def test_the_overview_is_of_the_suite_that_ran_last(tmp_path):
    write(tmp_path, "2026-01-01", 5.0, device="A", suite="full")
    write(tmp_path, "2026-01-02", 5.0, device="A", op="swiglu")
    write(tmp_path, "2026-01-03", 5.0, device="A", suite="scaling", op="geglu")
    table = filled("<!-- bench:overview A -->\n<!-- /bench -->\n", tmp_path)
    assert [line.split()[1] for line in table.splitlines()[3:-1]] == ["swiglu"]


@pytest.mark.parametrize("name", ["nothing A", "sft A", "overview B"])
def test_a_table_that_cannot_be_made_is_an_error(tmp_path, name):
    write(tmp_path, "2026-01-02", 7.25, device="A")
    with pytest.raises(ResultError, match=r"no such table|No such file|B: no such folder"):
        filled(f"<!-- bench:{name} -->\n<!-- /bench -->\n", tmp_path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("<!-- bench:overview -->\n<!-- /bench -->\n", "line 2: <!-- bench:overview -->"),
        ("<!-- bench: overview A -->\n<!-- /bench -->\n", "line 2: <!-- bench: overview A -->"),
        ("<!-- bench:sft A -->\n<!-- bench:overview A -->\n<!-- /bench -->\n", "line 2: <!-- bench:sft A -->"),
        ("<!-- bench:overview A -->\n", "line 2: <!-- bench:overview A -->"),
    ],
)
def test_a_mark_that_is_not_one_of_a_pair_is_an_error(tmp_path, text, line):
    write(tmp_path, "2026-01-02", 7.25, device="A")
    document = tmp_path / "document.md"
    document.write_text(f"before\n{text}")
    with pytest.raises(
        ResultError, match=f"^{re.escape(f'{document}: {line}: not')} .* with `<!-- /bench -->` after it"
    ):
        rewrite(document, tmp_path)
    assert document.read_text() == f"before\n{text}"


def test_the_folder_of_a_device_names_its_parent(tmp_path, capsys):
    write(tmp_path, "2026-01-02", 7.25, device="A")
    assert main(["bench", "report", str(tmp_path / "A")]) == 2
    assert f"those of one device lie in it, so give {tmp_path}\n" in capsys.readouterr().err


def test_scripts_that_were_not_measured_have_no_row(tmp_path):
    spread = dict.fromkeys(("median", "p20", "p80"), 2.0)
    both = {name: {"enabled": spread, "trl": spread} for name in ("seconds", "speedup")}
    (tmp_path / "drop-in-dpo.json").write_text(json.dumps(both))
    (tmp_path / "drop-in-sft.json").write_text(json.dumps(both))
    (tmp_path / "drop-in-sft-memory.json").write_text(json.dumps({"megabytes": {"trl": 30, "enabled": 20}}))
    table = filled(f"<!-- bench:drop-in {tmp_path.name} -->\n<!-- /bench -->\n", tmp_path.parent)
    assert table.splitlines()[3:-1] == [
        "| SFT | 2.00 (2.00 to 2.00) | 2000 against 2000 | 20 against 30 |",
        "| DPO, 8 pairs of 256 + 2 x 64 tokens | 2.00 (2.00 to 2.00) | 2000 against 2000 | |",
    ]


def test_a_comparison_without_its_baseline_is_one_line(tmp_path, capsys):
    path = tmp_path / "A" / "x.json"
    path.parent.mkdir()
    spreads = {"posttrain": dict.fromkeys(("median", "p20", "p80"), 1.0)}
    path.write_text(json.dumps({"device": "A", "seconds": spreads, "speedup": spreads}))
    assert main(["bench", "report", str(tmp_path)]) == 2
    line = f"{path}: not a result of posttrain bench: KeyError 'baseline'"
    assert capsys.readouterr().err == f"posttrain: error: {line}\n"


def test_what_cannot_be_reported_is_one_line(tmp_path, capsys):
    for arguments, line in (
        (["report", str(tmp_path)], f"{tmp_path}: no results of posttrain bench in its folders"),
        (["report", "a", "b"], "posttrain bench report takes one folder of results, got 2"),
    ):
        assert main(["bench", *arguments]) == 2
        assert capsys.readouterr().err == f"posttrain: error: {line}\n"
