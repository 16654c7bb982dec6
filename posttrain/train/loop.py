"""Loop: optimizer steps over micro-batches, with metrics, evaluation, checkpoints and resume.

It knows no method: it takes a source of steps and a function that gives the loss of a micro-batch.
"""

import logging
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from posttrain.data.values import first_line
from posttrain.objectives import Loss
from posttrain.train import checkpoint
from posttrain.train.config import ConfigError, TrainConfig, check_writable
from posttrain.train.metrics import MetricsLog, Speed, Window, check_reports
from posttrain.train.optimizer import Optimizer, half_dtype
from posttrain.train.plot import plot_metrics
from posttrain.train.progress import Progress
from posttrain.train.schedule import learning_rate_factor, num_warmup_steps
from posttrain.train.source import Source, Step

LossFunction = Callable[[Any, Any, Step], Loss]
"""(model, micro-batch, the step it belongs to) -> its share of the step's loss."""


class Interrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C, after a checkpoint."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"stopped; checkpoint in {folder}")
        self.folder = folder


class TrainResult(NamedTuple):
    """What a run came to: its last step, the loss of its last log line, and its last checkpoint."""

    global_step: int
    loss: float
    checkpoint: Path


class Loop:
    """One training run of `model` on `source`, in `config.output_dir`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: TrainConfig,
        source: Source,
        loss: LossFunction,
        eval_source: Source | None = None,
    ) -> None:
        check_reports(config.report_to)
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.source = source
        self.loss = loss
        self.eval_source = eval_source
        self.output_dir = Path(config.output_dir)
        self.device = next(model.parameters()).device
        self.history: list[dict[str, Any]] = []
        self.global_step = 0  # steps made, those before a resume among them
        epochs = Fraction(str(config.num_train_epochs))
        self.num_steps = config.max_steps if config.max_steps > 0 else math.ceil(epochs * source.steps_per_epoch)
        self._num_warmup = num_warmup_steps(config.warmup_steps, self.num_steps)
        self._optimizer = Optimizer(model, config, half_dtype(config, self.device))
        self._window = Window()
        self._speed = Speed()
        self._num_tokens = 0
        self._num_packed_tokens = 0

    def run(self, resume: bool | str | os.PathLike[str] | None = None) -> TrainResult:
        """Train to the last step. `resume` is a checkpoint folder, or True for the newest valid one.

        Ctrl-C finishes the running step, saves, and raises `Interrupted`.
        """
        folder = self._checkpoint_to_resume(resume)
        check_writable(self.output_dir)
        if self.config.gradient_checkpointing:
            _recompute_activations(self.model)
        set_seed(self.config.seed)
        first = self.global_step = self._resume(folder) if folder else 0
        if first >= self.num_steps:
            raise ConfigError(f"nothing to do: {folder} is at step {first} of {self.num_steps}")
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if aside := checkpoint.set_aside(self.output_dir, first):
            logging.getLogger("posttrain").warning(
                "going on from step %d; later checkpoints are now in %s", first, aside
            )
        with (
            closing(MetricsLog(self.output_dir, self.config.report_to, first)) as log,
            Progress(self.num_steps, first, bar=not self.config.disable_tqdm) as progress,
            _Interrupt() as interrupt,
        ):
            self.history = log.history
            for step in range(first + 1, self.num_steps + 1):
                norm = self._train_step(step)
                if not math.isfinite(norm):
                    raise ConfigError(
                        f"step {step}: the gradient's norm is {norm}, so the run stops without saving this step; "
                        "lower learning_rate, or look at the data"
                    )
                self.global_step = step
                progress.advance(step)
                self._after_step(step, norm, log, progress)
                stop, last = interrupt.asked, step == self.num_steps
                if stop or last or (self.config.save_steps and step % self.config.save_steps == 0):
                    saved = self._save(step)
                    if stop and not last:
                        raise Interrupted(saved)
        plot_metrics(self.history, self.output_dir / "metrics.png")
        final_loss = next((record["loss"] for record in reversed(self.history) if "loss" in record), math.nan)
        return TrainResult(self.num_steps, final_loss, saved)

    def evaluate(self) -> dict[str, float]:
        """The metrics over the whole evaluation set, as `eval_<name>`."""
        if self.eval_source is None:
            raise ConfigError("there is no evaluation data")
        everything = self.eval_source.everything()
        window = Window()
        with _evaluating(self.model), torch.no_grad():
            for batch in everything.batches:
                window.add(self.loss(self.model, batch.to(self.device), everything).metrics)
        window.add(everything.metrics)
        window.end_step()
        return {f"eval_{name}": value for name, value in window.take().items()}

    def _train_step(self, step: int) -> float:
        """Optimizer step `step`, counted from 1. Returns the gradient's norm."""
        started = time.perf_counter()
        data = self._data(step)
        self.model.train()
        for batch in data.batches:
            loss = self.loss(self.model, batch.to(self.device), data)
            if loss.value.requires_grad:  # else the gradient is known to be 0
                loss.value.backward()
            self._window.add(loss.metrics)
        self._window.add(data.metrics)
        norm = self._optimizer.step(self._learning_rate(step)).item()  # waits for the device, so the time is the work's
        self._window.end_step()
        self._num_tokens += data.num_tokens
        self._num_packed_tokens += data.num_packed_tokens
        self._speed.add(time.perf_counter() - started, data.num_tokens)
        return norm

    def _data(self, step: int) -> Step:
        """The data of step `step`; the work so far is saved if they can't be had (a reward function may fail)."""
        try:
            return self.source.step(step - 1)
        except Exception as error:
            if step == 1:
                raise
            saved = self._save(step - 1)
            if isinstance(error, ConfigError):
                raise ConfigError(f"{error}; the run up to step {step - 1} is in {saved}") from error
            error.add_note(f"the run up to step {step - 1} is in {saved}")
            raise

    def _learning_rate(self, step: int) -> float:
        kind = self.config.lr_scheduler_type
        return self.config.learning_rate * learning_rate_factor(kind, step - 1, self.num_steps, self._num_warmup)

    def _after_step(self, step: int, norm: float, log: MetricsLog, progress: Progress) -> None:
        """Log and evaluate, as far as it is time to."""
        config, last = self.config, step == self.num_steps
        if step % config.logging_steps == 0 or last:
            record = {"step": step, "epoch": float(step / self.source.steps_per_epoch), **self._window.take()}
            record |= {"grad_norm": norm, "learning_rate": self._learning_rate(step)}
            record |= {"num_tokens": self._num_tokens, "num_packed_tokens": self._num_packed_tokens}
            record |= self._speed.take()
            log.write(record)
            progress.report(step, record)
        if self.eval_source is not None and (last or (config.eval_steps and step % config.eval_steps == 0)):
            self._evaluate_into(log, progress, step)

    def _evaluate_into(self, log: MetricsLog, progress: Progress, step: int) -> None:
        record = {"step": step, **self.evaluate()}
        log.write(record)
        progress.report(step, record)

    def _save(self, step: int) -> Path:
        state = {
            "num_steps": self.num_steps,
            "num_tokens": self._num_tokens,
            "num_packed_tokens": self._num_packed_tokens,
            "window": self._window.state(),
            "config": self.config.to_mapping(),
        }
        optimizer, source = self._optimizer.state(), self.source.state(step)
        folder = checkpoint.save(self.output_dir, step, self.model, self.tokenizer, optimizer, state, source)
        if self.config.save_total_limit is not None:
            checkpoint.remove_old(self.output_dir, self.config.save_total_limit)
        return folder

    def _checkpoint_to_resume(self, resume: bool | str | os.PathLike[str] | None) -> Path | None:
        if isinstance(resume, str | os.PathLike):
            return Path(resume)
        newest = checkpoint.find_newest(self.output_dir)
        if resume and newest is None:
            raise ConfigError(f"resume_from_checkpoint: there is no valid checkpoint in {self.output_dir}")
        if not resume and newest is not None:
            raise ConfigError(
                f"output_dir {self.output_dir} already holds {newest.name}; "
                "set resume_from_checkpoint to go on from it, or choose another output_dir"
            )
        return newest

    def _resume(self, folder: Path) -> int:
        """Restore everything from `folder`; returns the step it was saved after."""
        try:
            optimizer, state, source = checkpoint.load(folder, self.model, self.device)
            self._optimizer.load_state(optimizer)
        except ConfigError:
            raise
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"resume_from_checkpoint: {folder} doesn't fit this model: {first_line(error)}"
            ) from error
        self.source.restore(source)
        self._window.restore(state["window"])
        self._num_tokens = state["num_tokens"]
        self._num_packed_tokens = state.get("num_packed_tokens", self._num_tokens)  # older checkpoints don't have it
        return state["step"]


def set_seed(seed: int) -> None:
    """Seed the generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _recompute_activations(model: Any) -> None:
    newer = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 6 on
    enable = newer or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


class _Interrupt:
    """Notes the first Ctrl-C instead of stopping at once; the second one stops. Only the main thread can."""

    asked = False

    def __enter__(self) -> "_Interrupt":
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
