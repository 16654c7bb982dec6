"""Metrics: what is averaged between two log lines, and where the lines go."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.data.values import first_line
from posttrain.train.config import ConfigError

FILE = "metrics.jsonl"


class Window:
    """Mean over the optimizer steps since the last log line, kept on the device until it is asked for.

    Within a step the shares of its micro-batches are added up; of a name that ends in `/max` the largest counts. A
    metric that some steps don't have is averaged over the others.
    """

    def __init__(self) -> None:
        self._step: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._steps: Counter[str] = Counter()

    def add(self, shares: Mapping[str, Tensor]) -> None:
        """Add what one micro-batch contributes to its step's metrics."""
        for name, share in shares.items():
            wide = share.double()
            if name in self._step:
                wide = torch.maximum(self._step[name], wide) if name.endswith("/max") else self._step[name] + wide
            self._step[name] = wide

    def end_step(self) -> None:
        """The micro-batches of a step are done."""
        for name, value in self._step.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._steps[name] += 1
        self._step = {}

    def take(self) -> dict[str, float]:
        """The means; the window starts anew."""
        means = {name: value.item() / self._steps[name] for name, value in self._sums.items()}  # waits for the device
        self._sums, self._steps = {}, Counter()
        return means

    def state(self) -> dict[str, Any]:
        """The sums so far, and of how many steps each is."""
        return {"totals": {name: value.item() for name, value in self._sums.items()}, "steps": dict(self._steps)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in state["totals"].items()}
        steps = state["steps"]
        self._steps = Counter(dict.fromkeys(self._sums, steps) if isinstance(steps, int) else steps)  # int: older ones


class Speed:
    """Time and tokens of the optimizer steps since the last log line, without evaluations and checkpoints."""

    def __init__(self) -> None:
        self._steps, self._seconds, self._tokens = 0, 0.0, 0

    def add(self, seconds: float, tokens: int) -> None:
        """One step took `seconds` for `tokens` tokens."""
        self._steps += 1
        self._seconds += seconds
        self._tokens += tokens

    def take(self) -> dict[str, float]:
        """Mean `step_time` and `tokens_per_second`; counting starts anew."""
        record = {"step_time": self._seconds / self._steps, "tokens_per_second": self._tokens / self._seconds}
        self._steps, self._seconds, self._tokens = 0, 0.0, 0
        return record


def check_reports(report_to: list[str]) -> None:
    """Raise `ConfigError` if a place that metrics go to needs a package that isn't there."""
    if "wandb" in report_to:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"report_to wandb needs the package: pip install wandb ({error})") from error


class MetricsLog:
    """Appends every record to metrics.jsonl and, if asked, to TensorBoard and W&B; keeps them as `history`.

    W&B reads its settings (WANDB_PROJECT, WANDB_MODE, ...) from the environment; a resumed run is a new one there.
    """

    def __init__(self, output_dir: Path, report_to: list[str], resumed_step: int = 0) -> None:
        self._wandb = _start_wandb(output_dir) if "wandb" in report_to else None
        self._path = output_dir / FILE
        self.history = [record for record in read(output_dir) if record["step"] <= resumed_step]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in self.history), encoding="utf-8")
        os.replace(partial, self._path)
        self._board: Any = None
        if "tensorboard" in report_to:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(output_dir / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Append `record`, which must have a `step`."""
        self.history.append(record)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        scalars = {_grouped(name): value for name, value in record.items() if name != "step"}
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(scalars, step=record["step"])

    def close(self) -> None:
        """Flush what is buffered."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(output_dir: Path) -> Any:
    """A run of W&B that keeps its files in `output_dir`."""
    import wandb

    try:
        return wandb.init(dir=output_dir, name=output_dir.name)
    except wandb.Error as error:
        raise ConfigError(f"report_to wandb: {first_line(error)}") from error


def _grouped(name: str) -> str:
    """The name that TensorBoard and W&B show: train/<name> or eval/<name>."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def read(output_dir: Path) -> list[dict[str, Any]]:
    """The records in `output_dir`, oldest first; a last line that was cut off is left out."""
    path = output_dir / FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
