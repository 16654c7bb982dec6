"""GRPOConfig: the settings of group-relative policy optimisation."""

from dataclasses import dataclass, field

from posttrain.train.config import ConfigError, TrainConfig, at_least, option

LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo")
LEVELS = ("token", "sequence")
ESTIMATORS = ("k3", "k1", "k2", "exact")
CORRECTIONS = ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate")
SCALES = ("group", "batch", "none")


@dataclass
class GRPOConfig(TrainConfig):
    """`TrainConfig` with what GRPO adds. A sequence of the batch is a completion."""

    learning_rate: float = option(1e-6, "peak learning rate of AdamW")
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "reward functions: module:function, or a name in posttrain.rewards", "choices": ()},
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "weight of each reward function; by default 1", "choices": ()}
    )
    environment: str | None = option(None, "module:function that answers completions, for several turns")
    num_generations: int = option(8, "completions of a prompt")
    num_generations_eval: int | None = option(None, "completions of a prompt in evaluations; by default as in training")
    max_completion_length: int = option(512, "most tokens of a completion, what an environment says included")
    steps_per_generation: int | None = option(
        None, "batches made of the completions drawn at once; by default gradient_accumulation_steps"
    )
    num_iterations: int = option(1, "times that every completion is trained on")
    temperature: float = option(1.0, "temperature of sampling and of the log-probabilities")
    top_p: float = option(1.0, "sample from the likeliest tokens with this probability together")
    top_k: int = option(0, "sample from this many likeliest tokens; 0: all")
    min_p: float | None = option(None, "sample from tokens at least this share as likely as the likeliest")
    loss_type: str = option("dapo", "form of the loss", LOSSES)
    beta: float = option(0.0, "weight of the KL divergence from the reference policy; 0: no reference policy")
    kl_estimator: str = option("k3", "estimate of the KL divergence", ESTIMATORS)
    use_bias_correction_kl: bool = option(True, "multiply the estimate by the importance ratio, which unbiases it")
    epsilon: float = option(0.2, "ratios are clipped below 1 - epsilon")
    epsilon_high: float | None = option(None, "and above 1 + epsilon_high, by default epsilon; cispo: above it")
    delta: float | None = option(None, "ratios of completions with negative advantage are clipped above delta")
    importance_sampling_level: str = option("token", "whether a token or a completion has a ratio (GSPO)", LEVELS)
    scale_rewards: str = option("group", "whose standard deviation divides the advantages", SCALES)
    sapo_temperature_pos: float = option(1.0, "sapo: temperature for positive advantages")
    sapo_temperature_neg: float = option(1.05, "sapo: temperature for the others")
    entropy_coef: float = option(0.0, "weight of the mean entropy, which is subtracted from the loss")
    top_entropy_quantile: float = option(1.0, "share of the tokens, those of highest entropy, that is trained on")
    mask_truncated_completions: bool = option(False, "leave completions that didn't end out of the loss")
    use_rollout_logprobs: bool = option(
        False, "compare with the sampler's log-probabilities instead of computing them again"
    )
    importance_sampling_correction: bool = option(
        False, "weight the loss by the ratio of the trainer's to the sampler's probabilities"
    )
    importance_sampling_mode: str = option("sequence_mask", "what happens to that ratio beyond its bounds", CORRECTIONS)
    importance_sampling_clip_max: float | None = option(3.0, "its upper bound")
    importance_sampling_clip_min: float | None = option(None, "its lower bound")
    log_completions: bool = option(True, "write completions with their rewards to output_dir/completions")

    @property
    def completions_per_step(self) -> int:
        """Completions that make one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def steps_of_generation(self) -> int:
        """Optimizer steps made of the completions drawn at once, each num_iterations times."""
        return (self.steps_per_generation or self.gradient_accumulation_steps) // self.gradient_accumulation_steps

    def _check_ranges(self) -> None:
        super()._check_ranges()
        at_least(self, 2, "num_generations")
        at_least(self, 1, "num_generations_eval", "max_completion_length", "steps_per_generation", "num_iterations")
        at_least(
            self,
            0,
            "epsilon",
            "epsilon_high",
            "delta",
            "top_k",
            "min_p",
            "importance_sampling_clip_min",
            "top_entropy_quantile",
        )
        for name in ("top_p", "min_p", "top_entropy_quantile"):
            if (value := getattr(self, name)) is not None and value > 1:
                raise ConfigError(f"{name} must be at most 1, got {value:g}")
        for name in ("temperature", "top_p", "sapo_temperature_pos", "sapo_temperature_neg"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name):g}")
        self._check_batches()
        low, high = self.importance_sampling_clip_min, self.importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ConfigError(
                f"importance_sampling_clip_min {low:g} must be below importance_sampling_clip_max {high:g}"
            )
        if self.use_rollout_logprobs and self.importance_sampling_correction:
            raise ConfigError(
                "importance_sampling_correction compares the trainer's log-probabilities with the sampler's; "
                "with use_rollout_logprobs they are the same"
            )

    def _check_batches(self) -> None:
        accumulated = self.gradient_accumulation_steps
        if self.steps_per_generation is not None and self.steps_per_generation % accumulated:
            raise ConfigError(
                f"steps_per_generation {self.steps_per_generation} must be a multiple of "
                f"gradient_accumulation_steps {accumulated}"
            )
        drawn = self.completions_per_step * self.steps_of_generation
        if drawn % self.num_generations:
            raise ConfigError(
                f"the {drawn} completions drawn at once (per_device_train_batch_size "
                f"{self.per_device_train_batch_size} x steps_per_generation "
                f"{accumulated * self.steps_of_generation}) must be a multiple of num_generations "
                f"{self.num_generations}"
            )
