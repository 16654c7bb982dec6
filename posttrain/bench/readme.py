"""Tables of a document in Markdown, made of recorded results: what lies between these two marks,

    <!-- bench:NAME DEVICE -->
    <!-- /bench -->

is the table NAME of the results in the folder DEVICE. `overview` has the newest figures of the suite of
`posttrain bench` that ran last, scaling aside; the others are of comparisons of `make bench`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.bench.measure import OURS
from posttrain.bench.report import SCALING_SUITE, overview
from posttrain.bench.results import ResultError, Run, date, merged, read

_MARKED = re.compile(
    r"^(<!-- bench:(\S+) (\S+) -->\n)((?:(?!<!-- bench:).)*?)^(<!-- /bench -->)", re.DOTALL | re.MULTILINE
)
_MARK = re.compile(r"^<!-- bench\b.*", re.MULTILINE)
Rows = list[list[str]]


class Results:
    """The comparisons in a device's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def content(self, name: str) -> dict[str, Any]:
        """One of them. Raises `ResultError` if there is none of this name."""
        path = self.folder / f"{name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ResultError(f"{path}: {error}") from error

    def has(self, name: str) -> bool:
        """Whether there is a comparison of this name."""
        return (self.folder / f"{name}.json").exists()

    def memory(self, name: str) -> dict[str, Any]:
        """The peaks beside a comparison of trainers ("sft-memory-packing" beside "sft-packing"); {} without them."""
        trainer, *rest = name.split("-", 1)
        beside = "-".join([trainer, "memory", *rest])
        return self.content(beside) if self.has(beside) else {}

    def speed(self, name: str, column: str = OURS, digits: int = 2) -> str:
        """Speed against the baseline, with its percentiles."""
        spread = self.content(name)["speedup"][column]
        return _spread(spread["median"], spread["p20"], spread["p80"], digits)

    def times(self, name: str, column: str) -> str:
        """Time in times of the baseline's."""
        spread = self.content(name)["speedup"][column]
        return _spread(1 / spread["median"], 1 / spread["p80"], 1 / spread["p20"], 2)


def _spread(median: float, low: float, high: float, digits: int) -> str:
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _against_trl(values: Mapping[str, float], who: str = OURS) -> str:
    return f"{values[who]:.0f} against {values['trl']:.0f}"


def _milliseconds(content: Mapping[str, Any], who: str = OURS) -> str:
    """Of a step, against TRL's."""
    return _against_trl({name: 1e3 * spread["median"] for name, spread in content["seconds"].items()}, who)


def _rows(head: Sequence[str], labels: Mapping[Any, str], cells: Callable[[Any], Sequence[str]]) -> Rows:
    """A row for each name: its label, and the cells that are made of the name."""
    return [["", *head], *([label, *cells(name)] for name, label in labels.items())]


def _logprob(results: Results) -> Rows:
    measured = results.content("logprob-forward")["speedup"]
    labels = {  # by column; the last ones are what columns were called
        OURS: "**posttrain**",
        "posttrain cached": "posttrain, `memory_budget` of 2 GB",
        "plain": "log_softmax and gather",
        "torch whole": "`torch.nn.functional.linear_cross_entropy`",
        "torch lce": "`torch.nn.functional.linear_cross_entropy`",
        "torch chunked": "the same, chunked",
        "torch lce chunked": "the same, chunked",
        "trl": "TRL",
        "cce": "cut-cross-entropy, torch path",
        "cce torch": "cut-cross-entropy, torch path",
    }
    modes = ("forward", "frozen", "trainable")

    def cells(column: str) -> list[str]:
        peaks = (results.content(f"logprob-memory-{mode}")["extra_megabytes"][column] for mode in modes)
        times = [results.times(f"logprob-{mode}", column) for mode in modes]
        return [*times, ", ".join(f"{peak:.0f}" for peak in peaks)]

    head = ["forward", "frozen head, forward and backward", "trainable head", "MB"]
    return _rows(head, {column: label for column, label in labels.items() if column in measured}, cells)


def _attention(results: Results) -> Rows:
    theory = results.content("attention-shared-forward")["theory"]
    shared = f"8 completions of 64 share a prompt of 1024, against copies of it; {theory:.2f} in theory"
    labels = {
        ("dense", OURS): "2048 tokens, against SDPA",
        ("documents", OURS): "32 documents of 27 to 927 tokens, against SDPA on the padded batch",
        ("documents", "SDPA, one by one"): "the same, SDPA one by one",
        ("shared", OURS): shared,
        ("shared", "prefix-grouper over SDPA"): "the same, prefix-grouper over SDPA",
    }

    def cells(key: tuple[str, str]) -> list[str]:
        name, column = key
        return [results.speed(f"attention-{name}-{kind}", column) for kind in ("forward", "forward+backward")]

    return _rows(["forward", "forward and backward"], labels, cells)


def _elementwise(results: Results) -> Rows:
    labels = {
        "rms_norm": "rms_norm [4096, 1024]",
        "rms_norm_residual": "rms_norm with residual",
        "rope": "rope, 2 x 16 heads, [2048, 64]",
        "swiglu": "swiglu [4096, 1024]",
        "geglu": "geglu [4096, 1024]",
    }
    columns = (OURS, "torch.compile", "copying as many bytes")
    return _rows(columns, labels, lambda name: [results.speed(name, column, 1) for column in columns])


def _sft(results: Results) -> Rows:
    labels = {
        "sft": "without TRL's packing",
        "sft-packing": "with packing",
        "sft-shared-prompts": "shared prompts, without TRL's packing",
    }

    def cells(name: str) -> list[str]:
        content = results.content(name)
        rates = " against ".join(_thousands(content[f"{who} tokens/s"]) for who in (OURS, "trl"))
        memory = results.memory(name)
        peaks = [_against_trl(memory[kind]) if memory else "" for kind in ("megabytes", "process_megabytes")]
        return [results.speed(name), rates, *peaks]

    return _rows(["speed against TRL", "tokens/s", "training, MB", "process, MB"], labels, cells)


def _thousands(value: float) -> str:
    """Three digits of a number."""
    return f"{float(f'{value:.3g}'):,.0f}"


def _steps(results: Results) -> Rows:
    labels = {
        "dpo": "DPO, 8 pairs of 256 + 2 x 64 tokens",
        "grpo-short-prompts": "GRPO, 4 prompts of 12 x 8 completions of 64",
        "grpo-long-prompts": "GRPO, 4 prompts of 256 x 8 completions of 32",
    }

    def cells(name: str) -> list[str]:
        content = results.content(name)
        floors = ("posttrain against the floor", "posttrain, times the GEMM floor")  # the latter DPO's until now
        floor = next(content[key] for key in floors if key in content)
        return [
            results.speed(name),
            _milliseconds(content),
            f"{floor:.1f}",
            _against_trl(results.memory(name)["megabytes"]),
        ]

    return _rows(["speed against TRL", "ms a step", "times the floor", "memory beyond the trainer, MB"], labels, cells)


def _rollout(results: Results) -> Rows:
    labels = {
        "llama-batch": "Llama 7M, 32 x 64 tokens",
        "llama-shared": "Llama 7M, prompts of 256 with 8 completions each",
        "llama-mixed": "Llama 7M, 8 to 256 new tokens",
        "demo-batch": "the demo's model, 32 x 64 tokens",
        "demo-shared": "the demo's model, shared prompts",
        "demo-mixed": "the demo's model, mixed lengths",
    }
    rate, batching = "posttrain tokens/s", "continuous batching tokens/s"
    for name in labels:
        content = results.content(f"rollout-{name}")
        if batching in content:
            labels[name] += f" ({content[rate] / content[batching]:.1f} times continuous batching's speed)"

    def cells(name: str) -> list[str]:
        content = results.content(f"rollout-{name}")
        floor = f"{content['posttrain time over that of its GEMMs']:.1f}"
        return [results.speed(f"rollout-{name}"), _thousands(content[rate]), floor]

    return _rows(["against `generate`", "tokens/s", "times its GEMMs"], labels, cells)


def _lora(results: Results) -> Rows:
    labels = {
        "lora_linear-forward": "forward, speed against the frozen layer",
        "lora_linear": "forward and backward, against PEFT, memory kept by the process",
        "lora_linear-system-memory": "the same, memory from the system",
        "lora_mlp": "gated MLP of three such layers, forward and backward, against PEFT",
    }
    columns = (OURS, "PEFT", "frozen layer alone")

    def cells(name: str) -> list[str]:
        content = results.content(name)
        shown = {column: results.speed(name, column) for column in columns if column in content["speedup"]}
        return [{**shown, content["baseline"]: "1"}.get(column, "") for column in columns]

    def kept(key_heads: int) -> list[str]:
        sizes = results.content(f"lora-activations-{key_heads}")["kept_bytes"]
        return [*(f"{sizes[column] / 2**20:.0f}" for column in (OURS, "PEFT")), ""]

    layers = {n: f"MiB that a decoder layer with {n} key heads keeps for its backward" for n in (4, 16)}
    return [*_rows(columns, labels, cells), *_rows(columns, layers, kept)[1:]]


def _nf4(results: Results) -> Rows:
    def cells(name: str) -> list[str]:
        content = results.content(name)
        theirs = results.speed(name, "bitsandbytes", 1) if "bitsandbytes" in content["speedup"] else ""
        return [f"{1e3 * content['seconds'][OURS]['median']:.2f}", results.speed(name, digits=1), theirs]

    head, *rows = _rows(
        ["ms", "speed against dequantising and multiplying", "bitsandbytes"],
        {f"nf4_linear-{count}": str(count) for count in (1, 4, 8, 16)},
        cells,
    )
    return [["rows of x", *head[1:]], *rows]


def _drop_in(results: Results) -> Rows:
    """A script that wasn't measured has no row, and one whose memory wasn't has none there."""
    labels = {
        "sft": "SFT",
        "sft-packing": "SFT with packing",
        "dpo": "DPO, 8 pairs of 256 + 2 x 64 tokens",
        "grpo-short-prompts": "GRPO, 4 prompts of 12 x 8 completions of 64",
        "grpo-long-prompts": "GRPO, 4 prompts of 256 x 8 completions of 32",
    }

    def cells(script: str) -> list[str]:
        name, memory = f"drop-in-{script}", f"drop-in-{script}-memory"
        peaks = _against_trl(results.content(memory)["megabytes"], "enabled") if results.has(memory) else ""
        return [results.speed(name, "enabled"), _milliseconds(results.content(name), "enabled"), peaks]

    measured = {name: label for name, label in labels.items() if results.has(f"drop-in-{name}")}
    return _rows(["speed against the script without", "ms a step", "memory beyond the trainer, MB"], measured, cells)


def _overview(results: Results) -> Rows:
    """No rows as long as there is no run."""
    if not results.folder.is_dir():
        raise ResultError(f"{results.folder}: no such folder")
    every = [read(path) for path in results.folder.glob("*.json")]
    runs = sorted((run for run in every if run.machine.get("suite", SCALING_SUITE) != SCALING_SUITE), key=date)
    empty = Run(results.folder, {}, {}, {})
    last = [run for run in runs if run.machine["suite"] == runs[-1].machine["suite"]]
    head, rows = overview(merged(last) if last else empty)
    return [head, *rows]


TABLES: dict[str, Callable[[Results], Rows]] = {
    "overview": _overview,
    "logprob": _logprob,
    "attention": _attention,
    "elementwise": _elementwise,
    "sft": _sft,
    "steps": _steps,
    "rollout": _rollout,
    "lora": _lora,
    "nf4": _nf4,
    "drop-in": _drop_in,
}


def rewrite(document: Path, folder: Path) -> int:
    """Fill the marks of `document` from the results in `folder`; returns how many tables changed."""
    try:
        before = document.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultError(f"{document}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ResultError(f"{document}: not text in UTF-8: {error}") from error
    try:
        after = filled(before, folder)
    except ResultError as error:
        raise ResultError(f"{document}: {error}") from error
    if before != after:
        document.write_text(after, encoding="utf-8")
    return sum(a != b for a, b in zip(_MARKED.findall(before), _MARKED.findall(after), strict=True))


def filled(text: str, folder: Path) -> str:
    """`text` with its tables made anew. Raises `ResultError` for a table or result that doesn't exist, or a mark
    that isn't one of a pair."""
    pairs = {match.start() for match in _MARKED.finditer(text)}
    for mark in _MARK.finditer(text):
        if mark.start() not in pairs:
            line = text.count("\n", 0, mark.start()) + 1
            raise ResultError(
                f"line {line}: {mark[0]}: not `<!-- bench:NAME DEVICE -->` with `<!-- /bench -->` after it"
            )

    def made(match: re.Match[str]) -> str:
        start, name, device, _, end = match.groups()
        if name not in TABLES:
            raise ResultError(f"bench:{name}: no such table; there are {', '.join(TABLES)}")
        try:
            return start + markdown(TABLES[name](Results(folder / device))) + end
        except KeyError as error:
            raise ResultError(f"bench:{name}: the results in {folder / device} lack {error}") from error

    return _MARKED.sub(made, text)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the head."""
    lines = ["| " + "".join(f"{cell} | ".lstrip() for cell in row).rstrip() for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines) + "\n"
