"""linear_logprob in Triton, on the GPU or interpreted: every feature against the reference in float64, and its bits."""

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from tolerance import HALF, assert_as_good_as, assert_true_to

from posttrain.kernels import logprob as kernels
from posttrain.kernels import logprob_gradient_device as gradient_device
from posttrain.kernels.logprob import Blocks, logprob_forward
from posttrain.kernels.logprob_gradient import logprob_backward, unit_backward
from posttrain.ops import linear_logprob, reference, use_backend
from posttrain.ops.logprob_problem import Incoming, Needs, Problem, Results

ON_GPU = torch.cuda.is_available()
ALL = Needs(True, True, True, True)
TINY_BUDGET = 1 << 12  # several slabs and several parts


@dataclass
class Case:
    """Random inputs in float64; `problem(dtype)` puts them where the kernels run."""

    n: int = 9
    m: int = 21
    h: int = 24
    v: int = 97
    rank: int = 0
    rows: bool = True
    bias: bool = False
    ignored: tuple[int, ...] = (3,)
    budget: int = TINY_BUDGET
    scalars: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(7)

        def normal(*shape):
            return torch.randn(shape, generator=generator).bfloat16().double()  # exact in every dtype

        m = self.m if self.rows else self.n
        targets = torch.randint(0, self.v, (m,), generator=generator)
        targets[[i for i in self.ignored if i < m]] = -100
        self.wide = Problem(
            hidden=normal(self.n, self.h),
            weight=normal(self.v, self.h) / 4,
            targets=targets,
            rows=torch.randint(0, self.n, (m,), generator=generator) if self.rows else None,
            bias=normal(self.v) if self.bias else None,
            lora_a=normal(self.rank, self.h) / 4 if self.rank else None,
            lora_b=normal(self.v, self.rank) / 4 if self.rank else None,
            lora_scaling=0.5,
            memory_budget=self.budget,
            **({"temperature": 1.0, "softcap": None, "logit_scale": 1.0, "need_entropy": True} | self.scalars),
        )
        self.incoming = normal(3, m)

    def problem(self, dtype: torch.dtype, device: str) -> Problem:
        return converted(self.wide, dtype, device)


def converted(p: Problem, dtype: torch.dtype, device: str) -> Problem:
    tensors = {name: x for name, x in p._asdict().items() if isinstance(x, torch.Tensor)}
    moved = {name: x.detach().to(device, dtype if x.is_floating_point() else x.dtype) for name, x in tensors.items()}
    return p._replace(**moved)


def leaves(p: Problem) -> list[torch.Tensor]:
    return [x for x in (p.hidden, p.weight, p.bias, p.lora_a, p.lora_b) if x is not None]


def truth(p: Problem, incoming, dtype=torch.float64):
    """Outputs and gradients of the reference."""
    p = converted(p, dtype, "cpu")
    for x in leaves(p):
        x.requires_grad_()
    outputs = reference.linear_logprob(
        p.hidden,
        p.weight,
        p.targets,
        rows=p.rows,
        bias=p.bias,
        temperature=p.temperature,
        softcap=p.softcap,
        logit_scale=p.logit_scale,
        lora=None if p.lora_a is None else (p.lora_a, p.lora_b, p.lora_scaling),
    )
    chosen = [(y, g.to(y)) for y, g in zip(outputs[:3], incoming, strict=True) if g is not None]
    return outputs, torch.autograd.grad([y for y, _ in chosen], leaves(p), [g for _, g in chosen])


def ours(p: Problem, incoming, needs: Needs = ALL):
    """Outputs, the gradients of the recomputing backward, and the unit."""
    *results, lse_low, is_top1, _ = logprob_forward(p, "none")
    device_incoming = [None if g is None else g.to(p.hidden.device, torch.float32) for g in incoming]
    grads = logprob_backward(p, Incoming(*device_incoming), Results(*results, lse_low), needs)
    return [*results, is_top1], [g for g in grads if g is not None]


def check(case: Case, device: str, wants=(True, True, True)) -> None:
    incoming = [g if want else None for g, want in zip(case.incoming, wants, strict=True)]
    outputs, grads = ours(case.problem(torch.float32, device), incoming)
    true_outputs, true_grads = truth(case.wide, incoming)
    for value, true in zip([*outputs[:3], *grads], [*true_outputs[:3], *true_grads], strict=True):
        assert_true_to(value.cpu(), true.detach())
    assert torch.equal(outputs[3].cpu(), true_outputs[3])
    check_unit(case, device, outputs, incoming[0])


def check_unit(case: Case, device: str, outputs, grad_logprob) -> None:
    """The frozen head's forward has the same bits, and its unit gives the gradient of hidden."""
    if case.rank or grad_logprob is None:
        return
    p = case.problem(torch.float32, device)
    *again, _, is_top1, unit = logprob_forward(p, "unit")
    for value, before in zip([*again, is_top1], outputs, strict=True):
        assert torch.equal(value, before)
    grad = unit_backward(grad_logprob.to(device, torch.float32), unit, p.rows, len(p.hidden), p.hidden.dtype)
    assert_true_to(grad.cpu(), truth(case.wide, [grad_logprob, None, None])[1][0])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.usefixtures("poison")
def test_every_combination(softcap, rank, triton_device):
    for rows, bias in itertools.product((True, False), (True, False)):
        scalars = {"softcap": softcap, "temperature": 0.7, "logit_scale": 1.3}
        check(Case(rows=rows, bias=bias, rank=rank, scalars=scalars), triton_device)


@pytest.mark.parametrize("wants", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.usefixtures("poison")
def test_each_output_alone(wants, triton_device):
    check(Case(rank=3), triton_device, wants)


@pytest.mark.parametrize("n", [0, 1, 5, 100])
@pytest.mark.usefixtures("poison")
def test_number_of_rows(n, triton_device):
    check(Case(n=n, rows=False, h=33, ignored=(0, 2, *range(16, 48))), triton_device)


@pytest.mark.parametrize("v", [1, 2, 64, 65, 300])
@pytest.mark.usefixtures("poison")
def test_vocabularies(v, triton_device):
    check(Case(v=v, h=17, bias=True), triton_device)


@pytest.mark.parametrize("budget", [0, 1 << 24])
@pytest.mark.usefixtures("poison")
def test_memory_budget_changes_no_result(budget, triton_device):
    small, large = Case(m=40, v=200), Case(m=40, v=200, budget=budget)
    check(large, triton_device)
    ours_small, ours_large = (ours(c.problem(torch.float32, triton_device), c.incoming)[0] for c in (small, large))
    for a, b in zip(ours_small, ours_large, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("poison")
def test_all_targets_ignored(triton_device):
    p = Case(ignored=range(21)).problem(torch.float32, triton_device)
    outputs, grads = ours(p, Case().incoming)
    unit = logprob_forward(p, "unit")[-1]
    assert not any(value.any() for value in (*outputs, *grads, unit))


@pytest.mark.usefixtures("poison")
def test_targets_without_gradient(triton_device):
    case = Case(m=40, v=40, rank=3, bias=True)
    case.incoming[:, 14:34] = 0  # a whole block of the interpreter's, and parts of two
    case.incoming[:, ::5] = 0
    check(case, triton_device)


@pytest.mark.skipif(ON_GPU, reason="a compiled kernel doesn't tell whether it computed logits")
def test_blocks_without_gradient_compute_no_logits(monkeypatch, triton_device):
    logits, calls = gradient_device.logits_tile, []

    def counted(*args):
        calls.append(args)
        return logits(*args)

    case = Case(n=64, v=40, rows=False, ignored=())
    p = case.problem(torch.float32, triton_device)
    *results, _, _ = logprob_forward(p, "none")
    monkeypatch.setattr(gradient_device, "logits_tile", counted)
    tiles = -(-case.v // kernels.INTERPRETER_BLOCKS.columns)
    for inactive, row_blocks in ((range(0), 4), (range(16, 60), 2), (range(64), 0)):
        incoming = case.incoming.float()
        incoming[:, list(inactive)] = 0
        calls.clear()
        logprob_backward(p, Incoming(*incoming), Results(*results), ALL)
        assert len(calls) == row_blocks * tiles


@pytest.mark.parametrize("needs", [Needs(*(i == j for j in range(4))) for i in range(4)])
def test_only_what_is_needed(needs, triton_device):
    case = Case(rank=4, bias=True)
    some = logprob_backward_of(case, needs, triton_device)
    everything = logprob_backward_of(case, ALL, triton_device)
    wanted = (*needs, needs.lora)
    for value, full, want in zip(some, everything, wanted, strict=True):
        assert (value is not None) == want
        assert value is None or torch.equal(value, full)


def logprob_backward_of(case: Case, needs: Needs, device: str):
    p = case.problem(torch.float32, device)
    *results, _, _ = logprob_forward(p, "none")
    incoming = Incoming(*(g.to(device, torch.float32) for g in case.incoming))
    return logprob_backward(p, incoming, Results(*results), needs)


def test_no_entropy_unless_asked(triton_device):
    case = Case(scalars={"need_entropy": False})
    outputs, grads = ours(case.problem(torch.float32, triton_device), [case.incoming[0], None, case.incoming[2]])
    assert outputs[1].numel() == 0
    true_outputs, true_grads = truth(case.wide, [case.incoming[0], None, case.incoming[2]])
    assert_true_to(outputs[0].cpu(), true_outputs[0].detach())
    for value, true in zip(grads, true_grads, strict=True):
        assert_true_to(value.cpu(), true)


@pytest.mark.parametrize("save", ["none", "unit"])
def test_same_bits_again_and_alone(save, triton_device):
    p = Case(n=40, m=60, v=200).problem(torch.float32, triton_device)
    first, second = logprob_forward(p, save), logprob_forward(p, save)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    for i in (0, 17, 59):
        alone = logprob_forward(p._replace(targets=p.targets[i : i + 1], rows=p.rows[i : i + 1]), save)
        for a, b in zip(alone[:5], first[:5], strict=True):
            assert torch.equal(a, b[i : i + 1])


def test_lora_has_the_same_bits_alone(triton_device):
    p = Case(n=40, m=60, rank=5).problem(torch.float32, triton_device)
    alone = logprob_forward(p._replace(targets=p.targets[7:8], rows=p.rows[7:8]), "none")
    for a, b in zip(alone[:5], logprob_forward(p, "none")[:5], strict=True):
        assert torch.equal(a, b[7:8])


def with_logits(z: torch.Tensor, targets: list[int], scale: float) -> Case:
    """A case whose logits are exactly `z` [M, V]: hidden is `scale` times the identity."""
    case = Case(n=len(z), m=len(z), v=z.shape[1], h=len(z), rows=False, ignored=())
    hidden, weight = torch.eye(len(z)).double() * scale, z.T.double() / scale
    case.wide = case.wide._replace(hidden=hidden, weight=weight, targets=torch.tensor(targets))
    return case


@pytest.mark.usefixtures("poison")
def test_extreme_logits(triton_device):
    z = torch.randint(-40, 41, (6, 70), generator=torch.Generator().manual_seed(0)) / 8
    z[0] += 1e4
    z[1] -= 1e4
    z[2, 11], z[2, 40] = 1e4, -1e4
    z[3, 60:] += 1e4  # the reference of the unit rises in a later tile: the target is far below
    z[4, :5] -= 1e4
    z[5, 69] += 45
    for targets in ([1, 2, 11, 60, 33, 5], [69, 69, 40, 3, 2, 69]):
        case = with_logits(z, targets, 2.0**7)
        outputs, grads = ours(case.problem(torch.float32, triton_device), case.incoming)
        true_outputs, true_grads = truth(case.wide, case.incoming)
        for value, true in zip([*outputs[:3], *grads], [*true_outputs[:3], *true_grads], strict=True):
            assert_true_to(value.cpu(), true.detach())
        check_unit(with_logits(z, targets, 2.0**14), triton_device, outputs, case.incoming[0])


def test_masked_tokens(triton_device):
    case = Case(bias=True)
    case.wide.bias[case.wide.targets[0] + 1 - 2 * (case.wide.targets[0] > 90)] = 0.5
    masked = [v for v in range(0, 97, 5) if v not in case.wide.targets]
    p = case.problem(torch.float32, triton_device)
    p.bias[masked] = float("-inf")
    kept = [v for v in range(97) if v not in masked]
    position = {v: i for i, v in enumerate(kept)}
    small = case.wide._replace(
        weight=case.wide.weight[kept],
        bias=case.wide.bias[kept],
        targets=torch.tensor([position.get(int(y), -100) for y in case.wide.targets]),
    )
    outputs, grads = ours(p, case.incoming)
    true_outputs, true_grads = truth(small, case.incoming)
    for value, true in zip(outputs[:3], true_outputs[:3], strict=True):
        assert_true_to(value.cpu(), true.detach())
    assert_true_to(grads[0].cpu(), true_grads[0])
    assert_true_to(grads[1][kept].cpu(), true_grads[1])
    assert not grads[1][masked].any()


def test_confident_targets_keep_their_digits(triton_device):
    z = torch.zeros(3, 70)
    z[:, 20] = torch.tensor([25.0, 27.5, 40.0])
    case = with_logits(z, [20, 20, 20], 1.0)
    logprob = logprob_forward(case.problem(torch.float32, triton_device), "none")[0].cpu().double()
    true = truth(case.wide, case.incoming)[0][0].detach()
    others = 69 * torch.exp(-z[:, 20].double())
    torch.testing.assert_close(logprob, -torch.log1p(others), rtol=3e-6, atol=0)
    assert (logprob < 0).all()
    torch.testing.assert_close(logprob.float(), true.float())


def test_strided_inputs(triton_device):
    case = Case(n=10, h=32, v=65)
    p = case.problem(torch.float32, triton_device)
    strided = p._replace(
        hidden=torch.cat([p.hidden, p.hidden], 1)[:, :32],
        weight=p.weight.T.contiguous().T,
        targets=p.targets.repeat_interleave(2)[::2],
    )
    for a, b in zip(logprob_forward(strided, "unit"), logprob_forward(p, "unit"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("frozen", [True, False])
def test_through_the_public_op(frozen, triton_device):
    case = Case()
    p = case.problem(torch.float32, triton_device)
    p.hidden.requires_grad_()
    p.weight.requires_grad_(not frozen)
    with use_backend("triton"):
        result = linear_logprob(p.hidden, p.weight, p.targets, rows=p.rows, memory_budget=TINY_BUDGET)
        result.logprob.backward(case.incoming[0].to(result.logprob))
    (true, *_), (true_hidden, true_weight) = truth(case.wide, [case.incoming[0], None, None])
    assert_true_to(result.logprob.detach().cpu(), true.detach())
    assert_true_to(p.hidden.grad.cpu(), true_hidden)
    if not frozen:
        assert_true_to(p.weight.grad.cpu(), true_weight)


def test_repeated_and_absent_rows_sum_in_order(triton_device):
    unit = torch.randn(50, 33, device=triton_device)
    factor = torch.randn(50, device=triton_device)
    rows = torch.randint(0, 7, (50,), device=triton_device) * 2
    first, second = (unit_backward(factor, unit, rows, 15, torch.float32) for _ in range(2))
    assert torch.equal(first, second)
    true = torch.zeros(15, 33, dtype=torch.float64).index_add_(
        0, rows.cpu(), unit.cpu().double() * factor.cpu().double().unsqueeze(-1)
    )
    assert_true_to(first.cpu(), true)


def test_blocks_are_shrunk_only_without_a_gpu(triton_device):
    p = Case().problem(torch.float32, triton_device)
    assert isinstance(kernels.blocks(p), Blocks)
    assert (kernels.blocks(p) == kernels.INTERPRETER_BLOCKS) == (not ON_GPU)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device: half precision is compiled, not interpreted")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("plain", [True, False])
def test_half_precision(dtype, plain):
    scalars = {"need_entropy": not plain, "softcap": None if plain else 20.0}
    case = Case(n=300, m=500, h=320, v=5003, bias=not plain, scalars=scalars, budget=1 << 22)
    incoming = [case.incoming[0], None if plain else case.incoming[1], case.incoming[2]]
    outputs, grads = ours(case.problem(dtype, "cuda"), incoming)
    true_outputs, true_grads = truth(case.wide, incoming, torch.float32)
    for value, true in zip(outputs[:3], true_outputs[:3], strict=True):
        assert value.numel() == 0 or torch.testing.assert_close(value.cpu(), true.detach()) is None
    peer_grads = half_precision_peer(case.problem(dtype, "cuda"), incoming)
    for value, peer, true in zip(grads, peer_grads, true_grads, strict=True):
        assert_as_good_as(value.cpu(), peer.cpu(), true)
    p = case.problem(dtype, "cuda")
    unit = logprob_forward(p, "unit")[-1]
    grad = unit_backward(incoming[0].to("cuda", torch.float32), unit, p.rows, len(p.hidden), dtype)
    alone = [incoming[0], None, None]
    peer, true = half_precision_peer(p, alone)[0], truth(case.wide, alone, torch.float32)[1][0]
    assert_as_good_as(grad.cpu(), peer.cpu(), true)


def half_precision_peer(p: Problem, incoming):
    """Gradients as PyTorch computes them with logits in half precision."""
    xs = [x.detach().requires_grad_() for x in leaves(p)]
    logits = xs[0][p.rows] @ xs[1].T
    logits = logits if p.bias is None else logits + xs[2]
    logits = logits if p.softcap is None else p.softcap * torch.tanh(logits / p.softcap)
    log_p, valid = logits.log_softmax(-1), p.targets != -100
    logprob = log_p.gather(-1, torch.where(valid, p.targets, 0).unsqueeze(-1)).squeeze(-1)
    outputs = (logprob, -(log_p.exp() * log_p).sum(-1), logits.logsumexp(-1))
    chosen = [(torch.where(valid, y, 0), g.to(y)) for y, g in zip(outputs, incoming, strict=True) if g is not None]
    return torch.autograd.grad([y for y, _ in chosen], xs, [g for _, g in chosen])
