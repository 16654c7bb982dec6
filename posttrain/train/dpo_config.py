"""DPOConfig: the settings of direct preference optimisation."""

import dataclasses
from dataclasses import dataclass

from posttrain.train.config import ConfigError, TrainConfig, at_least, option

LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass
class DPOConfig(TrainConfig):
    """`TrainConfig` with what direct preference optimisation adds; docs/dpo.md has the formulas."""

    learning_rate: float = option(1e-6, "peak learning rate of AdamW")
    max_length: int | None = option(1024, "prompt and answer are cut to this many tokens")
    disable_dropout: bool = option(True, "no dropout in the policy and the reference")
    precompute_ref_log_probs: bool = option(
        False, "compute the reference's log-probabilities once, before training, and keep no reference"
    )
    max_perplexity: float | None = option(
        None, "leave out pairs with an answer that is less likely to the reference; needs precompute_ref_log_probs"
    )
    loss_type: list[str] = dataclasses.field(
        default_factory=lambda: ["sigmoid"], metadata={"help": "losses, added up by loss_weights", "choices": LOSSES}
    )
    loss_weights: list[float] | None = dataclasses.field(
        default=None, metadata={"help": "weight of each loss; by default 1", "choices": ()}
    )
    beta: float = option(0.1, "how strongly the policy is held to the reference; tau of ipo")
    label_smoothing: float = option(0.0, "share of flipped labels to reckon with (robust, aot), epsilon of exo_pair")
    f_divergence_type: str = option("reverse_kl", "what measures the distance from the reference", DIVERGENCES)
    f_alpha_divergence_coef: float = option(0.5, "alpha of alpha_divergence")
    ld_alpha: float | None = option(None, "weight of an answer's tokens beyond the length of the pair's shorter one")
    discopop_tau: float = option(0.05, "temperature of discopop")

    def _check_ranges(self) -> None:
        super()._check_ranges()
        at_least(self, 2, "max_length")
        at_least(self, 0, "beta", "ld_alpha")
        if self.ld_alpha is not None and self.ld_alpha > 1:
            raise ConfigError(f"ld_alpha must be at most 1, got {self.ld_alpha:g}")
        if self.discopop_tau <= 0:
            raise ConfigError(f"discopop_tau must be above 0, got {self.discopop_tau:g}")
        if self.max_perplexity is not None:
            at_least(self, 1, "max_perplexity")
            if not self.precompute_ref_log_probs:
                raise ConfigError("max_perplexity needs precompute_ref_log_probs, which tells the perplexities")
