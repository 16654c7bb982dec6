"""TrainConfig: the settings every trainer has, and how they are read from YAML and the command line.

Names and defaults are those of TRL 1.16 and transformers' TrainingArguments. A value is checked against the type of
its field wherever it comes from: Python, YAML or a flag.
"""

import dataclasses
import difflib
import math
import os
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

import yaml

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
SAMPLING = ("random", "sequential")
REPORTS = ("none", "tensorboard", "wandb")


class ConfigError(ValueError):
    """A setting that can't be used; the message is one line and names it."""


def option(default: Any, help: str, choices: Iterable[str] = ()) -> Any:
    """A dataclass field with its help text and, where they are few, its allowed values."""
    return dataclasses.field(default=default, metadata=_about(help, choices))


def _about(help: str, choices: Iterable[str] = ()) -> dict[str, Any]:
    return {"help": help, "choices": tuple(choices)}


@dataclasses.dataclass
class TrainConfig:
    """Settings shared by all trainers."""

    model: str | None = option(None, "folder or hub id of the model")
    data: str | None = option(None, "training data: a JSONL, JSON, CSV or Parquet file, or a hub id")
    eval_data: str | None = option(None, "evaluation data, as `data`")
    output_dir: str = option("trainer_output", "run folder: metrics, plot and checkpoints")
    learning_rate: float = option(5e-5, "peak learning rate of AdamW")
    per_device_train_batch_size: int = option(8, "sequences of a batch")
    gradient_accumulation_steps: int = option(1, "batches that make one optimizer step")
    max_tokens_per_batch: int = option(8192, "most packed tokens in one forward pass; bounds memory, changes no result")
    num_train_epochs: float = option(3.0, "passes over the data, unless max_steps is set")
    max_steps: int = option(-1, "optimizer steps; -1: as many as num_train_epochs needs")
    lr_scheduler_type: str = option("linear", "course of the learning rate", SCHEDULES)
    warmup_steps: float = option(0.0, "steps of linear warm-up; below 1: share of all steps")
    weight_decay: float = option(0.0, "decay of weight matrices (not of biases and norms)")
    adam_beta1: float = option(0.9, "AdamW's beta1")
    adam_beta2: float = option(0.999, "AdamW's beta2")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0: never")
    gradient_checkpointing: bool = option(True, "recompute activations in the backward pass to save memory")
    bf16: bool | None = option(
        None, "hold the model in bfloat16, with float32 weights in the optimizer; by default on CUDA only"
    )
    use_cpu: bool = option(False, "train on the CPU even if there is a GPU")
    skip_bad_rows: bool = option(False, "count and list rows that can't be used, instead of stopping at the first")
    seed: int = option(42, "seed of the data order, of new weights and of dropout")
    train_sampling_strategy: str = option("random", "order of the training data", SAMPLING)
    logging_steps: int = option(10, "steps between two lines of metrics")
    eval_steps: int | None = option(None, "steps between two evaluations; by default only at the end")
    save_steps: int = option(500, "steps between two checkpoints; 0: only at the end")
    save_total_limit: int | None = option(None, "keep this many newest checkpoints")
    resume_from_checkpoint: bool | str | None = option(
        None, "checkpoint folder to go on from; true: the newest valid one in output_dir"
    )
    report_to: list[str] = dataclasses.field(
        default_factory=lambda: ["none"], metadata=_about("where metrics go besides metrics.jsonl", REPORTS)
    )
    disable_tqdm: bool = option(False, "no progress bar, only lines")
    trust_remote_code: bool = option(False, "run Python code that comes with the model")
    lora_r: int = option(0, "rank of LoRA adapters; 0: train all weights")
    lora_alpha: int = option(32, "LoRA's scaling is lora_alpha / lora_r")
    lora_dropout: float = option(0.0, "dropout before LoRA's first matrix")
    lora_target_modules: list[str] = dataclasses.field(
        default_factory=lambda: ["all-linear"], metadata=_about("names of the modules that get LoRA adapters")
    )
    load_in_4bit: bool = option(False, "quantise the model's frozen linear layers to 4 bits (NF4), for QLoRA")
    use_bnb_nested_quant: bool = option(False, "with load_in_4bit, keep the statistics of the 4-bit weights in 8 bits")

    def __post_init__(self) -> None:
        for name, (field, hint) in fields_of(type(self)).items():
            value = coerce(name, getattr(self, name), hint)
            for each in value if isinstance(value, list) else [value]:
                if field.metadata["choices"] and each not in field.metadata["choices"]:
                    raise ConfigError(f"{name} must be one of {', '.join(field.metadata['choices'])}; got {each!r}")
            setattr(self, name, value)
        self._check_ranges()

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = "config") -> Self:
        """A config from names and values. `source` is named in the error for an unknown name."""
        known = fields_of(cls)
        for key in values:
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; {cls.__name__} lists what there is"
                raise ConfigError(f"{source}: unknown key {key!r}{hint}")
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Names and values, as plain Python objects."""
        return dataclasses.asdict(self)

    def _check_ranges(self) -> None:
        at_least(self, 1, "per_device_train_batch_size", "gradient_accumulation_steps", "max_tokens_per_batch")
        at_least(self, 1, "logging_steps", "eval_steps", "save_total_limit", "lora_alpha")
        at_least(self, 0, "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "save_steps", "lora_r")
        at_least(self, 0, "adam_beta1", "adam_beta2", "adam_epsilon", "lora_dropout")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")
        for name in ("adam_beta1", "adam_beta2", "lora_dropout"):
            if getattr(self, name) >= 1:
                raise ConfigError(f"{name} must be below 1, got {getattr(self, name):g}")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ConfigError(f"num_train_epochs must be positive, got {self.num_train_epochs:g}")


def at_least(config: TrainConfig, least: float, *names: str) -> None:
    """Raise `ConfigError` if one of these fields is set and below `least`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least:g}, got {value:g}")


def fields_of(config: type) -> dict[str, tuple[dataclasses.Field, Any]]:
    """Name -> (dataclass field, type) of a config class."""
    hints = get_type_hints(config)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(config)}


def coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, or a `ConfigError` that names the field.

    Numbers and booleans may be written as strings: flags always are, and YAML reads 1e-5 as a string.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in kinds and (value is None or value in ("none", "null", "")):
        return None
    kinds = tuple(kind for kind in kinds if kind in _CONVERT)
    for kind in kinds:
        try:
            return _CONVERT[kind](value)
        except (ValueError, OverflowError):
            continue
    wanted = " or ".join(_WORDS[kind] for kind in kinds)
    raise ConfigError(f"{name} must be {wanted}, got {value!r}")


def _to_bool(value: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError


def _to_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError
    return int(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _to_str(value: Any) -> str:
    if not isinstance(value, str | os.PathLike):
        raise ValueError
    return os.fspath(value)


def _to_list(value: Any) -> list[str]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return list(value)
    raise ValueError


def _to_numbers(value: Any) -> list[float]:
    if isinstance(value, str):
        return [_to_float(part) for part in value.split(",")]
    if isinstance(value, list | tuple):
        return [_to_float(part) for part in value]
    raise ValueError


_CONVERT: dict[Any, Any] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
    list[str]: _to_list,
    list[float]: _to_numbers,
}
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list[str]: "a list of texts",
    list[float]: "a list of numbers",
}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, or a `ConfigError` naming file and line."""
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"config file {path} is a folder")
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected `name: value` lines, found {type(content).__name__}")
    return content


def check_writable(output_dir: str | Path) -> None:
    """Raise `ConfigError` if a folder `output_dir` can't be made or written. Makes nothing."""
    path = Path(output_dir).absolute()
    while not os.path.lexists(path):
        path = path.parent
    if not path.is_dir():
        raise ConfigError(f"output_dir {output_dir}: {path} is not a folder")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir {output_dir}: no permission to write in {path}")
