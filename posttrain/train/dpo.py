"""Direct preference optimisation: DPOTrainer and DPOConfig, with TRL's names."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.data import Rows, tokenize_preference
from posttrain.models import prepare, token_logprobs
from posttrain.objectives import Loss, Pairs, Preference, preference_loss, sum_answers
from posttrain.objectives.preference import COUPLED_LOSSES, check, within_perplexity
from posttrain.ops import TokenLogprobs
from posttrain.train.config import ConfigError
from posttrain.train.dpo_config import DPOConfig
from posttrain.train.optimizer import half_dtype
from posttrain.train.pairs import PairBatch, PairSource, PairStep
from posttrain.train.reference import Reference, computing_in, inference, other_model
from posttrain.train.trainer import Trainer, type_name

__all__ = ["DPOConfig", "DPOTrainer"]


class DPOTrainer(Trainer):
    """Trains a causal language model to prefer chosen answers to rejected ones.

    The reference is `ref_model` or, by default, the policy as it is before training: the model without its new adapter,
    or a copy of the weights that are trained (with `precompute_ref_log_probs` not even that).

    Args:
        model: as in `Trainer`.
        ref_model: a Hugging Face model with the same tokenizer.
        args, train_dataset, eval_dataset, processing_class, peft_config: as in `Trainer`.
    """

    config_class = DPOConfig
    args: DPOConfig

    def __init__(
        self,
        model: Any = None,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
    ) -> None:
        if ref_model is not None and not isinstance(ref_model, nn.Module):
            raise ConfigError(f"ref_model must be a transformers model, got {type_name(ref_model)}")
        if ref_model is not None and ref_model is model:
            raise ConfigError(
                "ref_model is the model itself; leave it out, and the reference is the model as it is now"
            )
        self._ref_model = ref_model
        self._reference_policy: Reference | None = None
        self._coupled: tuple[PairStep, Pairs] | None = None
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, peft_config)
        if self.args.precompute_ref_log_probs:
            self._ref_model = self._reference_policy = None

    def _check_args(self) -> None:
        super()._check_args()
        args = self.args
        self._coefficients = Preference(
            args.loss_type,
            args.loss_weights,
            args.beta,
            args.label_smoothing,
            args.f_divergence_type,
            args.f_alpha_divergence_coef,
            args.discopop_tau,
        )
        try:
            check(self._coefficients)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _set_up(self) -> None:
        self._device = next(self.model.parameters()).device
        self._half = half_dtype(self.args, self._device)
        self._reference_policy = self._make_reference()
        if self.args.disable_dropout:
            for module in self.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0

    def _make_reference(self) -> Reference | None:
        if self.args.beta == 0 and self.args.max_perplexity is None:
            return None  # nothing depends on it
        if self._ref_model is not None:
            self._ref_model.to(self._device, self._half)
            prepare(self._ref_model)
            return other_model(self._ref_model)
        if self.args.precompute_ref_log_probs and not self._new_adapter:
            return other_model(self.model)  # before training the policy is the reference
        return self._reference()

    def _source(self, rows: Rows, *, training: bool) -> PairSource:
        args = self.args
        pairs = tokenize_preference(
            rows, self.processing_class, max_length=args.max_length, skip_bad_rows=args.skip_bad_rows
        )
        self._check_vocabulary(answer for pair in pairs for answer in (pair.chosen, pair.rejected))
        source = PairSource(
            pairs,
            pairs_per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps,
            max_tokens=args.max_tokens_per_batch,
            shuffle_seed=args.seed if training and args.train_sampling_strategy == "random" else None,
            share=self._shares_prefixes,
        )
        if not args.precompute_ref_log_probs or self._reference_policy is None:
            return source
        summed, weighted = self._precomputed(source)
        if args.max_perplexity is None:
            return source.with_reference(weighted)
        kept = within_perplexity(summed, source.lengths, args.max_perplexity)
        if not kept.any():
            raise ConfigError(f"{rows.name}: no pair is within max_perplexity {args.max_perplexity:g}")
        logging.getLogger("posttrain").warning(
            "%s: max_perplexity %g leaves %d of %d pairs", rows.name, args.max_perplexity, int(kept.sum()), len(pairs)
        )
        return source.with_reference(weighted, kept)

    def _precomputed(self, source: PairSource) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[pairs, 2]` of all answers under the reference: as sums, and weighed by `ld_alpha`."""
        found: list[tuple[Tensor, Tensor]] = []
        assert self._reference_policy is not None
        with computing_in(self.model, self._half), self._reference_policy() as policy:
            for step in source.in_order():
                sums = [torch.empty(step.num_pairs, 2, dtype=torch.float64) for _ in range(2)]
                for batch in step.batches:
                    moved = batch.to(self._device)
                    logprob = token_logprobs(policy, moved.packed).logprob
                    sums[0][batch.numbers] = self._sum(logprob, moved, None).cpu()
                    sums[1][batch.numbers] = self._sum(logprob, moved, self.args.ld_alpha).cpu()
                found.append((sums[0], sums[1]))
        return torch.cat([summed for summed, _ in found]), torch.cat([weighted for _, weighted in found])

    def _loss(self, model: Any, batch: PairBatch, step: PairStep) -> Loss:
        coupled = len(step.batches) > 1 and not set(COUPLED_LOSSES).isdisjoint(self.args.loss_type)
        every = self._pairs_of(step) if coupled else None
        pairs, tokens = self._pairs(model, batch)
        value, metrics = preference_loss(
            pairs, step.num_pairs, step.num_chosen_targets, self._coefficients, step=every, numbers=batch.numbers
        )
        assert tokens.entropy is not None
        of_chosen = batch.packed.sequence % 2 == 0
        token_metrics = {
            "entropy": tokens.entropy.detach().sum() / step.num_targets,
            "mean_token_accuracy": (tokens.is_top1 & of_chosen).sum() / step.num_chosen_targets,
        }
        return Loss(value, {**metrics, **token_metrics})

    def _pairs_of(self, step: PairStep) -> Pairs:
        """All pairs of the step, without gradient: one more pass over its micro-batches, once for all of them."""
        if self._coupled is None or self._coupled[0] is not step:
            with inference(self.model):
                found = [self._pairs(self.model, batch.to(self._device))[0] for batch in step.batches]
            order = torch.cat([batch.numbers for batch in step.batches]).argsort().to(self._device)
            columns = zip(*found, strict=True)
            self._coupled = step, Pairs(*(torch.cat(column)[order] for column in columns))
        return self._coupled[1]

    def _pairs(self, model: Any, batch: PairBatch) -> tuple[Pairs, TokenLogprobs]:
        ld_alpha = self.args.ld_alpha
        reference = batch.reference
        if reference is None and self._reference_policy is not None:
            with self._reference_policy() as policy:  # before the policy's pass: its graph must not see other weights
                reference = self._sum(token_logprobs(policy, batch.packed).logprob, batch, ld_alpha)
        tokens = token_logprobs(model, batch.packed, need_entropy=True)
        answers = self._sum(tokens.logprob, batch, None)
        weighted = answers if ld_alpha is None else self._sum(tokens.logprob, batch, ld_alpha)
        if reference is None:
            reference = weighted.detach()
        return Pairs(weighted, reference, batch.lengths, answers[:, 0]), tokens

    def _sum(self, logprob: Tensor, batch: PairBatch, ld_alpha: float | None) -> Tensor:
        return sum_answers(logprob, batch.lengths, batch.longest, ld_alpha)
