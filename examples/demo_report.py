"""report.html of a demo run: scores and sample answers after each stage, and the curves of each stage's training."""

import base64
import io
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

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

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>posttrain demo</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse }} td, th {{ padding: .25rem .75rem; text-align: left; vertical-align: top }}
tr {{ border-bottom: 1px solid #ddd }} pre {{ margin: 0; font-size: 13px }} img {{ max-width: 100% }}
.wrong {{ color: #a00 }} .right {{ color: #070 }}
</style></head><body>
<h1>SFT, DPO, GRPO on arithmetic</h1>
<p>Share of held-out problems whose answer is right, decoded greedily.</p>
{scores}
{stages}
</body></html>
"""


def write_report(output_dir: Path, scores: dict[str, float], answers: dict[str, list[Answer]]) -> Path:
    """Write `output_dir/report.html` from the scores and sample answers of each stage; its metrics are in a folder of
    the stage's name. Returns its path."""
    rows = "".join(f"<tr><td>{escape(stage)}<td>{score:.1%}" for stage, score in scores.items())
    stages = "".join(_stage(stage, output_dir / stage, samples) for stage, samples in answers.items())
    path = output_dir / "report.html"
    table = f"<table><tr><th>after<th>right{rows}</table>"
    path.write_text(_PAGE.format(scores=table, stages=stages), encoding="utf-8")
    return path


def _stage(stage: str, folder: Path, samples: list[Answer]) -> str:
    rows = "".join(
        f"<tr><td>{escape(each.problem)}<td><pre>{escape(each.text)}</pre>"
        f"<td class={'right' if each.mark else 'wrong'}>{'right' if each.mark else 'wrong'}"
        for each in samples
    )
    history = read(folder)
    picture = f'<img alt="curves of {escape(stage)}" src="{_curves(history)}">' if history else ""
    return f"<h2>{escape(stage)}</h2>{picture}<table><tr><th>problem<th>answer<th>{rows}</table>"


def _curves(history: list[dict[str, Any]]) -> str:
    """A panel for each metric that occurs, as the URL of a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in CURVES if any(name in record for record in history)]
    lines = -(-len(names) // 3)
    figure = Figure(figsize=(11, 2.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for i, name in enumerate(names):
        axes = figure.add_subplot(lines, 3, i + 1)
        points = [(record["step"], record[name]) for record in history if name in record]
        axes.plot(*zip(*points, strict=True))
        axes.set_title(CURVES[name], fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
