"""Trainer: what the trainers of all methods share, from their arguments to a run of the loop."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch

from posttrain.data import Example, Rows
from posttrain.data.load import load_rows
from posttrain.models import add_adapter, add_lora, head, load, prepare
from posttrain.models.causal_lm import causal_lm
from posttrain.objectives import Loss
from posttrain.train import checkpoint
from posttrain.train.config import ConfigError, TrainConfig
from posttrain.train.loop import Loop, TrainResult, set_seed
from posttrain.train.optimizer import half_dtype
from posttrain.train.reference import Reference, adapter_off, frozen_copy
from posttrain.train.source import Source


class Trainer(ABC):
    """Base of the trainers. One adds its config class, `_source` and `_loss`; the arguments are those of TRL.

    Args:
        model: folder or hub id, or a Hugging Face model (then `processing_class` is needed); default `args.model`.
        args: settings; default those of the config class.
        train_dataset: file, hub id, rows or `datasets.Dataset`; default `args.data`.
        eval_dataset: likewise; default `args.eval_data`.
        processing_class: the tokenizer; default the one that comes with the model.
        peft_config: a PEFT config; default what `args.lora_r` and its companions say.

    Raises:
        ValueError: whatever can't be used, in one line that names it. Nothing is written before `train`.
    """

    config_class: ClassVar[type[TrainConfig]]

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
    ) -> None:
        self.args = self.config_class() if args is None else args
        self._check_args()
        set_seed(self.args.seed)
        source = train_dataset if train_dataset is not None else self.args.data
        if source is None:
            raise ConfigError("no training data: give train_dataset, or set data")
        eval_source = eval_dataset if eval_dataset is not None else self.args.eval_data
        rows = load_rows(source, skip_bad_rows=self.args.skip_bad_rows)
        eval_rows = None if eval_source is None else load_rows(eval_source, skip_bad_rows=self.args.skip_bad_rows)
        self._new_adapter = peft_config is not None or self.args.lora_r > 0
        self.model, self.processing_class = self._load_model(model, processing_class, peft_config)
        self._set_up()
        self._loop = Loop(
            self.model,
            self.processing_class,
            self.args,
            self._source(rows, training=True),
            self._loss,
            None if eval_rows is None else self._source(eval_rows, training=False),
        )

    def _check_args(self) -> None:
        """Raise `ConfigError` for settings that can't be used; runs before anything is loaded."""
        if not isinstance(self.args, self.config_class):
            raise ConfigError(f"args must be a posttrain.{self.config_class.__name__}, got {type_name(self.args)}")

    def _set_up(self) -> None:  # noqa: B027 - a hook that most trainers leave empty
        """Make what a method needs besides the model, which is loaded, and before the data is read in."""

    @abstractmethod
    def _source(self, rows: Rows, *, training: bool) -> Source:
        """The steps made of `rows`; the model and the tokenizer are there. `training` is False for evaluation data."""

    @abstractmethod
    def _loss(self, model: Any, batch: Any, step: Any) -> Loss:
        """The share of a micro-batch in the loss and the metrics of `step`."""

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainResult:
        """Train, and save the last checkpoint. Resumes as told here or, by default, by the config."""
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        return self._loop.run(resume)

    def evaluate(self) -> dict[str, float]:
        """The metrics on the evaluation data, as `eval_loss` and so on."""
        return self._loop.evaluate()

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the weights (or the adapter) and the tokenizer, by default to `args.output_dir`."""
        checkpoint.save_model(self.model, self.processing_class, Path(output_dir or self.args.output_dir))

    @property
    def log_history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return self._loop.history

    @property
    def _shares_prefixes(self) -> bool:
        """Whether the model can run on packed forests; padded rows can't share."""
        return causal_lm(self.model).config._attn_implementation == "posttrain"

    def _load_model(self, model: Any, tokenizer: Any, peft_config: Any) -> tuple[Any, Any]:
        args = self.args
        model = model if model is not None else args.model
        if model is None:
            raise ConfigError("no model: give model, a folder or hub id")
        device = torch.device("cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu")
        if isinstance(model, str | Path):
            # Weights that stay frozen need no float32 copy.
            half = half_dtype(args, device) if args.lora_r > 0 or peft_config is not None else None
            model, own_tokenizer = load(
                model,
                dtype=half or torch.float32,
                device=device,
                trust_remote_code=args.trust_remote_code,
                load_in_4bit=args.load_in_4bit,
                use_bnb_nested_quant=args.use_bnb_nested_quant,
            )
            tokenizer = tokenizer or own_tokenizer
        elif isinstance(model, torch.nn.Module):
            if args.load_in_4bit:
                raise ConfigError("load_in_4bit is for a model that is loaded here: give a folder or hub id")
            model = model.to(device)
            prepare(model)
        else:
            raise ConfigError(f"model must be a folder, a hub id or a transformers model, got {type_name(model)}")
        if tokenizer is None:
            raise ConfigError("no tokenizer: give processing_class along with a model object")
        model = self._add_adapter(model, peft_config).train()
        head(model)  # raises now, not in the first step, for an adapter on the head that can't be trained
        return model, tokenizer

    def _add_adapter(self, model: Any, peft_config: Any) -> Any:
        args = self.args
        if self._new_adapter and hasattr(model, "peft_config"):
            raise ConfigError("the model has an adapter already, which is trained; leave out lora_r and peft_config")
        if peft_config is not None:
            return add_adapter(model, peft_config)
        if args.lora_r == 0:
            if args.load_in_4bit and not hasattr(model, "peft_config"):
                raise ConfigError(
                    "load_in_4bit leaves nothing to train but an adapter: set lora_r, or give peft_config"
                )
            return model
        names = args.lora_target_modules
        targets = names[0] if names == ["all-linear"] else names
        try:
            return add_lora(model, args.lora_r, args.lora_alpha, targets, args.lora_dropout)
        except ValueError as error:
            raise ConfigError(f"lora_target_modules {','.join(names)}: {error}") from error

    def _reference(self) -> Reference:
        """The policy as it is now, before training: the base model of a new adapter, else a frozen copy."""
        if self._new_adapter:
            return adapter_off(self.model)
        return frozen_copy(self.model, half_dtype(self.args, next(self.model.parameters()).device))

    def _check_vocabulary(self, examples: Iterable[Example]) -> None:
        """Raise if the model has no embedding for a token."""
        size = self.model.get_input_embeddings().weight.shape[0]
        for example in examples:
            if (token := int(example.input_ids.max())) >= size:
                raise ConfigError(
                    f"{example.origin or 'the data'} holds token {token}, but the model's vocabulary has {size}; "
                    "the tokenizer is another model's"
                )


def type_name(value: Any) -> str:
    """The type of `value`, with its module."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
