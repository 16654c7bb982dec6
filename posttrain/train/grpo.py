"""Group-relative policy optimisation: GRPOTrainer and GRPOConfig, with TRL's names."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.data import Example, Rows
from posttrain.data.prompts import Prompt, tokenize_prompts
from posttrain.models import head, hidden_states, token_logprobs
from posttrain.models.causal_lm import causal_lm
from posttrain.models.divergence import kl_divergence
from posttrain.objectives import Loss
from posttrain.objectives.advantage import Advantages, group_advantages
from posttrain.objectives.policy import (
    PolicyCounts,
    PolicyObjective,
    PolicyTargets,
    high_entropy,
    importance_weight,
    policy_loss,
)
from posttrain.ops import TokenLogprobs
from posttrain.rewards.score import RewardError, RewardFunctions, Scores, TrainerState
from posttrain.rollout import SamplingParams
from posttrain.train import completions
from posttrain.train.config import ConfigError
from posttrain.train.environment import Environment
from posttrain.train.grpo_config import GRPOConfig
from posttrain.train.reference import inference
from posttrain.train.rollouts import (
    Generation,
    Packing,
    PolicyBatch,
    PolicyStep,
    Rollout,
    RolloutSource,
    per_rollout,
)
from posttrain.train.sampler import Sample, Sampler
from posttrain.train.source import Step
from posttrain.train.trainer import Trainer

__all__ = ["GRPOConfig", "GRPOTrainer"]


class GRPOTrainer(Trainer):
    """Trains a causal language model on its own completions, rewarded by functions.

    Args:
        model: as in `Trainer`.
        reward_funcs: one or several (see posttrain/rewards/score.py); default `args.reward_funcs`.
        args, train_dataset, eval_dataset, processing_class, peft_config: as in `Trainer`. The data has a column
            `prompt`; all other columns go to the reward functions.
        environment: what answers completions, for several turns (see posttrain/train/environment.py); default
            `args.environment`.
    """

    config_class = GRPOConfig
    args: GRPOConfig

    def __init__(
        self,
        model: Any = None,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        environment: Callable[..., Any] | str | None = None,
    ) -> None:
        functions = reward_funcs or (args.reward_funcs if args is not None else None)
        if not functions:
            raise ConfigError("no reward function: give reward_funcs")
        try:
            self._rewards = RewardFunctions(functions)
        except RewardError as error:
            raise ConfigError(str(error)) from error
        self._environment = environment
        self._sampler: Sampler | None = None
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, peft_config)

    def _load_model(self, model: Any, tokenizer: Any, peft_config: Any) -> tuple[Any, Any]:
        args = self.args
        if args.reward_weights is not None and len(args.reward_weights) != len(self._rewards):
            raise ConfigError(f"{len(args.reward_weights)} reward_weights for {len(self._rewards)} reward functions")
        self._objective = PolicyObjective(**{field: getattr(args, field) for field in vars(PolicyObjective())})
        self.model, tokenizer = super()._load_model(model, tokenizer, peft_config)
        self._reference_policy = self._reference() if args.beta != 0 else None
        environment = self._environment or args.environment
        params = SamplingParams(
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p or 0.0,
            max_tokens=args.max_completion_length,
        )
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        answers = None if environment is None else Environment(environment, tokenizer, vocabulary)
        self._sampler = Sampler(self.model, tokenizer, params, answers, self._context)
        return self.model, tokenizer

    def _source(self, rows: Rows, *, training: bool) -> RolloutSource:
        args = self.args
        prompts = tokenize_prompts(rows, self.processing_class, skip_bad_rows=args.skip_bad_rows)
        self._check_prompts(prompts)
        steps = args.steps_of_generation

        def generate(indices: list[int], number: int | None) -> Generation:
            return self._generate([prompts[i] for i in indices], number)

        return RolloutSource(
            len(prompts),
            generate,
            prompts_per_generation=args.completions_per_step * steps // args.num_generations,
            steps=steps,
            num_iterations=args.num_iterations,
            packing=self._packing,
            shuffle_seed=args.seed if training and args.train_sampling_strategy == "random" else None,
            prepare=self._prepare,
        )

    @property
    def _context(self) -> int | None:
        """Most tokens that the model can read."""
        return getattr(causal_lm(self.model).config.get_text_config(), "max_position_embeddings", None)

    @property
    def _packing(self) -> Packing:
        return Packing(self.args.max_tokens_per_batch, self._shares_prefixes, self._objective.only_policy)

    def _check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise if the model doesn't know a token or has no room for an answer, or no micro-batch has."""
        ids = [np.array(prompt.token_ids, np.int32) for prompt in prompts]
        self._check_vocabulary(
            Example(tokens, np.zeros(len(tokens), np.bool_), origin=prompt.origin)
            for tokens, prompt in zip(ids, prompts, strict=True)
        )
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        length, room = len(longest.token_ids), self.args.max_completion_length
        context = self._context
        if context is not None and length >= context:
            raise ConfigError(f"{longest.origin} has {length} tokens, and the model's context {context}")
        if length + room > self.args.max_tokens_per_batch:
            raise ConfigError(
                f"{longest.origin} has {length} tokens, with max_completion_length {room} more than "
                f"max_tokens_per_batch {self.args.max_tokens_per_batch}; raise it or lower max_completion_length"
            )

    def _generate(self, prompts: Sequence[Prompt], number: int | None) -> Generation:
        """Draw and score completions. `number` is that of the generation, None for an evaluation."""
        args = self.args
        assert self._sampler is not None
        count = args.num_generations if number is not None else args.num_generations_eval or args.num_generations
        samples = self._sampler(prompts, count, f"{args.seed} {'eval' if number is None else number}")
        scores = self._score(samples)
        advantages = group_advantages(
            scores.rewards, count, weights=args.reward_weights, scale_rewards=args.scale_rewards
        )
        rollouts = [
            Rollout(
                sample.example(i // count, args.mask_truncated_completions and sample.truncated),
                advantage,
                np.array(sample.logprobs, np.float32),
            )
            for i, (sample, advantage) in enumerate(zip(samples, advantages.advantage.tolist(), strict=True))
        ]
        if args.log_completions:
            self._write(samples, scores, advantages, number is None)
        metrics = self._reward_metrics(scores, advantages) | _length_metrics(samples)
        return Generation(self._with_logprobs(rollouts), metrics)

    def _score(self, samples: Sequence[Sample]) -> Scores:
        names = dict.fromkeys(name for sample in samples for name in sample.prompt.columns)
        try:
            return self._rewards(
                [sample.prompt.given for sample in samples],
                [sample.content for sample in samples],
                [sample.token_ids for sample in samples],
                {name: [sample.prompt.columns.get(name) for sample in samples] for name in names},
                TrainerState(self._loop.global_step, self._loop.num_steps),
            )
        except RewardError as error:
            raise ConfigError(str(error)) from error

    def _with_logprobs(self, rollouts: list[Rollout]) -> list[Rollout]:
        """`rollouts` with what the policy that drew them and the reference say of them, as far as it is needed."""
        args = self.args
        rollouts = [
            rollout if rollout.example.num_targets else replace(rollout, sampling_logprob=np.empty(0, np.float32))
            for rollout in rollouts
        ]
        if args.use_rollout_logprobs:
            rollouts = [replace(rollout, old_logprob=rollout.sampling_logprob) for rollout in rollouts]
        batches = self._packing._replace(skip_idle=False).batches(rollouts)
        if args.importance_sampling_correction or (
            not args.use_rollout_logprobs and args.steps_of_generation * args.num_iterations > 1
        ):
            with inference(self.model):
                old = self._logprobs(self.model, batches, len(rollouts))
            rollouts = [replace(rollout, old_logprob=values) for rollout, values in zip(rollouts, old, strict=True)]
        if self._reference_policy is not None and args.kl_estimator != "exact":
            context: AbstractContextManager[Any] = self._reference_policy()
            with context as model:
                reference = self._logprobs(model, batches, len(rollouts))
            rollouts = [replace(rollout, ref_logprob=v) for rollout, v in zip(rollouts, reference, strict=True)]
        return rollouts

    def _logprobs(self, model: Any, batches: Sequence[PolicyBatch], count: int) -> list[Any]:
        return per_rollout(batches, [self._run(model, batch).logprob for batch in batches], count)

    def _run(self, model: Any, batch: PolicyBatch, need_entropy: bool = False) -> TokenLogprobs:
        packed = batch.packed.to(next(self.model.parameters()).device)
        return token_logprobs(model, packed, temperature=self.args.temperature, need_entropy=need_entropy)

    def _prepare(self, batches: list[PolicyBatch], counts: PolicyCounts) -> tuple[list[PolicyBatch], PolicyCounts]:
        """Importance weights, and which tokens have a high entropy among those of the step."""
        args = self.args
        if args.importance_sampling_correction:
            batches = [replace(batch, targets=self._weighted(batch)) for batch in batches]
        if args.top_entropy_quantile == 1 or not batches:
            return batches, counts
        with inference(self.model):
            entropies = [self._entropy(batch) for batch in batches]
        kept = high_entropy(torch.cat(entropies), args.top_entropy_quantile).cpu()  # the only wait for the device
        parts = kept.split([len(e) for e in entropies])
        batches = [replace(b, targets=replace(b.targets, kept=part)) for b, part in zip(batches, parts, strict=True)]
        return batches, counts._replace(kept_tokens=int(kept.sum()))

    def _weighted(self, batch: PolicyBatch) -> PolicyTargets:
        args, targets = self.args, batch.targets
        assert targets.old_logprob is not None and targets.sampling_logprob is not None
        weight = importance_weight(
            targets.old_logprob,
            targets.sampling_logprob,
            targets,
            mode=args.importance_sampling_mode,
            clip_max=args.importance_sampling_clip_max,
            clip_min=args.importance_sampling_clip_min,
        )
        return replace(targets, weight=weight)

    def _entropy(self, batch: PolicyBatch) -> Tensor:
        entropy = self._run(self.model, batch, need_entropy=True).entropy
        assert entropy is not None
        return entropy

    def _loss(self, model: Any, batch: PolicyBatch, step: Step) -> Loss:
        assert isinstance(step, PolicyStep)
        packed, temperature = batch.packed, self.args.temperature
        with torch.set_grad_enabled(torch.is_grad_enabled() and not batch.idle):
            if self._reference_policy is None or self._objective.kl_estimator != "exact":
                policy = token_logprobs(model, packed, temperature=temperature, need_entropy=True)
                return policy_loss(policy, batch.targets, step.counts, self._objective)
            reference: AbstractContextManager[Any] = self._reference_policy()
            with reference as other:
                hidden_q, head_q = hidden_states(other, packed)[packed.rows], head(other).detached()
            hidden = hidden_states(model, packed)
            policy = token_logprobs(model, packed, temperature=temperature, need_entropy=True, hidden=hidden)
            divergence = kl_divergence(head(model), hidden[packed.rows], head_q, hidden_q, temperature)
            return policy_loss(policy, batch.targets, step.counts, self._objective, divergence)

    def _reward_metrics(self, scores: Scores, advantages: Advantages) -> dict[str, float]:
        metrics = {name: value.item() for name, value in advantages.metrics.items()} | scores.metrics
        for name, column in zip(self._rewards.names, scores.rewards.T, strict=True):
            given = column[~column.isnan()]
            metrics[f"rewards/{name}/mean"] = given.mean().item()
            metrics[f"rewards/{name}/std"] = given.std().item() if len(given) > 1 else math.nan
        return {name: value for name, value in metrics.items() if not math.isnan(value)}

    def _write(self, samples: Sequence[Sample], scores: Scores, advantages: Advantages, evaluation: bool) -> None:
        step = self._loop.global_step
        table: dict[str, list[Any]] = {
            "step": [step] * len(samples),
            "prompt": [sample.prompt.given for sample in samples],
            "completion": [sample.content for sample in samples],
            **{
                name: [None if math.isnan(value) else value for value in column]
                for name, column in zip(self._rewards.names, scores.rewards.T.tolist(), strict=True)
            },
            **scores.columns,
            "advantage": advantages.advantage.tolist(),
        }
        name = f"{'eval' if evaluation else 'completions'}_{step:05d}.parquet"
        completions.write(Path(self.args.output_dir) / "completions" / name, table)


def _length_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Of the tokens that the policy drew."""
    lengths = [sum(sample.drawn) for sample in samples]
    ended = [length for length, sample in zip(lengths, samples, strict=True) if not sample.truncated] or [0]
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/mean_terminated_length": sum(ended) / len(ended),
        "completions/clipped_ratio": sum(sample.truncated for sample in samples) / len(samples),
    }
