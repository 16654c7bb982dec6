import math

import pytest
import torch

from posttrain.objectives import cross_entropy
from posttrain.ops.logprob import TokenLogprobs


def policy(logits: torch.Tensor, targets: torch.Tensor) -> TokenLogprobs:
    log_p = logits.log_softmax(-1)
    return TokenLogprobs(
        logprob=log_p.gather(-1, targets[:, None]).squeeze(-1),
        entropy=-(log_p.exp() * log_p).sum(-1),
        lse=logits.logsumexp(-1),
        is_top1=logits.argmax(-1) == targets,
    )


def test_uniform_policy_has_loss_and_entropy_of_log_v():
    loss = cross_entropy(policy(torch.zeros(5, 7, dtype=torch.float64), torch.arange(5)), 5)
    torch.testing.assert_close(loss.value.item(), math.log(7), rtol=0, atol=1e-14)
    torch.testing.assert_close(loss.metrics["entropy"].item(), math.log(7), rtol=0, atol=1e-14)


def test_equals_torch_cross_entropy_with_its_gradient():
    torch.manual_seed(0)
    targets = torch.randint(11, (9,))
    logits, again = (torch.randn(9, 11, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    cross_entropy(policy(logits, targets), 9).value.backward()
    expected = torch.nn.functional.cross_entropy(again, targets)
    expected.backward()
    torch.testing.assert_close(logits.grad, again.grad)
    torch.testing.assert_close(cross_entropy(policy(logits, targets), 9).value, expected)


def test_shares_of_micro_batches_add_up():
    torch.manual_seed(0)
    logits, targets = torch.randn(10, 13, dtype=torch.float64), torch.randint(13, (10,))
    whole = cross_entropy(policy(logits, targets), 10)
    parts = [cross_entropy(policy(logits[i:j], targets[i:j]), 10) for i, j in ((0, 1), (1, 7), (7, 10))]
    torch.testing.assert_close(sum(part.value for part in parts), whole.value)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(sum(part.metrics[name] for part in parts), value)


def test_accuracy_counts_most_likely_targets():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [5.0, 1.0]])
    loss = cross_entropy(policy(logits, torch.tensor([0, 0, 0, 1])), 4)
    assert loss.metrics["mean_token_accuracy"].item() == 0.5


def test_metrics_carry_no_gradient():
    loss = cross_entropy(policy(torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1])), 2)
    assert loss.value.requires_grad
    assert not any(metric.requires_grad for metric in loss.metrics.values())


def test_refuses_a_step_without_targets():
    with pytest.raises(ValueError, match="at least one target token, got 0"):
        cross_entropy(policy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)), 0)


def test_refuses_a_policy_without_entropy():
    given = policy(torch.zeros(1, 3), torch.tensor([0]))._replace(entropy=None)
    with pytest.raises(ValueError, match="need_entropy"):
        cross_entropy(given, 1)
