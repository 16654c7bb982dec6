"""The policy objectives against their closed forms; against TRL in tests/train/test_grpo_trl_parity.py."""

import math

import pytest
import torch

from posttrain.objectives.policy import (
    LOSSES,
    PolicyCounts,
    PolicyObjective,
    PolicyTargets,
    high_entropy,
    importance_weight,
    policy_loss,
)
from posttrain.ops.logprob import TokenLogprobs

LENGTHS = [3, 1, 4]
SEQUENCE = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
COUNTS = PolicyCounts(sequences=4, tokens=8, mean_tokens=10.0)  # one more completion, without loss tokens


def random(seed: int, *, requires_grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (-2 * torch.rand(8, generator=generator, dtype=torch.float64)).requires_grad_(requires_grad)


def policy(logprob: torch.Tensor, entropy: torch.Tensor | None = None) -> TokenLogprobs:
    wide = torch.zeros_like(logprob)
    return TokenLogprobs(logprob, 1 - logprob.detach() if entropy is None else entropy, wide, wide.bool())


def targets(advantage: list[float], **known) -> PolicyTargets:
    tensor = torch.tensor(advantage, dtype=torch.float64)
    return PolicyTargets(SEQUENCE, torch.tensor(LENGTHS), tensor[SEQUENCE], **known)


def gradient(known: PolicyTargets, **coefficients) -> torch.Tensor:
    logprob = random(0, requires_grad=True)
    policy_loss(policy(logprob), known, COUNTS, PolicyObjective(**coefficients)).value.backward()
    return logprob.grad


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_no_advantage_no_gradient(loss_type, level):
    known = targets([0, 0, 0], old_logprob=random(1))
    assert torch.equal(
        gradient(known, loss_type=loss_type, importance_sampling_level=level), torch.zeros(8, dtype=torch.float64)
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_on_policy_it_is_the_policy_gradient(loss_type, level):
    """Each token's gradient is minus its advantage, times the weight that the loss type gives it."""
    found = gradient(targets([1.0, -2.0, 0.5]), loss_type=loss_type, importance_sampling_level=level, epsilon_high=1.0)
    advantage = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[SEQUENCE]
    weight = {
        "grpo": 1 / (4 * torch.tensor(LENGTHS, dtype=torch.float64)[SEQUENCE]),
        "sapo": 1 / (4 * torch.tensor(LENGTHS, dtype=torch.float64)[SEQUENCE]),
        "dr_grpo": torch.full((8,), 1 / (4 * 512), dtype=torch.float64),
        "bnpo": torch.full((8,), 1 / 8, dtype=torch.float64),
        "dapo": torch.full((8,), 1 / 10, dtype=torch.float64),
        "cispo": torch.full((8,), 1 / 10, dtype=torch.float64),
    }[loss_type]
    torch.testing.assert_close(found, -advantage * weight, rtol=1e-7, atol=0)  # lengths divide in float32


def single(ratio: float, advantage: float, **coefficients) -> tuple[float, float]:
    """Loss and gradient of one token whose ratio is `ratio`."""
    logprob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    known = PolicyTargets(zero.long(), zero.long() + 1, zero + advantage, old_logprob=zero)
    loss = policy_loss(policy(logprob), known, PolicyCounts(1, 1, 1.0), PolicyObjective(**coefficients)).value
    loss.backward()
    assert logprob.grad is not None
    return loss.item(), logprob.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "coefficients", "expected"),
    [
        (1.1, 2.0, {}, (-2.2, -2.2)),
        (1.5, 2.0, {}, (-2.4, 0.0)),  # clipped above
        (1.5, -2.0, {}, (3.0, 3.0)),
        (0.5, 2.0, {}, (-1.0, -1.0)),
        (0.5, -2.0, {}, (1.6, 0.0)),  # clipped below
        (1.5, 2.0, {"epsilon_high": 0.6}, (-3.0, -3.0)),
        (9.0, -2.0, {"delta": 4.0}, (8.0, 0.0)),  # two-sided
        (3.0, -2.0, {"delta": 4.0}, (6.0, 6.0)),
        (3.0, 2.0, {"loss_type": "cispo", "epsilon_high": 5.0}, (-6.0 * math.log(3), -6.0)),
        (9.0, 2.0, {"loss_type": "cispo", "epsilon_high": 5.0}, (-10.0 * math.log(9), -10.0)),
    ],
)
def test_clip(ratio, advantage, coefficients, expected):
    assert single(ratio, advantage, **coefficients) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 1.0), (-2.0, 1.05)])
def test_sapo_gate(advantage, tau):
    gate = 1 / (1 + math.exp(-tau * 0.5))
    expected = (-4 / tau * gate * advantage, -4 * gate * (1 - gate) * 1.5 * advantage)
    assert single(1.5, advantage, loss_type="sapo") == pytest.approx(expected, rel=1e-12)


def test_sequence_ratio_is_the_geometric_mean():
    logprob, old = random(0), random(1)
    known = targets([1.0, 1.0, 1.0], old_logprob=old)
    objective = PolicyObjective("bnpo", importance_sampling_level="sequence", epsilon=100.0)
    found = policy_loss(policy(logprob), known, COUNTS, objective).value
    means = [part.mean() for part in (logprob - old).split(LENGTHS)]
    assert found.item() == pytest.approx(-sum(n * math.exp(m) for n, m in zip(LENGTHS, means, strict=True)) / 8)


@pytest.mark.parametrize(("estimator", "value"), [("k1", 0.3), ("k2", 0.045), ("k3", math.exp(-0.3) + 0.3 - 1)])
def test_kl_of_one_token(estimator, value):
    logprob = torch.tensor([-1.0], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.int64)
    known = PolicyTargets(one - 1, one, torch.zeros(1), ref_logprob=logprob - 0.3)
    objective = PolicyObjective(beta=0.1, kl_estimator=estimator, use_bias_correction_kl=False)
    loss = policy_loss(policy(logprob), known, PolicyCounts(1, 1, 1.0), objective)
    assert loss.value.item() == pytest.approx(0.1 * value)
    assert loss.metrics["kl"].item() == pytest.approx(value)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_corrected_kl_has_the_gradient_of_the_exact_one(estimator):
    """Every token of the vocabulary once, weighted by its probability: the expectation is exact."""
    torch.manual_seed(0)
    logits, reference = torch.randn(7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64)
    log_p, log_q = logits.log_softmax(0), reference.log_softmax(0)
    exact = (log_p.exp() * (log_p - log_q)).sum()
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    objective = PolicyObjective("bnpo", beta=1.0, kl_estimator=estimator)
    one = torch.ones(1, dtype=torch.int64)
    values = []
    for i in range(7):
        known = PolicyTargets(one - 1, one, torch.zeros(1), ref_logprob=log_q[i : i + 1])
        values.append(policy_loss(policy(log_p[i : i + 1]), known, PolicyCounts(1, 1, 1.0), objective).value)
    probability = log_p.detach().exp()
    expectation = sum(p * value for p, value in zip(probability, values, strict=True))
    assert expectation.item() == pytest.approx(exact.item())
    torch.testing.assert_close(torch.autograd.grad(expectation, logits)[0], expected)


def test_entropy_bonus_is_the_mean_over_tokens_that_count():
    entropy = (1 - random(3)).requires_grad_()
    kept = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0]).bool()
    objective = PolicyObjective(entropy_coef=0.5)
    known = targets([0, 0, 0], kept=kept)
    counts = COUNTS._replace(kept_tokens=4)
    value = policy_loss(policy(random(0), entropy), known, counts, objective).value
    assert value.item() == pytest.approx(-0.5 * entropy[kept].mean().item())
    value = policy_loss(policy(random(0), entropy), targets([0, 0, 0]), COUNTS, objective).value
    assert value.item() == pytest.approx(-0.5 * entropy.mean().item())


def test_weights_and_dropped_tokens():
    weight, kept = 1 - random(4), torch.tensor([1, 0, 1, 1, 0, 0, 1, 0]).bool()
    found = gradient(targets([1.0, 1.0, 1.0], weight=weight, kept=kept))
    torch.testing.assert_close(found, -weight * kept / 10)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_shares_of_micro_batches_add_up(loss_type, level):
    known = targets([1.0, -2.0, 0.5], old_logprob=random(1), ref_logprob=random(2), sampling_logprob=random(5))
    objective = PolicyObjective(loss_type, beta=0.1, entropy_coef=0.1, importance_sampling_level=level)
    whole = policy_loss(policy(random(0)), known, COUNTS, objective)
    parts = []
    for first, last, sequences in ((0, 4, slice(0, 2)), (4, 8, slice(2, 3))):
        fields = {name: value[first:last] for name, value in vars(known).items() if value is not None}
        fields |= {"sequence": SEQUENCE[first:last] - SEQUENCE[first], "lengths": known.lengths[sequences]}
        parts.append(policy_loss(policy(random(0)[first:last]), PolicyTargets(**fields), COUNTS, objective))
    torch.testing.assert_close(sum(part.value for part in parts), whole.value)
    for name, value in whole.metrics.items():
        join = max if name.endswith("/max") else sum
        torch.testing.assert_close(join(part.metrics[name] for part in parts), value, msg=name)


def test_clip_metrics():
    logprob = torch.log(torch.tensor([0.5, 1.0, 1.5, 1.5, 0.5, 0.5, 1.0, 1.5], dtype=torch.float64))
    known = targets([1.0, 1.0, -1.0], old_logprob=torch.zeros(8, dtype=torch.float64))
    metrics = policy_loss(policy(logprob), known, COUNTS, PolicyObjective()).metrics
    names = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
    assert [metrics[name].item() for name in names] == pytest.approx([2 / 8, 2 / 8, 4 / 8])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [2.0, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.5]),
        ("token_mask", [0.0, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.0]),
        ("sequence_truncate", [2.0] * 3 + [1.0] + [0.5] * 4),
        ("sequence_mask", [0.0] * 3 + [1.0] + [0.0] * 4),
    ],
)
def test_importance_weight(mode, expected):
    rho = torch.tensor([4.0, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.25], dtype=torch.float64)
    found = importance_weight(
        rho.log(), torch.zeros(8, dtype=torch.float64), targets([0, 0, 0]), mode=mode, clip_max=2.0, clip_min=0.5
    )
    assert found.tolist() == pytest.approx(expected)


def test_an_unknown_sampling_logprob_corrects_nothing():
    sampling = torch.full((8,), math.nan, dtype=torch.float64)
    assert importance_weight(random(0), sampling, targets([0, 0, 0])).tolist() == [1.0] * 8


def test_high_entropy_keeps_the_top_share():
    entropy = torch.tensor([5.0, 1, 4, 2, 3])
    assert high_entropy(entropy, 0.5).tolist() == [True, False, True, False, True]
    assert high_entropy(entropy, 0.0).tolist() == [True, False, False, False, False]
    assert high_entropy(entropy, 1.0).all()
    assert high_entropy(entropy[:0], 0.2).shape == (0,)


@pytest.mark.parametrize("quantile", [0.0, 0.13, 0.2, 0.5, 0.7, 0.8, 1.0])
def test_high_entropy_is_beyond_the_quantile(quantile):
    entropy = torch.rand(211, generator=torch.Generator().manual_seed(0))
    assert torch.equal(high_entropy(entropy, quantile), entropy >= torch.quantile(entropy, 1 - quantile))


def test_high_entropy_has_no_limit_of_tokens():
    entropy = torch.zeros(2**24 + 2)
    entropy[-1] = 1
    assert high_entropy(entropy, 0.0).sum() == 1


def test_metrics_carry_no_gradient():
    logprob = random(0, requires_grad=True)
    known = targets([1.0, 1.0, 1.0], ref_logprob=random(1), sampling_logprob=random(2))
    loss = policy_loss(policy(logprob, -logprob), known, COUNTS, PolicyObjective(beta=0.1))
    assert loss.value.requires_grad and not any(metric.requires_grad for metric in loss.metrics.values())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss_type", "ppo"),
        ("importance_sampling_level", "turn"),
        ("kl_estimator", "k4"),
        ("epsilon", -0.1),
        ("delta", -1.0),
        ("sapo_temperature_neg", 0.0),
        ("max_completion_length", 0),
    ],
)
def test_refuses_coefficients(field, value):
    with pytest.raises(ValueError, match=f"{field} must be"):
        PolicyObjective(**{field: value})


def test_refuses_a_missing_reference_and_entropy():
    with pytest.raises(ValueError, match=r"beta 0\.1 needs .* reference"):
        policy_loss(policy(random(0)), targets([0, 0, 0]), COUNTS, PolicyObjective(beta=0.1))
    exact = PolicyObjective(beta=0.1, kl_estimator="exact")
    with pytest.raises(ValueError, match="needs the divergence"):
        policy_loss(policy(random(0)), targets([0, 0, 0]), COUNTS, exact)
    known = policy_loss(policy(random(0)), targets([0, 0, 0]), COUNTS, exact, random(1))
    assert known.value.item() == pytest.approx(0.1 * random(1).sum().item() / 10)
    with pytest.raises(ValueError, match="need_entropy"):
        policy_loss(policy(random(0))._replace(entropy=None), targets([0, 0, 0]), COUNTS, PolicyObjective())
    with pytest.raises(ValueError, match="got 'turn_mask'"):
        importance_weight(random(0), random(1), targets([0, 0, 0]), mode="turn_mask")
    with pytest.raises(ValueError, match=r"got 1\.5"):
        high_entropy(random(0), 1.5)
