"""The curves of a run as a picture."""

from pathlib import Path
from typing import Any

_PANELS = ("loss", "mean_token_accuracy", "entropy", "grad_norm")


def plot_metrics(history: list[dict[str, Any]], path: Path) -> None:
    """Draw loss, token accuracy, entropy and gradient norm over steps, with evaluation where there is one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for key, label, style in ((name, "train", "-"), (f"eval_{name}", "eval", "o--")):
            points = [(record["step"], record[key]) for record in history if key in record]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=3)
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
    figure.savefig(path, dpi=100)
