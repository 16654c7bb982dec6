"""The curves of a run as a picture."""

from pathlib import Path
from typing import Any

_PANELS = (  # the first four that a run has
    *("loss", "reward", "rewards/accuracies", "mean_token_accuracy", "completions/mean_length"),
    *("entropy", "grad_norm", "learning_rate"),
)


def plot_metrics(history: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss and three more curves over steps, with evaluation where there is one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [name for name in _PANELS if any(name in record for record in history)]
    for axes, name in zip(figure.subplots(2, 2).flat, panels, strict=False):
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
