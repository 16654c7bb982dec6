"""The command `posttrain bench`."""

import argparse
import os
import signal
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from posttrain.train.config import ConfigError

_TAKES = {  # options by first word
    "": ("suite", "peers", "out"),
    "scaling": ("peers", "out"),
    "compare": (),
    "report": ("out", "readme"),
}


def add_command(commands: Any) -> None:
    """Add it to the parsers of `posttrain`."""
    bench = commands.add_parser(
        "bench",
        help="measure the ops and training steps on this machine, compare two results, or show all",
        description="Measure ops and training steps on this machine, forward and backward, over shapes of real models. "
        "`posttrain bench scaling` does so over growing sizes. `posttrain bench compare A B` names what got slower "
        "from file or folder A to B; `posttrain bench report` writes a page about all results.",
        allow_abbrev=False,
    )
    bench.add_argument(
        "words", nargs="*", metavar="OP", help="ops to measure (default: all); or scaling, compare A B, report [DIR]"
    )
    bench.add_argument("--suite", metavar="NAME", help="quick, full or scaling (default: full on a GPU, else quick)")
    bench.add_argument(
        "--peers", nargs="*", metavar="OP", help="also measure other projects' functions, where installed"
    )
    bench.add_argument("--out", metavar="PATH", help="folder of results (default: bench/results); of report, its file")
    bench.add_argument("--readme", metavar="FILE", help="of report: also write the tables between a document's marks")
    bench.set_defaults(run=_bench)
    tune = commands.add_parser(
        "tune",
        help="measure the block sizes of the kernels on this GPU and keep the fastest",
        description="Measure the block sizes of the Triton kernels on this GPU, and keep those that are faster than "
        "the shipped ones, in the user's cache. `posttrain doctor` shows what is used.",
        allow_abbrev=False,
    )
    tune.add_argument("ops", nargs="*", metavar="OP", help="ops to tune (default: all that can be)")
    tune.set_defaults(run=_tune)


def _bench(options: argparse.Namespace) -> int:
    words = [*options.words, *(options.peers or [])]
    kind = words[0] if words and words[0] in _TAKES else ""
    for option in ("suite", "peers", "out", "readme"):
        if getattr(options, option) is not None and option not in _TAKES[kind]:
            takers = [f"posttrain bench {word}".strip() for word, taken in _TAKES.items() if option in taken]
            raise ConfigError(f"--{option} belongs to {' and '.join(takers)}")
    for option in ("out", "readme"):
        if getattr(options, option) == "":
            raise ConfigError(f"--{option} needs a path, and got an empty one")
    if kind == "compare":
        return _compare(words[1:])
    if kind == "report":
        return _report(words[1:], options.out, options.readme)
    return _measure(options, words[1:] if kind else words, bool(kind))


def _measure(options: argparse.Namespace, ops: Sequence[str], scaling: bool) -> int:
    for package, name in (("pytest", "pytest"), ("pytest_benchmark", "pytest-benchmark")):
        if find_spec(package) is None:
            raise ConfigError(f"posttrain bench needs {name}: pip install posttrain[bench]")
    import pytest

    from posttrain.bench.cases import CASES, SCALING
    from posttrain.bench.record import device_folder
    from posttrain.bench.session import Selection, Session
    from posttrain.bench.shapes import SUITES

    suite = "scaling" if scaling else options.suite or Selection.suite
    _check("suite", [suite], SUITES)
    _check("op", ops, SCALING if suite == "scaling" else CASES)
    _make(device_folder(options.out))
    session = Session(Selection(tuple(ops), suite, options.peers is not None, options.out))
    arguments = ["-q", "--no-header", "--tb=short", "--import-mode=importlib", "-p", "no:cacheprovider"]
    arguments += ["--rootdir", str(Path.cwd()), "-c", os.devnull, "--benchmark-quiet", "-W", "ignore"]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # pytest then ends by writing what it has
    try:
        return int(pytest.main([*arguments, str(Path(__file__).with_name("suite.py"))], plugins=[session]))
    finally:
        signal.signal(signal.SIGTERM, before)


def _tune(options: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("posttrain tune needs a CUDA GPU that torch can use, and there is none")
    from posttrain.bench.tune import timed, tunables, tune
    from posttrain.ops.block_sizes import gpu_name, save

    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    found = tunables(10 * major + minor)
    _check("op", options.ops, list(dict.fromkeys(each.op for each in found)))
    chosen = [each for each in found if not options.ops or each.op in options.ops]
    try:
        path = save(gpu_name(device), {})  # before anything is measured: it must be readable and writable
        tune(chosen, timed, print, lambda name, sizes: save(gpu_name(device), {name: sizes}))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print(f"-> {path}")
    return 0


def _compare(names: list[str]) -> int:
    from posttrain.bench.compare import compare
    from posttrain.bench.results import ResultError, read

    if len(names) != 2:
        raise ConfigError(f"posttrain bench compare takes two files or folders, got {len(names)}")
    try:
        changes = compare(*map(read, names))
    except ResultError as error:
        raise ConfigError(str(error)) from error
    print(changes.text())
    return 1 if changes.worse or changes.failed else 0


def _report(folders: list[str], out: str | None, readme: str | None) -> int:
    from posttrain.bench.readme import rewrite
    from posttrain.bench.record import results_folder
    from posttrain.bench.report import write_report
    from posttrain.bench.results import ResultError

    if len(folders) > 1:
        raise ConfigError(f"posttrain bench report takes one folder of results, got {len(folders)}")
    folder = Path(folders[0]) if folders else results_folder()
    path = Path(out) if out else folder / "report.html"
    try:
        if readme:
            changed = rewrite(Path(readme), folder)
            print(f"{readme}: {changed} tables changed")
        found = write_report(folder, path)
    except ResultError as error:
        raise ConfigError(str(error)) from error
    print(f"{len(found)} devices -> {path}")
    return 0


def _make(folder: Path) -> None:
    """Make the folder of results now, and not when all is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"results can't be written to {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"results can't be written to {folder}: no permission")


def _check(kind: str, names: Sequence[str], known: Any) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {kind} {name!r}; there are {', '.join(known)}")
