r"""Preference optimisation: losses of pairs of answers, as functions of four summed log-probabilities each.

For a prompt with a chosen answer c and a rejected one r, and with log pi and log ref the sums of the log-probabilities
of an answer's tokens under the policy and the reference, the log-ratios are

    u_c = log pi(c) - log ref(c),    u_r = log pi(r) - log ref(r)

An f-divergence other than the reverse KL makes scores s = f'(e^u) of them (Wang et al., "Beyond Reverse KL",
arXiv 2309.16240); in reverse KL s = u:

    forward_kl          s = 1 - e^-u
    js_divergence       s = log 2 + log sigmoid(u)
    alpha_divergence    s = (e^((a - 1) u) - 1) / (a - 1)        u itself for a = 1

With d = s_c - s_r, |c| and |r| numbers of tokens, eps the label smoothing and S = log sigmoid, the losses of a pair:

    sigmoid         -S(beta d)                                                  DPO, Rafailov et al., 2305.18290
    sigmoid_norm    -S(beta (s_c / |c| - s_r / |r|))                            the same per token
    ipo             (s_c / |c| - s_r / |r| - 1 / (2 beta))^2                    Azar et al., 2310.12036, eq. 17
    hinge           max(0, 1 - beta d)                                          SLiC, Zhao et al., 2305.10425
    robust          ((eps - 1) S(beta d) + eps S(-beta d)) / (1 - 2 eps)        Chowdhury et al., 2403.00409
    exo_pair        KL((sigmoid(beta d), sigmoid(-beta d)) || (1 - eps, eps))   Ji et al., 2402.00856, eq. 16
    nca_pair        -S(beta u_c) - S(-beta u_c) / 2 - S(-beta u_r) / 2          Chen et al., 2402.05369
    bco_pair        -S(beta u_c) - S(-beta u_r)                                 Jung et al., 2404.04656, with delta = 0
    sppo_hard       (u_c - 1 / (2 beta))^2 + (u_r + 1 / (2 beta))^2             Wu et al., 2405.00675, P in {0, 1}
    aot             g(sorted(log pi(c) - log pi(r)) - sorted(the same of ref))  Melnyk et al., 2406.05882
    aot_unpaired    g(sorted(u_c) - sorted(u_r)),  g(t) = (eps - 1) S(beta t) - eps S(-beta t)
    apo_zero        1 - sigmoid(beta u_c) + sigmoid(beta u_r)                   D'Oosterlinck et al., 2408.06266, eq. 7
    apo_down        sigmoid(beta u_c) + 1 - sigmoid(beta (u_c - u_r))           the same, eq. 8
    discopop        -(1 - m) S(beta d) + m e^(-beta d),  m = sigmoid(beta d / tau)    Lu et al., 2406.08414, eq. 5
    sft             -log pi(c), over the chosen tokens of the step in place of its pairs

as in TRL 1.16, whose names these are. The loss of a step is the mean over its pairs, and with several losses their sum
by weight (Wang et al., "Mixed Preference Optimization", 2411.10442).

aot and aot_unpaired couple the pairs: they match log-ratios of the same rank, over the whole optimizer step (TRL: over
a batch of it). A micro-batch is given all the step's pairs, without gradient, to find the partners of its own. Of
aot_unpaired's term between a chosen and a rejected log-ratio from different micro-batches each of the two then gives
its own gradient and half of the value.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.objectives.loss import Loss

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
DIVERGENCE_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""The losses in which the prompt's term of an f-divergence cancels: the only ones defined for any of them."""

COUPLED_LOSSES = ("aot", "aot_unpaired")
"""The losses that a pair has only together with the others of its step."""


class Pairs(NamedTuple):
    """P pairs; in each row first the chosen answer, then the rejected one.

    Attributes:
        policy: `[P, 2]`, log-probabilities under the policy, summed over an answer's tokens by `sum_answers`.
        reference: `[P, 2]`, the same under the reference.
        lengths: `[P, 2]`, tokens of the answers.
        chosen: `[P]`, log-probabilities of the chosen answers with every token counted in full, for `sft`.
    """

    policy: Tensor
    reference: Tensor
    lengths: Tensor
    chosen: Tensor


class Preference(NamedTuple):
    """The coefficients of the losses, named as in TRL's DPOConfig; the module says what they do."""

    loss_type: Sequence[str] = ("sigmoid",)
    loss_weights: Sequence[float] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05


def sum_answers(logprob: Tensor, lengths: Tensor, longest: int, ld_alpha: float | None = None) -> Tensor:
    """Log-probabilities of answers from those of their tokens.

    Args:
        logprob: `[M]`; the tokens of the chosen and the rejected answer of pair 0, then those of pair 1, and so on.
        lengths: int64 `[P, 2]`, tokens of the answers; they add up to M.
        longest: a number that none of `lengths` exceeds; on the host, so nothing waits for the device.
        ld_alpha: tokens of an answer beyond the length of its pair's shorter one count with this weight: LD-DPO
            (Liu et al., "Length Desensitization in Direct Preference Optimization", 2409.06411). None: with weight 1.

    Returns:
        float64 `[P, 2]`; sums of hundreds of nats, of which the losses need small differences.
    """
    sizes = lengths.flatten()
    answer = torch.repeat_interleave(sizes, output_size=len(logprob))
    place = torch.arange(len(logprob), device=logprob.device) - (sizes.cumsum(0) - sizes)[answer]
    padded = logprob.new_zeros(len(sizes), longest, dtype=torch.float64)
    padded = padded.index_put((answer, place), logprob.double())  # no two at one place: the same bits on every run
    if ld_alpha is None:
        return padded.sum(1).view_as(lengths)
    shared = lengths.amin(1, keepdim=True).expand_as(lengths).reshape(-1, 1)
    beyond = torch.arange(longest, device=logprob.device) >= shared
    return torch.where(beyond, ld_alpha * padded, padded).sum(1).view_as(lengths)


def within_perplexity(logprobs: Tensor, lengths: Tensor, limit: float) -> Tensor:
    """Which pairs have no answer of a perplexity above `limit`, as bool `[P]`.

    The perplexity exp(-log p(y) / |y|) is under the reference: what that finds strange is outside the data it learned
    from, where the log-ratios of DPO mean little (Kumar et al., "LLM Post-Training", 2502.21321, on filtering).

    Args:
        logprobs: `[P, 2]`, summed over the tokens of an answer.
        lengths: `[P, 2]`, tokens of the answers.
        limit: most perplexity an answer may have.
    """
    return (-logprobs / lengths).amax(1).exp() <= limit


def preference_loss(
    pairs: Pairs,
    num_pairs: int,
    num_chosen_tokens: int,
    coefficients: Preference,
    *,
    step: Pairs | None = None,
    numbers: Tensor | None = None,
) -> Loss:
    """Share of this micro-batch in the step's preference loss.

    Args:
        pairs: of this micro-batch; only `policy` and `chosen` get a gradient.
        num_pairs: pairs of the whole optimizer step.
        num_chosen_tokens: tokens of the chosen answers of the whole step.
        coefficients: which losses, and their numbers.
        step: all pairs of the step, without gradient, for coupled losses; None: `pairs` are all.
        numbers: int64 `[P]`, which of `step` are those of this micro-batch.

    Returns:
        The loss, with metrics `loss`; of the rewards beta u: `rewards/chosen`, `rewards/rejected`,
        `rewards/accuracies` (share of pairs in which the chosen one's is higher) and `rewards/margins`; and
        `logps/chosen`, `logps/rejected`.

    Raises:
        ValueError: an unknown loss or divergence, or numbers with which it isn't defined.
    """
    check(coefficients)
    if num_pairs < 1:
        raise ValueError(f"preference_loss: the step must have at least one pair, got {num_pairs}")
    weights = coefficients.loss_weights or [1.0] * len(coefficients.loss_type)
    terms = _Terms.of(pairs, coefficients)
    every = terms if step is None else _Terms.of(step, coefficients)
    mine = torch.arange(len(terms.u_c), device=terms.u_c.device) if numbers is None else numbers
    value = pairs.policy.new_zeros(())
    for name, weight in zip(coefficients.loss_type, weights, strict=True):
        if name == "sft":
            value = value - weight * pairs.chosen.sum() / num_chosen_tokens
        elif name in COUPLED_LOSSES:
            value = value + weight * _COUPLED[name](terms, every, mine).sum() / num_pairs
        else:
            value = value + weight * _LOSSES[name](terms).sum() / num_pairs
    return Loss(value, {"loss": value.detach()} | _metrics(pairs, coefficients.beta, num_pairs))


def check(coefficients: Preference) -> None:
    """Raise `ValueError` if the coefficients make no loss."""
    c = coefficients
    known = (*_LOSSES, *COUPLED_LOSSES, "sft")
    for name in c.loss_type:
        if name not in known:
            raise ValueError(f"loss_type must be one of {', '.join(known)}; got {name!r}")
        if c.f_divergence_type != "reverse_kl" and name not in DIVERGENCE_LOSSES:
            raise ValueError(
                f"f_divergence_type {c.f_divergence_type} goes with {', '.join(DIVERGENCE_LOSSES)}, not with {name}"
            )
    if not c.loss_type:
        raise ValueError("loss_type is empty")
    if c.loss_weights is not None and len(c.loss_weights) != len(c.loss_type):
        raise ValueError(f"loss_weights has {len(c.loss_weights)} numbers for {len(c.loss_type)} of loss_type")
    if c.f_divergence_type not in DIVERGENCES:
        raise ValueError(f"f_divergence_type must be one of {', '.join(DIVERGENCES)}; got {c.f_divergence_type!r}")
    if not 0 <= c.label_smoothing < 1 or ("robust" in c.loss_type and c.label_smoothing >= 0.5):
        raise ValueError(f"label_smoothing must be from 0 to 1 (robust: below 0.5), got {c.label_smoothing:g}")
    if "exo_pair" in c.loss_type and c.label_smoothing == 0:
        raise ValueError("label_smoothing must be above 0 for exo_pair (its paper: 1e-3), got 0")
    if c.beta <= 0 and set(c.loss_type) & {"ipo", "sppo_hard"}:
        raise ValueError(f"beta must be above 0 for ipo and sppo_hard, which divide by it; got {c.beta:g}")


class _Terms(NamedTuple):
    """What the losses are made of, `[P]` each; u, s and d as in the module's formulas."""

    pairs: Pairs
    u_c: Tensor
    u_r: Tensor
    s_c: Tensor
    s_r: Tensor
    c: Preference

    @staticmethod
    def of(pairs: Pairs, coefficients: Preference) -> "_Terms":
        ratios = pairs.policy - pairs.reference
        scores = _scores(ratios, coefficients)
        return _Terms(pairs, ratios[:, 0], ratios[:, 1], scores[:, 0], scores[:, 1], coefficients)

    @property
    def d(self) -> Tensor:
        return self.s_c - self.s_r

    @property
    def per_token(self) -> Tensor:
        """s_c / |c| - s_r / |r|."""
        return self.s_c / self.pairs.lengths[:, 0] - self.s_r / self.pairs.lengths[:, 1]


def _scores(u: Tensor, c: Preference) -> Tensor:
    if c.f_divergence_type == "forward_kl":
        return 1 - torch.exp(-u)
    if c.f_divergence_type == "js_divergence":
        return math.log(2) + logsigmoid(u)
    power = c.f_alpha_divergence_coef - 1
    if c.f_divergence_type == "alpha_divergence" and abs(power) >= 1e-6:
        return torch.expm1((power * u).clamp(max=80)) / power  # 80: TRL's bound, e^80 is a float32
    return u


def _robust(t: _Terms) -> Tensor:
    eps = t.c.label_smoothing
    return ((eps - 1) * logsigmoid(t.c.beta * t.d) + eps * logsigmoid(-t.c.beta * t.d)) / (1 - 2 * eps)


def _exo_pair(t: _Terms) -> Tensor:
    log_q, log_not_q = logsigmoid(t.c.beta * t.d), logsigmoid(-t.c.beta * t.d)
    log_p, log_not_p = math.log1p(-t.c.label_smoothing), math.log(t.c.label_smoothing)
    return log_q.exp() * (log_q - log_p) + log_not_q.exp() * (log_not_q - log_not_p)


def _nca_pair(t: _Terms) -> Tensor:
    chosen, rejected = t.c.beta * t.u_c, t.c.beta * t.u_r
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _discopop(t: _Terms) -> Tensor:
    z = t.c.beta * t.d
    modulation = torch.sigmoid(z / t.c.discopop_tau)
    return -(1 - modulation) * logsigmoid(z) + modulation * torch.exp(-z)


_LOSSES: dict[str, Callable[[_Terms], Tensor]] = {
    "sigmoid": lambda t: -logsigmoid(t.c.beta * t.d),
    "sigmoid_norm": lambda t: -logsigmoid(t.c.beta * t.per_token),
    "ipo": lambda t: (t.per_token - 0.5 / t.c.beta) ** 2,
    "hinge": lambda t: torch.relu(1 - t.c.beta * t.d),
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": lambda t: -logsigmoid(t.c.beta * t.u_c) - logsigmoid(-t.c.beta * t.u_r),
    "sppo_hard": lambda t: (t.u_c - 0.5 / t.c.beta) ** 2 + (t.u_r + 0.5 / t.c.beta) ** 2,
    "apo_zero": lambda t: 1 - torch.sigmoid(t.c.beta * t.u_c) + torch.sigmoid(t.c.beta * t.u_r),
    "apo_down": lambda t: torch.sigmoid(t.c.beta * t.u_c) + 1 - torch.sigmoid(t.c.beta * (t.u_c - t.u_r)),
    "discopop": _discopop,
}


def _aot(t: _Terms, every: _Terms, mine: Tensor) -> Tensor:
    policy, reference = ((x[:, 0] - x[:, 1]) for x in (every.pairs.policy, every.pairs.reference))
    partners = _of_same_rank(policy, reference)[mine]
    return _smoothed(t.pairs.policy[:, 0] - t.pairs.policy[:, 1] - partners, t.c)


def _aot_unpaired(t: _Terms, every: _Terms, mine: Tensor) -> Tensor:
    of_chosen = _smoothed(t.u_c - _of_same_rank(every.u_c, every.u_r).detach()[mine], t.c)
    of_rejected = _smoothed(_of_same_rank(every.u_r, every.u_c).detach()[mine] - t.u_r, t.c)
    both = of_chosen + of_rejected
    return both - 0.5 * both.detach()


_COUPLED = {"aot": _aot, "aot_unpaired": _aot_unpaired}


def _smoothed(t: Tensor, c: Preference) -> Tensor:
    eps = c.label_smoothing
    return (eps - 1) * logsigmoid(c.beta * t) - eps * logsigmoid(-c.beta * t)


def _of_same_rank(values: Tensor, others: Tensor) -> Tensor:
    """For each of `values` `[P]` the one of `others` `[P]` that has its rank."""
    return others.sort().values[values.argsort(stable=True).argsort()]


def _metrics(pairs: Pairs, beta: float, num_pairs: int) -> dict[str, Tensor]:
    policy = pairs.policy.detach()
    chosen, rejected = (beta * (policy - pairs.reference)).unbind(1)
    found = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).double(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": policy[:, 0],
        "logps/rejected": policy[:, 1],
    }
    return {name: value.sum() / num_pairs for name, value in found.items()}
