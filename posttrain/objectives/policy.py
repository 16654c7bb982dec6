"""Policy optimisation with group-relative advantages: GRPO and its relatives.

For token t of completion i, with log-probabilities of the policy, of the policy that is taken as the sampler (old) and
of the reference, advantage A, and L_i loss tokens:

    ratio  w = exp(log p - log p_old)                        importance_sampling_level="token"
           w = exp(mean over t of (log p - log p_old))       "sequence" (Zheng et al., GSPO, 2025, arXiv 2507.18071)

    grpo, bnpo, dr_grpo, dapo    l = -min(min(w, delta) A, clip(w, 1 - epsilon, 1 + epsilon_high) A)
    cispo                        l = -stop(min(w, epsilon_high)) A log p
    sapo                         l = -4/tau sigmoid(tau (w - 1)) A,     tau by the sign of A

with sources

    grpo      Shao et al., DeepSeekMath, 2024, arXiv 2402.03300        delta    INTELLECT-2, 2025, arXiv 2505.07291
    dr_grpo   Liu et al., 2025, arXiv 2503.20783                       dapo     Yu et al., 2025, arXiv 2503.14476
    cispo     MiniMax-M1, 2025, arXiv 2506.13585                       sapo     Gao et al., 2025, arXiv 2511.20347
    bnpo      Xiao et al., 2025, arXiv 2506.02864

A token's loss is then weighted by a truncated importance ratio between trainer and sampler, if there is one (Yao et
al., "Your efficient RL framework secretly brings you off-policy RL training", 2025), or dropped where its entropy is
low (Wang et al., "Beyond the 80/20 rule", 2025, arXiv 2506.01939), and beta times an estimate of KL(p || p_ref) is
added, with D = log p_ref - log p (Schulman, "Approximating KL divergence", 2020):

    k1 = -D          k2 = D^2 / 2          k3 = e^D - D - 1

times w if use_bias_correction_kl (DeepSeek-V3.2, 2025, arXiv 2512.02556: w has value 1 on-policy, but a gradient), or
the divergence itself, over the whole vocabulary (exact). The sum over the B completions of the optimizer step, all its
micro-batches taken together, is

    grpo, sapo      1/B sum_i 1/L_i sum_t l               bnpo           sum l / sum_i L_i
    dr_grpo         sum l / (B max_completion_length)     dapo, cispo    sum l / tokens of a step, on average

(the last counts all steps that one generation serves; with one step it is bnpo), minus entropy_coef times the mean
entropy of the tokens that count. Names, defaults and formulas are those of TRL 1.16; where TRL's bnpo, entropy bonus
and entropy quantile go by its micro-batch, these go by the step, so that micro-batches change nothing.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.objectives.loss import Loss
from posttrain.ops.logprob import TokenLogprobs

LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo")
LEVELS = ("token", "sequence")
ESTIMATORS = ("k3", "k1", "k2", "exact")
CORRECTIONS = ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate")


@dataclass(frozen=True)
class PolicyTargets:
    """What is known of the M targets of a micro-batch, which belong to S completions.

    Attributes:
        sequence: int64 `[M]`, ascending; the completion that a target belongs to.
        lengths: int64 `[S]`, targets of each completion.
        advantage: float32 `[M]`.
        old_logprob: float32 `[M]`, of the policy that the ratio compares with; None: the policy itself, unchanged.
        ref_logprob: float32 `[M]`, of the reference policy; needed with beta.
        sampling_logprob: float32 `[M]`, as the sampler gave it; only for metrics.
        weight: float32 `[M]`, importance of a token's loss (see `importance_weight`); None: 1.
        kept: bool `[M]`, whether a token is in the policy loss (see `high_entropy`); None: all are.
    """

    sequence: Tensor
    lengths: Tensor
    advantage: Tensor
    old_logprob: Tensor | None = None
    ref_logprob: Tensor | None = None
    sampling_logprob: Tensor | None = None
    weight: Tensor | None = None
    kept: Tensor | None = None

    def to(self, device: torch.device | str) -> "PolicyTargets":
        """The same on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)


class PolicyCounts(NamedTuple):
    """Counts of a whole optimizer step.

    Attributes:
        sequences: its completions, those without a loss token among them.
        tokens: its loss tokens.
        mean_tokens: loss tokens of an average step of the same generation.
        kept_tokens: loss tokens of high entropy; None: all.
    """

    sequences: int
    tokens: int
    mean_tokens: float
    kept_tokens: int | None = None


@dataclass(frozen=True)
class PolicyObjective:
    """The coefficients of `policy_loss`; names and defaults as in TRL. Raises `ValueError` for what makes no sense."""

    loss_type: str = "dapo"
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    importance_sampling_level: str = "token"
    max_completion_length: int = 512
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    entropy_coef: float = 0.0
    kl_estimator: str = "k3"
    use_bias_correction_kl: bool = True

    def __post_init__(self) -> None:
        for name, known in (
            ("loss_type", LOSSES),
            ("importance_sampling_level", LEVELS),
            ("kl_estimator", ESTIMATORS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        for name in ("epsilon", "epsilon_high", "delta"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value:g}")
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "max_completion_length"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name):g}")

    @property
    def upper(self) -> float:
        """epsilon_high, by default epsilon."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def only_policy(self) -> bool:
        """Whether a completion of advantage 0 has no gradient."""
        return self.beta == 0 and self.entropy_coef == 0


def policy_loss(
    policy: TokenLogprobs,
    targets: PolicyTargets,
    counts: PolicyCounts,
    objective: PolicyObjective,
    divergence: Tensor | None = None,
) -> Loss:
    """Share of a micro-batch in the step's loss.

    Args:
        policy: of the micro-batch's M targets, with entropy.
        targets: the rest of what is known of them.
        counts: of the whole optimizer step.
        objective: which loss, with its coefficients.
        divergence: `[M]`, KL(p || p_ref) at the target's place, for kl_estimator="exact".

    Returns:
        The loss, with metrics `loss`, `entropy`, `kl` (with beta), `clip_ratio/{low_mean,high_mean,region_mean}` or
        `cispo_clip_ratio`, and, where sampling_logprob is given, `sampling/sampling_logp_difference/{mean,max}`.

    Raises:
        ValueError: a policy without entropy, or beta without a reference (or the divergence from it).
    """
    if policy.entropy is None:
        raise ValueError("policy_loss: the policy must come with need_entropy=True, for the metric `entropy`")
    logprob, weight = policy.logprob, _token_weight(targets, counts, objective)
    old = logprob.detach() if targets.old_logprob is None else targets.old_logprob
    ratio = _ratio(logprob - old, targets, objective.importance_sampling_level)
    token_loss = _surrogate(logprob, ratio, targets.advantage, objective)
    if targets.kept is not None:
        token_loss = token_loss * targets.kept
    if targets.weight is not None:
        token_loss = token_loss * targets.weight
    metrics = _clip_metrics(ratio.detach(), targets, counts, objective)
    if objective.beta != 0:
        kl = _kl(logprob, ratio, targets, objective) if objective.kl_estimator != "exact" else divergence
        if kl is None:
            raise ValueError("policy_loss: kl_estimator 'exact' needs the divergence")
        token_loss = token_loss + objective.beta * kl
        metrics["kl"] = kl.detach().sum() / max(counts.tokens, 1)
    value = (token_loss * weight).sum()
    if objective.entropy_coef != 0:
        value = value - objective.entropy_coef * _mean_entropy(policy.entropy, targets, counts)
    metrics["loss"] = value.detach()
    metrics["entropy"] = policy.entropy.detach().sum() / max(counts.tokens, 1)
    if targets.sampling_logprob is not None:
        difference = (old.detach() - targets.sampling_logprob).abs()
        metrics["sampling/sampling_logp_difference/mean"] = difference.sum() / max(counts.tokens, 1)
        metrics["sampling/sampling_logp_difference/max"] = torch.cat([difference, difference.new_zeros(1)]).max()
    return Loss(value, metrics)


def _token_weight(targets: PolicyTargets, counts: PolicyCounts, objective: PolicyObjective) -> Tensor | float:
    """What a token's loss is multiplied with in the sum: `[M]` or a number."""
    if objective.loss_type in ("grpo", "sapo"):
        return (1.0 / targets.lengths.clamp(min=1) / counts.sequences)[targets.sequence]
    if objective.loss_type == "dr_grpo":
        return 1.0 / (counts.sequences * objective.max_completion_length)
    return 1.0 / max(counts.tokens if objective.loss_type == "bnpo" else counts.mean_tokens, 1.0)


def _ratio(log_ratio: Tensor, targets: PolicyTargets, level: str) -> Tensor:
    """`[M]`."""
    if level == "token":
        return log_ratio.exp()
    return (_sum(log_ratio, targets) / targets.lengths.clamp(min=1)).exp()[targets.sequence]


def _sum(values: Tensor, targets: PolicyTargets) -> Tensor:
    """Sum `[S]` of `values` `[M]` over each completion, in the same order always."""
    return torch.segment_reduce(values, "sum", lengths=targets.lengths, unsafe=True, initial=0)  # unsafe: no wait


def _surrogate(logprob: Tensor, ratio: Tensor, advantage: Tensor, objective: PolicyObjective) -> Tensor:
    """Each token's loss `[M]`."""
    if objective.loss_type == "cispo":
        return -ratio.detach().clamp(max=objective.upper) * advantage * logprob
    if objective.loss_type == "sapo":
        positive, negative = objective.sapo_temperature_pos, objective.sapo_temperature_neg
        tau = torch.full_like(advantage, negative).masked_fill(advantage > 0, positive)
        return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage
    clipped = ratio.clamp(1 - objective.epsilon, 1 + objective.upper)
    bounded = ratio if objective.delta is None else ratio.clamp(max=objective.delta)
    return -torch.min(bounded * advantage, clipped * advantage)


def _kl(logprob: Tensor, ratio: Tensor, targets: PolicyTargets, objective: PolicyObjective) -> Tensor:
    """The estimate of each token's KL divergence `[M]`."""
    if targets.ref_logprob is None:
        raise ValueError(f"policy_loss: beta {objective.beta:g} needs the log-probabilities of a reference policy")
    d = targets.ref_logprob - logprob
    if objective.kl_estimator == "k1":
        kl = -d
    elif objective.kl_estimator == "k2":
        kl = d.square() / 2
    else:
        kl = d.exp() - d - 1
    return kl * ratio if objective.use_bias_correction_kl else kl


def _mean_entropy(entropy: Tensor, targets: PolicyTargets, counts: PolicyCounts) -> Tensor:
    if targets.kept is None:
        return entropy.sum() / max(counts.tokens, 1)
    assert counts.kept_tokens is not None
    return (entropy * targets.kept).sum() / max(counts.kept_tokens, 1)


def _clip_metrics(
    ratio: Tensor, targets: PolicyTargets, counts: PolicyCounts, objective: PolicyObjective
) -> dict[str, Tensor]:
    """How many tokens (or completions, where the ratio is theirs) lie beyond the clip."""
    if objective.loss_type == "sapo":
        return {}
    if objective.importance_sampling_level == "token":
        weight: Tensor | float = 1.0 / max(counts.tokens, 1)
    else:
        weight = (1.0 / targets.lengths.clamp(min=1) / counts.sequences)[targets.sequence]

    def share(condition: Tensor) -> Tensor:
        return (condition * weight).sum()

    if objective.loss_type == "cispo":
        return {"cispo_clip_ratio": share((ratio > objective.upper) & (targets.advantage > 0))}
    if objective.delta is not None:
        ratio = ratio.clamp(max=objective.delta)
    low = (ratio < 1 - objective.epsilon) & (targets.advantage < 0)
    high = (ratio > 1 + objective.upper) & (targets.advantage > 0)
    names = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
    return {name: share(condition) for name, condition in zip(names, (low, high, low | high), strict=True)}


def importance_weight(
    old_logprob: Tensor,
    sampling_logprob: Tensor,
    targets: PolicyTargets,
    *,
    mode: str = "sequence_mask",
    clip_max: float | None = 3.0,
    clip_min: float | None = None,
) -> Tensor:
    """Truncated importance ratio `[M]` between the trainer's and the sampler's log-probabilities, without gradient.

    rho = exp(old - sampling), of a token or, in the sequence modes, the product over its completion. The truncate
    modes clip rho to [clip_min, clip_max], the mask modes put 0 in place of what lies outside.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in CORRECTIONS:
        raise ValueError(f"importance_weight: mode must be one of {', '.join(CORRECTIONS)}; got {mode!r}")
    difference = (old_logprob - sampling_logprob).nan_to_num(0.0)
    if mode.startswith("sequence"):
        difference = _sum(difference, targets)[targets.sequence]
    rho = difference.exp()
    low = float("-inf") if clip_min is None else clip_min
    high = float("inf") if clip_max is None else clip_max
    if mode.endswith("truncate"):
        return rho.clamp(low, high)
    return rho.masked_fill((rho < low) | (rho > high), 0.0)


def high_entropy(entropy: Tensor, quantile: float) -> Tensor:
    """bool `[M]`: the share `quantile` of a step's tokens whose entropy is highest."""
    if not 0 <= quantile <= 1:
        raise ValueError(f"top_entropy_quantile must be from 0 to 1, got {quantile:g}")
    if not len(entropy):
        return torch.empty(0, dtype=torch.bool, device=entropy.device)
    ascending = entropy.float().sort().values  # as torch.quantile, which takes no more than 2^24 values
    rank = (1 - quantile) * (len(ascending) - 1)
    below = int(rank)
    above = min(below + 1, len(ascending) - 1)
    return entropy >= torch.lerp(ascending[below], ascending[above], rank - below)
