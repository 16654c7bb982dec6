"""What the comparisons of whole trainers share: settings of both, ours, TRL's with a clock, and who is how fast."""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from posttrain.bench.interleave import Comparison
from posttrain.bench.memory import Peaks, peaks

COMMON = {
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": not torch.cuda.is_available(),
    "disable_tqdm": True,
}


def skip_without_trl() -> None:
    """Skip the module; TRL is found, not imported, since that would count as memory of ours."""
    for peer in ("datasets", "trl"):
        if find_spec(peer) is None:
            pytest.skip(f"compares with TRL, and {peer} is not installed", allow_module_level=True)


def posttrain_trainer(kind: str, folder: Any, rows: Sequence[Mapping[str, Any]], *between: Any, **settings: Any) -> Any:
    """Our trainer of a kind ("SFT"), ready to train; `between` are its arguments between the model and the settings."""
    import posttrain

    args = getattr(posttrain, f"{kind}Config")(output_dir=tempfile.mkdtemp(), **COMMON, **settings)
    return getattr(posttrain, f"{kind}Trainer")(folder, *between, args, rows)


def trl_trainer(kind: str, folder: Any, rows: Sequence[Mapping[str, Any]], *reward: Any, **settings: Any) -> Any:
    """TRL's trainer of a kind ("SFT"), ready to train, with the times of its steps in `step_times`."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times[-1] += time.perf_counter()

    never = {"save_strategy": "no", "report_to": "none", "dataloader_pin_memory": False}
    trainer = getattr(trl, f"{kind}Trainer")(
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        *reward,
        args=getattr(trl, f"{kind}Config")(output_dir=tempfile.mkdtemp(), **never, **COMMON, **settings),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Clock()],
    )
    trainer.step_times = times
    return trainer


def history_of(trainer: Any) -> list[dict[str, Any]]:
    """The logged steps of ours or of TRL's."""
    log = trainer.state.log_history if hasattr(trainer, "state") else trainer.log_history
    return [record for record in log if "loss" in record]


def step_times(trainer: Any, skipped: int) -> list[float]:
    """Seconds of each step after the first `skipped`."""
    times = getattr(trainer, "step_times", None)
    return (times or [record["step_time"] for record in history_of(trainer)])[skipped:]


def in_turns(
    systems: Mapping[str, Callable[[], Any]], skipped: int, rounds: int = 3, seconds: Callable[..., float] | None = None
) -> tuple[Comparison, dict]:
    """Trainers, made anew each round, train in turns: (their seconds against "trl", the last round's trainers).

    The seconds are those of a step, the first `skipped` left out, or what `seconds(trainer)` says.
    """
    measured = seconds or (lambda trainer: statistics.median(step_times(trainer, skipped)))
    found: dict[str, list[float]] = {name: [] for name in systems}
    trained = {}
    for _ in range(rounds):
        for name, make in systems.items():
            trained[name] = make()
            trained[name].train()
            found[name].append(measured(trained[name]))
    return Comparison.of("trl", found), trained


def gemm_seconds(products: Mapping[tuple[int, int, int], int]) -> float:
    """Seconds that matrix products take alone, of which there are so many with (rows, in, out); the best of five."""
    operands = {(m, k, n): (torch.randn(m, k), torch.randn(n, k)) for m, k, n in products}

    def once() -> float:
        started = time.perf_counter()
        for shape, times in products.items():
            for _ in range(times):
                torch.nn.functional.linear(*operands[shape])
        return time.perf_counter() - started

    return min(once() for _ in range(5))


def largest_difference(trained: Mapping[str, Any], name: str = "posttrain") -> float:
    """Of the losses of a system's steps from TRL's."""
    ours, theirs = ([float(record["loss"]) for record in history_of(trained[key])] for key in (name, "trl"))
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def memory(module: str, *arguments: Any) -> dict[str, Peaks]:
    """Peaks of training by a module's their_trainer and our_trainer, each after a run of 2 steps."""
    found = {}
    for name, maker in (("trl", "their_trainer"), ("posttrain", "our_trainer")):
        given = ", ".join(map(repr, arguments))
        setup = f"import {module} as b\nb.{maker}({given}, steps=2).train()\ntrainer = b.{maker}({given})"
        found[name] = peaks(setup, "trainer.train()")
    return found
