"""The exact divergence, its gradient, and what it needs no memory for."""

import pytest
import torch

from posttrain.models import divergence
from posttrain.models.divergence import kl_divergence
from posttrain.models.head import Head


def head(seed: int, width: int, vocabulary: int = 37, **fields) -> Head:
    weight = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Head(**{"weight": weight, "bias": None, "softcap": None, "logit_scale": 1.0, "lora": None, **fields})


def hidden(seed: int, rows: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64).requires_grad_()


def dense(p: Head, x: torch.Tensor, q: Head, y: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = [h.logits(z) / temperature for h, z in ((p, x), (q, y))]
    return torch.nn.functional.kl_div(
        logits[1].log_softmax(-1), logits[0].log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)


@pytest.mark.parametrize("rows", [1, 3, 10])
def test_equals_the_dense_formula_with_its_gradient(monkeypatch, rows):
    monkeypatch.setattr(divergence, "_BYTES", 3 * 37 * 4)  # three rows at a time
    p, q = head(0, 8, softcap=5.0), head(1, 6, logit_scale=0.5)
    p.weight.requires_grad_()
    x, y = hidden(2, rows, 8), hidden(3, rows, 6)
    found, expected = kl_divergence(p, x, q, y, 0.7), dense(p, x, q, y, 0.7)
    torch.testing.assert_close(found.double(), expected, rtol=1.3e-6, atol=1e-5)
    weights = torch.arange(1, rows + 1, dtype=torch.float64)
    inputs = (x, p.weight)
    gradients = [torch.autograd.grad((value * weights).sum(), inputs) for value in (found.double(), expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1.3e-6, atol=1e-5)


def test_a_policy_has_no_divergence_from_itself():
    x = hidden(0, 5, 8)
    assert kl_divergence(head(0, 8), x, head(0, 8).detached(), x).abs().max() < 1e-12


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="5 places and 37 tokens of p, but 4 and 37 of q"):
        kl_divergence(head(0, 8), hidden(0, 5, 8), head(1, 8), hidden(1, 4, 8))
    with pytest.raises(ValueError, match="but 5 and 38 of q"):
        kl_divergence(head(0, 8), hidden(0, 5, 8), head(1, 8, 38), hidden(1, 5, 8))
