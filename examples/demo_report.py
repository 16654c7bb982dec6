"""report.html of a demo run: scores and sample answers after each stage, and the curves of each stage's training."""

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.bench.page import Number, charts, page, row, table
from posttrain.bench.svg import Axis, Chart, Series
from posttrain.train.metrics import read


class Answer(NamedTuple):
    """One held-out problem, what the model answered, and its mark (1 right, 0 wrong)."""

    problem: str
    text: str
    mark: float


# Of each metric that a stage may have: the title of its panel.
CURVES = {
    "loss": "loss",
    "mean_token_accuracy": "token accuracy",
    "rewards/accuracies": "preferred answer more likely",
    "rewards/margins": "reward margin",
    "reward": "reward",
    "completions/mean_length": "length of completions, tokens",
    "entropy": "entropy, nats",
    "frac_reward_zero_std": "groups without a difference",
}


def write_report(output_dir: Path, scores: dict[str, float], answers: dict[str, list[Answer]]) -> Path:
    """Write `output_dir/report.html` from the scores and sample answers of each stage; its metrics are in a folder of
    the stage's name. Returns its path."""
    rows = [row([stage, Number(f"{score:.1%}")]) for stage, score in scores.items()]
    stages = "".join(_stage(stage, output_dir / stage, samples) for stage, samples in answers.items())
    intro = "<p>Share of held-out problems whose answer is right, decoded greedily.</p>"
    path = output_dir / "report.html"
    body = intro + table(["after", Number("right")], rows) + stages
    path.write_text(page("SFT, DPO, GRPO on arithmetic", body), encoding="utf-8")
    return path


def _stage(stage: str, folder: Path, samples: list[Answer]) -> str:
    rows = "".join(
        f"<tr><td>{escape(each.problem)}<td><pre>{escape(each.text)}</pre>"
        f"<td class={'right' if each.mark else 'wrong'}>{'right' if each.mark else 'wrong'}"
        for each in samples
    )
    answers = f"<table><tr><th>problem<th>answer<th>{rows}</table>"
    return f"<h2>{escape(stage)}</h2>{charts(_curves(read(folder)))}{answers}"


def _curves(history: list[dict[str, Any]]) -> Iterator[str]:
    """A plot of each metric that occurs."""
    for name, title in CURVES.items():
        points = [(record["step"], record[name]) for record in history if name in record]
        if points:
            yield Chart(title, Axis("step"), Axis(""), [Series("", points, dots=False)], 350, 210).html()
