"""Preference losses: closed forms, TRL's own code on the same numbers, and independence of how a step is divided."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from posttrain.objectives import Pairs, Preference, preference_loss, sum_answers
from posttrain.objectives.preference import DIVERGENCE_LOSSES, within_perplexity
from posttrain.train.dpo_config import DIVERGENCES, LOSSES

EQUAL_AT_REFERENCE = {
    "sigmoid": math.log(2),
    "sigmoid_norm": math.log(2),
    "hinge": 1,
    "ipo": 25,
    "robust": math.log(2),
    "exo_pair": math.log(0.5) - 0.5 * math.log(0.1 * 0.9),
    "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 50,
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "apo_zero": 1,
    "apo_down": 1,
    "discopop": 0.5 * math.log(2) + 0.5,
    "sft": 7 / 3,
}


def pairs_of(policy: list, reference: list, lengths: list | None = None) -> Pairs:
    policy, reference = (torch.tensor(x, dtype=torch.float64) for x in (policy, reference))
    lengths = torch.full_like(policy, 3, dtype=torch.int64) if lengths is None else torch.tensor(lengths)
    return Pairs(policy, reference, lengths, policy[:, 0])


def value(pairs: Pairs, **coefficients) -> float:
    return preference_loss(pairs, len(pairs.policy), int(pairs.lengths[:, 0].sum()), Preference(**coefficients)).value


@pytest.mark.parametrize("name", LOSSES)
def test_policy_at_reference(name):
    same = [[-7.0, -9.5], [-7.0, -2.0]]
    found = value(pairs_of(same, same), loss_type=[name], label_smoothing=0.1)
    assert abs(found.item() - EQUAL_AT_REFERENCE[name]) <= 1e-7


def test_a_known_example():
    pairs = pairs_of([[-0.5, -0.1], [-10, -30], [-1, -21]], [[-0.5, -0.1], [-10.1, -20.1], [-0.1, -0.1]])
    found = [value(Pairs(*(x[i : i + 1] for x in pairs))).item() for i in range(3)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor([0.6931, 0.3133, 0.1269]), atol=5e-5, rtol=0)
    loss = preference_loss(pairs, 3, 9, Preference())
    assert loss.value.item() == pytest.approx(sum(found) / 3)
    rewards = torch.tensor([[0.0, 0.0], [0.01, -0.99], [-0.09, -2.09]], dtype=torch.float64)
    wanted = {
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/accuracies": 2 / 3,
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean(),
        "logps/chosen": -11.5 / 3,
        "logps/rejected": -51.1 / 3,
    }
    for name, number in wanted.items():
        assert float(loss.metrics[name]) == pytest.approx(float(number)), name


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name):
    policy = torch.tensor([[-7.0, -9.5], [-3.0, -2.0], [-4.0, -4.5]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-7.3, -9.0], [-4.0, -2.1], [-4.4, -6.0]], dtype=torch.float64)
    lengths = torch.tensor([[3, 5], [2, 2], [4, 1]])
    half_value = name == "aot_unpaired"  # gradcheck sees the value's own numbers, of which half are held fixed

    def loss(policy: Tensor) -> Tensor:
        coefficients = Preference([name], label_smoothing=0.1, beta=0.5)
        return preference_loss(Pairs(policy, reference, lengths, policy[:, 0]), 3, 9, coefficients).value

    if half_value:
        direct = unpaired_directly(policy, reference)
        torch.testing.assert_close(loss(policy), direct)
        found, wanted = (torch.autograd.grad(x, policy)[0] for x in (loss(policy), direct))
        torch.testing.assert_close(found, wanted)
    else:
        assert torch.autograd.gradcheck(loss, [policy], eps=1e-6, atol=1e-8, rtol=1e-6)


def unpaired_directly(policy: Tensor, reference: Tensor) -> Tensor:
    chosen, rejected = (policy - reference).unbind(1)
    z = 0.5 * (chosen.sort().values - rejected.sort().values)
    logsigmoid = torch.nn.functional.logsigmoid
    return (-0.9 * logsigmoid(z) - 0.1 * logsigmoid(-z)).mean()


CASES = [
    *({"loss_type": [name], "label_smoothing": 0.2} for name in LOSSES),
    *({"loss_type": [name], "f_divergence_type": "js_divergence"} for name in DIVERGENCE_LOSSES if name != "exo_pair"),
    *({"f_divergence_type": divergence} for divergence in DIVERGENCES),
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    *({"loss_type": [name], "ld_alpha": 0.3} for name in ("sigmoid", "ipo", "aot", "sft")),
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.3},
    {"loss_type": ["discopop"], "discopop_tau": 0.5, "beta": 1.0},
]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part) for part in case.values()))
def test_values_metrics_and_gradients_are_those_of_trl(case):
    lengths = torch.tensor([[3, 5], [4, 2], [6, 6], [1, 3]])
    generator = torch.Generator().manual_seed(1)
    policy, reference = (-4 * torch.rand(int(lengths.sum()), generator=generator) for _ in range(2))
    mine = policy.clone().requires_grad_()
    settings = dict(case)
    ld_alpha = settings.pop("ld_alpha", None)
    answers = [sum_answers(x, lengths, 6, ld_alpha) for x in (mine, reference)]
    pairs = Pairs(*answers, lengths, sum_answers(mine, lengths, 6)[:, 0])
    found = preference_loss(pairs, 4, int(lengths[:, 0].sum()), Preference(**settings))
    found.value.backward()
    their_leaf = policy.clone().requires_grad_()
    wanted, metrics = loss_of_trl(their_leaf, reference, lengths, {"ld_alpha": None, **case})
    wanted.backward()
    torch.testing.assert_close(found.value.float(), wanted)
    torch.testing.assert_close(mine.grad, their_leaf.grad)
    for name, number in found.metrics.items():
        if name != "loss":
            assert float(number) == pytest.approx(metrics[name][0], abs=1e-5), name


def loss_of_trl(policy: Tensor, reference: Tensor, lengths: Tensor, case: dict) -> tuple[Tensor, dict]:
    """TRL's loss and metrics: the method of its trainer, on models that say `policy` and `reference`."""
    trl = pytest.importorskip("trl")
    order = [*range(0, lengths.numel(), 2), *range(1, lengths.numel(), 2)]  # all chosen, then all rejected
    mask = torch.zeros(lengths.numel(), 1 + int(lengths.max()), dtype=torch.int64)  # a prompt of one token

    def padded(logprobs: Tensor) -> Tensor:
        parts = logprobs.split(lengths.flatten().tolist())
        return torch.nn.utils.rnn.pad_sequence([parts[i] for i in order], batch_first=True)

    for row, i in enumerate(order):
        mask[row, 1 : 1 + int(lengths.flatten()[i])] = 1

    def model(logprobs: Tensor):
        said = padded(logprobs)
        rest = {"entropy": said.detach(), "mean_logits": said.detach(), "is_top1": torch.ones_like(said).bool()}
        return lambda **inputs: SimpleNamespace(log_probs=said, **rest)

    trained = torch.nn.Module()
    trained.is_gradient_checkpointing = False
    options = {"loss_type": ["sigmoid"], "loss_weights": None, "label_smoothing": 0.0, **case}
    config = trl.DPOConfig(bf16=False, use_cpu=True, report_to="none", **options)
    trainer = SimpleNamespace(
        model=trained,
        ref_model=model(reference),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=config,
        loss_types=config.loss_type,
        loss_weights=config.loss_weights or [1.0] * len(config.loss_type),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **{
            name: getattr(config, name)
            for name in ("beta", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "label_smoothing")
        },
    )
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": mask, "completion_mask": mask}
    return trl.DPOTrainer._compute_loss(trainer, model(policy), inputs, False), trainer._metrics["train"]


@pytest.mark.parametrize("name", LOSSES)
def test_shares_of_micro_batches_add_up(name):
    generator = torch.Generator().manual_seed(2)
    policy, reference = (-9 * torch.rand(9, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = torch.randint(1, 9, (9, 2), generator=generator)
    coefficients = Preference([name, "sigmoid"], [0.5, 2.0], label_smoothing=0.1)
    num_chosen = int(lengths[:, 0].sum())

    def run(bins: list[list[int]]) -> tuple[Tensor, Tensor]:
        leaf = policy.clone().requires_grad_()
        step = Pairs(policy, reference, lengths, policy[:, 0])
        total = torch.zeros((), dtype=torch.float64)
        for members in bins:
            numbers = torch.tensor(members)
            part = leaf[numbers]
            pairs = Pairs(part, reference[numbers], lengths[numbers], part[:, 0])
            loss = preference_loss(pairs, 9, num_chosen, coefficients, step=step, numbers=numbers)
            loss.value.backward()
            total += loss.metrics["loss"]
        return total, leaf.grad

    whole = run([list(range(9))])
    for bins in ([[0, 1, 2, 3], [4, 5, 6, 7, 8]], [[8, 0], [3, 5, 1], [2], [7, 6, 4]], [[i] for i in range(9)]):
        for found, wanted in zip(run(bins), whole, strict=True):
            torch.testing.assert_close(found, wanted)


def test_sums_of_answers():
    lengths = torch.tensor([[2, 4], [3, 1]])
    logprob = torch.arange(1.0, 11.0)
    assert sum_answers(logprob, lengths, 4).tolist() == [[3, 18], [24, 10]]
    assert sum_answers(logprob, lengths, 7, ld_alpha=0.5).tolist() == [[3, 3 + 4 + 0.5 * (5 + 6)], [7 + 8.5, 10]]
    assert sum_answers(logprob, lengths, 4, ld_alpha=0.0).tolist() == [[3, 7], [7, 10]]
    assert sum_answers(logprob, lengths, 4, ld_alpha=1.0).tolist() == sum_answers(logprob, lengths, 4).tolist()


def test_sums_keep_small_differences_of_long_answers():
    logprob = torch.full((4000,), -3.1)
    lengths = torch.tensor([[2000, 2000]])
    moved = logprob.clone()
    moved[0] += 1e-4
    difference = sum_answers(moved, lengths, 2000) - sum_answers(logprob, lengths, 2000)
    torch.testing.assert_close(difference[0, 0], (moved[0].double() - logprob[0].double()), rtol=1e-6, atol=0)


def test_perplexity():
    logprobs = torch.tensor([[-3.0, -4.0], [-1.0, -9.0], [-9.0, -1.0]], dtype=torch.float64)
    lengths = torch.tensor([[3, 4], [1, 3], [3, 1]])
    assert within_perplexity(logprobs, lengths, 3.0).tolist() == [True, False, False]
    assert within_perplexity(logprobs, lengths, 2.7).tolist() == [False, False, False]
    assert within_perplexity(logprobs, lengths, 21.0).tolist() == [True, True, True]


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ({"loss_type": ["dpo"]}, "loss_type must be one of sigmoid, .*; got 'dpo'"),
        ({"loss_type": []}, "loss_type is empty"),
        ({"loss_weights": [1.0, 2.0]}, "loss_weights has 2 numbers for 1 of loss_type"),
        ({"f_divergence_type": "kl"}, "f_divergence_type must be one of reverse_kl, .*; got 'kl'"),
        ({"f_divergence_type": "forward_kl", "loss_type": ["aot"]}, "forward_kl goes with .* not with aot"),
        ({"loss_type": ["exo_pair"]}, "label_smoothing must be above 0 for exo_pair"),
        ({"loss_type": ["robust"], "label_smoothing": 0.5}, "robust: below 0.5.*got 0.5"),
        ({"loss_type": ["ipo"], "beta": 0.0}, "beta must be above 0 for ipo"),
    ],
)
def test_coefficients_that_make_no_loss(coefficients, message):
    with pytest.raises(ValueError, match=message):
        value(pairs_of([[-1.0, -2.0]], [[-1.0, -2.0]]), **coefficients)


def test_a_step_without_pairs():
    with pytest.raises(ValueError, match="at least one pair, got 0"):
        preference_loss(pairs_of([[-1.0, -2.0]], [[-1.0, -2.0]]), 0, 1, Preference())
