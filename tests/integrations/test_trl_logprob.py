"""Our stand-in for TRL's language head: all five outputs against float64, and what it leaves to TRL."""

import pytest
import torch
from tolerance import assert_true_to

from posttrain.integrations import counters
from posttrain.integrations.counting import forget
from posttrain.integrations.trl_logprob import LanguageHead

ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """TRL's function stays out of these tests; test_self_check.py has the comparison with it."""
    monkeypatch.setattr("posttrain.integrations.trl_logprob.check_head", lambda *arguments: None)


def inputs(n: int = 11, h: int = 16, v: int = 57, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(n)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((n, h), (v, h), (v,)))
    targets = torch.randint(v, (n,), generator=generator)
    return *(x.to(dtype).requires_grad_() for x in (hidden, weight, bias)), targets


def truth(hidden, weight, bias, targets, temperature, softcap, logit_scale):
    """The five outputs from all logits, in float64, and the gradients of log_probs + entropy."""
    hidden, weight, bias = leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    logits = (hidden @ weight.T + bias) * logit_scale
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature
    log_p = logits.log_softmax(-1)
    log_probs = log_p.gather(-1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    gradients = torch.autograd.grad((log_probs + entropy).sum(), leaves)
    outputs = (log_probs, entropy, (2 * log_p).logsumexp(-1), logits.mean(-1), logits.argmax(-1) == targets)
    return [x.detach() for x in outputs], gradients


def refuse(*arguments):
    raise AssertionError("left to TRL")


@pytest.mark.parametrize("n", [0, 1, 11])
@pytest.mark.parametrize(("temperature", "softcap", "logit_scale"), [(1.0, None, 1.0), (0.7, 3.0, 0.5)])
def test_outputs_and_gradients(n, temperature, softcap, logit_scale):
    hidden, weight, bias, targets = inputs(n)
    results = LanguageHead(refuse).apply(hidden, weight, bias, targets, temperature, 32768, softcap, logit_scale, ALL)
    expected, expected_gradients = truth(hidden, weight, bias, targets, temperature, softcap, logit_scale)
    for ours, wanted in zip(results[:4], expected[:4], strict=True):
        assert_true_to(ours.detach(), wanted)
    assert torch.equal(results[4], expected[4])
    assert [x.requires_grad for x in results] == [True, True, False, False, False]
    gradients = torch.autograd.grad((results[0] + results[1]).sum(), (hidden, weight, bias))
    for ours, wanted in zip(gradients, expected_gradients, strict=True):
        assert_true_to(ours, wanted)


def test_top1_is_seen():
    hidden, weight, bias, _ = inputs()
    likeliest = (hidden @ weight.T + bias).argmax(-1)
    assert LanguageHead(refuse).apply(hidden, weight, bias, likeliest, 1.0, 32768, outputs=ALL)[4].all()


def test_only_what_is_asked_for():
    hidden, weight, _, targets = inputs()
    results = LanguageHead(refuse).apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ("log_probs",))
    assert results[1:] == (None, None, None, None)
    assert results[0].shape == (11,)


def test_mean_of_capped_logits_goes_in_slabs(monkeypatch):
    hidden, weight, bias, targets = inputs()
    scalars = (1.3, 32768, 2.0, 0.5, ALL)
    expected = truth(hidden, weight, bias, targets, 1.3, 2.0, 0.5)[0][3]
    monkeypatch.setattr("posttrain.integrations.trl_logprob._SLAB", 13 * 11)
    assert_true_to(LanguageHead(refuse).apply(hidden, weight, bias, targets, *scalars)[3], expected)


def test_autocast_computes_in_its_dtype():
    hidden, weight, bias, targets = inputs()
    halves = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight, bias)]
    wanted = LanguageHead(refuse).apply(*halves, targets, 1.0, 32768, outputs=ALL)
    with torch.autocast("cpu", torch.bfloat16):
        found = LanguageHead(refuse).apply(hidden, weight, bias, targets, 1.0, 32768, outputs=ALL)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    one = torch.autograd.grad(found[0].sum(), (hidden, weight, bias))
    other = torch.autograd.grad(wanted[0].sum(), halves)
    for wide, half in zip(one, other, strict=True):
        assert wide.dtype == torch.float32 and torch.equal(wide, half.float())


@pytest.mark.parametrize("case", ["narrow head", "ZeRO-3"])
def test_what_is_left_to_trl_is_counted_and_said(case, capsys):
    from trl.kernels import ChunkedLogProbFunction

    forget()
    hidden, weight, bias, targets = inputs()
    if case == "narrow head":
        weight, bias, reason = weight.bfloat16(), bias.bfloat16(), "the torch.bfloat16 head would need a copy"
    else:
        weight.ds_id, reason = 0, "DeepSpeed ZeRO-3"
    arguments = (hidden, weight, bias, targets, 1.0, 32768, None, 1.0, ALL)
    head = LanguageHead(ChunkedLogProbFunction.apply)
    results = [head.apply(*arguments) for _ in range(2)][1]
    for ours, theirs in zip(results, ChunkedLogProbFunction.apply(*arguments), strict=True):
        assert torch.equal(ours, theirs)
    (entry,) = counters()
    assert reason in entry and counters()[entry] == 2
    assert capsys.readouterr().out.count(reason) == 1
