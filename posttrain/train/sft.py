"""Supervised fine-tuning: SFTTrainer and SFTConfig, with TRL's names."""

from pathlib import Path
from typing import Any

import torch

from posttrain.data import Example, PackedBatch
from posttrain.data.load import load_rows
from posttrain.data.tokenize import tokenize_sft
from posttrain.models import add_lora, load, prepare, token_logprobs
from posttrain.models.causal_lm import causal_lm
from posttrain.objectives import Loss, cross_entropy
from posttrain.train import checkpoint
from posttrain.train.config import ConfigError
from posttrain.train.loop import Loop, TrainResult, set_seed
from posttrain.train.optimizer import half_dtype
from posttrain.train.sft_config import SFTConfig
from posttrain.train.source import PackedSource, Step

__all__ = ["SFTConfig", "SFTTrainer"]


class SFTTrainer:
    """Fine-tunes a causal language model on examples of text.

    Args:
        model: folder or hub id, or a Hugging Face model (then `processing_class` is needed); default `args.model`.
        args: settings; default `SFTConfig()`.
        train_dataset: file, hub id, rows or `datasets.Dataset`; default `args.data`.
        eval_dataset: likewise; default `args.eval_data`.
        processing_class: the tokenizer; default the one that comes with the model.
        peft_config: a PEFT config; default what `args.lora_r` and its companions say.

    Raises:
        ValueError: whatever can't be used, in one line that names it. Nothing is written before `train`.
    """

    def __init__(
        self,
        model: Any = None,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
    ) -> None:
        self.args = SFTConfig() if args is None else args
        if not isinstance(self.args, SFTConfig):
            raise ConfigError(f"args must be a posttrain.SFTConfig, got {_type_name(args)}")
        set_seed(self.args.seed)
        source = train_dataset if train_dataset is not None else self.args.data
        if source is None:
            raise ConfigError("no training data: give train_dataset, or set data")
        eval_source = eval_dataset if eval_dataset is not None else self.args.eval_data
        rows = load_rows(source, skip_bad_rows=self.args.skip_bad_rows)
        eval_rows = None if eval_source is None else load_rows(eval_source, skip_bad_rows=self.args.skip_bad_rows)
        self.model, self.processing_class = self._load_model(model, processing_class, peft_config)
        self._loop = Loop(
            self.model,
            self.processing_class,
            self.args,
            self._pack(rows, self.args.train_sampling_strategy == "random"),
            _loss,
            None if eval_rows is None else self._pack(eval_rows, False),
        )

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainResult:
        """Train, and save the last checkpoint. Resumes as told here or, by default, by the config."""
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        return self._loop.run(resume)

    def evaluate(self) -> dict[str, float]:
        """Loss, entropy and token accuracy on the evaluation data, as `eval_loss` and so on."""
        return self._loop.evaluate()

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the weights (or the adapter) and the tokenizer, by default to `args.output_dir`."""
        checkpoint.save_model(self.model, self.processing_class, Path(output_dir or self.args.output_dir))

    @property
    def log_history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return self._loop.history

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
                model, dtype=half or torch.float32, device=device, trust_remote_code=args.trust_remote_code
            )
            tokenizer = tokenizer or own_tokenizer
        elif isinstance(model, torch.nn.Module):
            model = model.to(device)
            prepare(model)
        else:
            raise ConfigError(f"model must be a folder, a hub id or a transformers model, got {_type_name(model)}")
        if tokenizer is None:
            raise ConfigError("no tokenizer: give processing_class along with a model object")
        if (peft_config is not None or args.lora_r > 0) and hasattr(model, "peft_config"):
            raise ConfigError("the model has an adapter already, which is trained; leave out lora_r and peft_config")
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        elif args.lora_r > 0:
            names = args.lora_target_modules
            targets = names[0] if names == ["all-linear"] else names
            try:
                model = add_lora(model, args.lora_r, args.lora_alpha, targets, args.lora_dropout)
            except ValueError as error:
                raise ConfigError(f"lora_target_modules {','.join(names)}: {error}") from error
        return model, tokenizer

    def _pack(self, rows: Any, shuffle: bool) -> PackedSource:
        args = self.args
        examples = tokenize_sft(
            rows,
            self.processing_class,
            max_length=args.max_length,
            completion_only_loss=args.completion_only_loss,
            assistant_only_loss=args.assistant_only_loss,
            skip_bad_rows=args.skip_bad_rows,
        )
        self._check_vocabulary(examples)
        return PackedSource(
            examples,
            sequences_per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps,
            max_tokens=args.max_tokens_per_batch,
            bin_tokens=args.max_length if args.packing else None,
            shuffle_seed=args.seed if shuffle else None,
            share=causal_lm(self.model).config._attn_implementation == "posttrain",  # padded rows can't share
        )

    def _check_vocabulary(self, examples: list[Example]) -> None:
        """Raise if the model has no embedding for a token."""
        size = self.model.get_input_embeddings().weight.shape[0]
        for example in examples:
            if (token := int(example.input_ids.max())) >= size:
                raise ConfigError(
                    f"{example.origin or 'the data'} holds token {token}, but the model's vocabulary has {size}; "
                    "the tokenizer is another model's"
                )


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _loss(model: Any, batch: PackedBatch, step: Step) -> Loss:
    return cross_entropy(token_logprobs(model, batch, need_entropy=True), step.num_targets)
