"""Supervised fine-tuning: SFTTrainer and SFTConfig, with TRL's names."""

from typing import Any

from posttrain.data import PackedBatch, Rows
from posttrain.data.tokenize import tokenize_sft
from posttrain.models import token_logprobs
from posttrain.objectives import Loss, cross_entropy
from posttrain.train.sft_config import SFTConfig
from posttrain.train.source import PackedSource, Step
from posttrain.train.trainer import Trainer

__all__ = ["SFTConfig", "SFTTrainer"]


class SFTTrainer(Trainer):
    """Fine-tunes a causal language model on examples of text. The arguments are those of `Trainer`."""

    config_class = SFTConfig
    args: SFTConfig

    def _source(self, rows: Rows, *, training: bool) -> PackedSource:
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
            shuffle_seed=args.seed if training and args.train_sampling_strategy == "random" else None,
            share=self._shares_prefixes,
        )

    def _loss(self, model: Any, batch: PackedBatch, step: Step) -> Loss:
        return cross_entropy(token_logprobs(model, batch, need_entropy=True), step.num_targets)
