"""linear_logprob on the CPU: every feature against the reference in float64, and the promises of its docstring."""

import itertools

import pytest
import torch
from tolerance import HALF, assert_as_good_as, assert_true_to, assert_unbiased

from posttrain.objectives.policy import PolicyCounts, PolicyObjective, PolicyTargets, policy_loss
from posttrain.ops import (
    BackendError,
    backend_for,
    linear_logprob,
    logprob_tiled,
    logprob_tiled_gradient,
    logprob_tiles,
    reference,
    use_backend,
)
from posttrain.ops.logprob_problem import Incoming, Needs, Problem, Results

UNIT, LOGITS, NOTHING = "unit", "logits", "none"


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 7 x 13: small problems then cross several of them."""
    monkeypatch.setattr(logprob_tiles, "ROWS", 7)
    monkeypatch.setattr(logprob_tiles, "COLUMNS", 13)


@pytest.fixture
def multiply_adds(monkeypatch):
    """What the driver's GEMMs cost, one number for each."""
    add_product, costs = logprob_tiles.add_product, []

    def counted(total, a, b, beta=1):
        costs.append(a.numel() * b.shape[1])
        return add_product(total, a, b, beta)

    for module in (logprob_tiles, logprob_tiled, logprob_tiled_gradient):
        monkeypatch.setattr(module, "add_product", counted)
    return costs


class Case:
    """Random inputs in float64; `inputs(dtype)` gives them in another precision."""

    def __init__(self, n=11, h=9, v=57, m=20, rank=3, seed=0, rows=True, ignored=(3,), **scalars):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator).double()  # float32 numbers: no input is rounded

        self.hidden, self.weight, self.bias = normal(n, h), normal(v, h) / h**0.5, normal(v)
        self.lora_a, self.lora_b = normal(rank, h) / h**0.5, normal(v, rank) / rank**0.5
        m = m if rows else n
        self.targets = torch.randint(0, v, (m,), generator=generator)
        self.targets[[i for i in ignored if i < m]] = -100
        self.rows = torch.randint(0, n, (m,), generator=generator) if rows else None
        self.incoming = normal(3, m)
        self.scalars = scalars

    def run(self, op, dtype, *, frozen=False, bias=True, lora=True, wants=("logprob", "entropy", "lse"), **options):
        """((logprob, entropy, lse, is_top1), gradients) of `op`, which is linear_logprob or its reference."""
        tensors = {"hidden": self.hidden, "weight": self.weight}
        tensors |= {"bias": self.bias} if bias else {}
        tensors |= {"lora_a": self.lora_a, "lora_b": self.lora_b} if lora else {}
        x = {k: t.to(dtype).requires_grad_(k == "hidden" or not frozen) for k, t in tensors.items()}
        adapter = (x["lora_a"], x["lora_b"], 0.5) if lora else None
        inputs = (x["hidden"], x["weight"], self.targets)
        outputs = op(*inputs, rows=self.rows, bias=x.get("bias"), lora=adapter, **self.scalars, **options)
        chosen = dict(zip(("logprob", "entropy", "lse"), zip(outputs[:3], self.incoming, strict=True), strict=True))
        loss = sum((chosen[name][0] * chosen[name][1].to(chosen[name][0].dtype)).sum() for name in wants)
        leaves = [t for t in x.values() if t.requires_grad]
        return outputs, torch.autograd.grad(loss, leaves)

    def check(self, dtype, budget=0, **options):
        """Outputs and gradients agree with the reference in float64."""
        (*ours, top1), grads = self.run(linear_logprob, dtype, memory_budget=budget, need_entropy=True, **options)
        (*truth, true_top1), true_grads = self.run(reference.linear_logprob, torch.float64, **options)
        for value, true in zip([*ours, *grads], [*truth, *true_grads], strict=True):
            assert_true_to(value, true)
        assert torch.equal(top1, true_top1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("budget", [0, 1 << 20])
@pytest.mark.usefixtures("small_tiles", "poison")
def test_agrees_in_every_combination(dtype, frozen, budget):
    for rows, bias, lora, softcap in itertools.product((True, False), (True, False), (True, False), (None, 3.0)):
        case = Case(rows=rows, temperature=0.7, logit_scale=1.3, softcap=softcap)
        for wants in (("logprob",), ("logprob", "entropy", "lse"), ("entropy",), ("lse",)):
            case.check(dtype, budget, frozen=frozen, bias=bias, lora=lora, wants=wants)


@pytest.mark.parametrize("n", [0, 1, 63, 100, 1000])
@pytest.mark.parametrize("frozen", [True, False])
def test_rows(n, frozen):
    Case(n=n, h=40, v=97, rows=False, ignored=(0, 1, 62)).check(torch.float32, lora=False, frozen=frozen)


@pytest.mark.parametrize("v", [1, 2, 97, 32000, 50257, 128256, 151936])
def test_vocabularies(v):
    Case(n=5, h=33, v=v, m=6, ignored=(2,)).check(torch.float32, lora=False, frozen=v > 50000)


def test_all_targets_ignored():
    case = Case(ignored=range(20))
    outputs, grads = case.run(linear_logprob, torch.float32, need_entropy=True)
    assert all(not value.any() for value in [*outputs, *grads])


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("budget", [0, 1 << 20])
@pytest.mark.usefixtures("small_tiles", "poison")
def test_targets_without_gradient(frozen, budget):
    """Every second target has none at all, others none of one output: the gradients are the reference's."""
    case = Case(softcap=3.0)
    case.incoming[:, ::2] = 0
    for i in range(3):
        case.incoming[i, 1 + 2 * i :: 6] = 0
    for wants in (("logprob",), ("logprob", "entropy", "lse")):
        case.check(torch.float32, budget, frozen=frozen, bias=wants != ("logprob",), lora=not frozen, wants=wants)
    case.incoming[:] = 0
    grads = case.run(linear_logprob, torch.float32, frozen=frozen, memory_budget=budget, need_entropy=True)[1]
    assert len(grads) == (1 if frozen else 5)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize(("budget", "gemms"), [(0, 3), (1 << 20, 2)])
@pytest.mark.parametrize("active", [40, 4, 0])
@pytest.mark.usefixtures("small_tiles")
def test_backward_costs_only_targets_with_gradient(active, budget, gemms, multiply_adds):
    """Three GEMMs, logits, dX and dW, or two where the logits are kept, over the targets with a gradient alone."""
    case = Case(n=30, m=40, ignored=())
    hidden, weight = case.hidden.float().requires_grad_(), case.weight.float().requires_grad_()
    logprob = linear_logprob(hidden, weight, case.targets, rows=case.rows, memory_budget=budget).logprob
    grad = torch.zeros(40)
    grad[torch.randperm(40)[:active]] = 1
    multiply_adds.clear()
    logprob.backward(grad)
    assert sum(multiply_adds) == gemms * active * weight.numel()


@pytest.mark.parametrize(("advantages", "active"), [((0.0, 1.0, 1.0), 5), ((0.0, 0.0, 0.0), 0)])
def test_clipped_tokens_and_groups_without_advantage_cost_no_backward(advantages, active, multiply_adds):
    """Three completions of four tokens; three tokens of the second are clipped."""
    case = Case(n=12, rows=False, ignored=())
    hidden, weight = case.hidden.float().requires_grad_(), case.weight.float().requires_grad_()
    policy = linear_logprob(hidden, weight, case.targets, need_entropy=True, memory_budget=0)
    old = policy.logprob.detach() - torch.tensor([0.0] * 5 + [1.0] * 3 + [0.0] * 4)
    sequence = torch.arange(3).repeat_interleave(4)
    known = PolicyTargets(sequence, torch.full((3,), 4), torch.tensor(advantages)[sequence], old_logprob=old)
    loss = policy_loss(policy, known, PolicyCounts(3, 12, 12.0), PolicyObjective(epsilon=0.2)).value
    multiply_adds.clear()
    loss.backward()
    assert sum(multiply_adds) == 3 * active * weight.numel()
    assert int(hidden.grad.any(1).sum()) == active


def test_strided_inputs():
    case = Case(n=12, h=18, v=58)
    hidden = case.hidden.float()[::2, ::2]
    weight = case.weight.float().T.contiguous().T[:, ::2]
    rows, targets = case.rows[::2] % len(hidden), case.targets[::2]
    ours = linear_logprob(hidden, weight, targets, rows=rows, need_entropy=True)
    truth = reference.linear_logprob(hidden.double(), weight.double(), targets, rows=rows)
    for value, true in zip(ours[:3], truth[:3], strict=True):
        assert_true_to(value, true)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.usefixtures("small_tiles")
def test_half_precision(dtype, frozen):
    case = Case(n=40, h=64, v=300, m=50)
    ours, our_grads = case.run(linear_logprob, dtype, frozen=frozen, need_entropy=True, memory_budget=0)
    rounded = Case(n=40, h=64, v=300, m=50)
    for name in ("hidden", "weight", "bias", "lora_a", "lora_b"):
        setattr(rounded, name, getattr(case, name).to(dtype))
    truth, true_grads = rounded.run(reference.linear_logprob, torch.float32, frozen=frozen)
    for value, true in zip(ours[:3], truth[:3], strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, true)
    peer_grads = rounded.run(_half_precision_logits, dtype, frozen=frozen)[1]
    for value, peer, true in zip(our_grads, peer_grads, true_grads, strict=True):
        assert_as_good_as(value, peer, true)


def _half_precision_logits(hidden, weight, targets, *, rows, bias, lora):
    """What PyTorch does with a half-precision head: logits in half precision."""
    x = hidden if rows is None else hidden[rows]
    logits = x @ weight.T + lora[2] * (x @ lora[0].T) @ lora[1].T + bias
    log_p = logits.log_softmax(-1)
    valid = targets != -100
    logprob = log_p.gather(-1, torch.where(valid, targets, 0).unsqueeze(-1)).squeeze(-1)
    entropy, lse = -(log_p.exp() * log_p).sum(-1), logits.logsumexp(-1)
    return *(torch.where(valid, value, 0) for value in (logprob, entropy, lse)), valid


@pytest.mark.parametrize("budget", [0, 1 << 20])
@pytest.mark.usefixtures("small_tiles")
def test_gradcheck(budget):
    case = Case(n=3, h=4, v=17, m=4, rank=2, ignored=(1,))
    leaves = [t.requires_grad_() for t in (case.hidden, case.weight, case.bias, case.lora_a, case.lora_b)]

    def function(hidden, weight, bias, lora_a, lora_b):
        return linear_logprob(
            hidden,
            weight,
            case.targets,
            rows=case.rows,
            bias=bias,
            temperature=0.8,
            softcap=2.0,
            lora=(lora_a, lora_b, 0.5),
            need_entropy=True,
            memory_budget=budget,
        )[:3]

    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.usefixtures("small_tiles")
def test_gradcheck_of_the_unit():
    case = Case(n=3, h=4, v=17, m=4)

    def function(hidden):
        return linear_logprob(hidden, case.weight, case.targets, rows=case.rows, softcap=2.0, memory_budget=0).logprob

    assert torch.autograd.gradcheck(function, [case.hidden.requires_grad_()], eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("save", [UNIT, LOGITS, NOTHING])
def test_opcheck(dtype, save):
    case = Case()
    head_trains = save != UNIT
    hidden = case.hidden.to(dtype).requires_grad_()
    weight, bias, lora_a, lora_b = (
        t.to(dtype).requires_grad_(head_trains) for t in (case.weight, case.bias, case.lora_a, case.lora_b)
    )
    adapter = (lora_a, lora_b) if head_trains else (None, None)
    tensors = (hidden, weight, case.targets, case.rows, bias, *adapter)
    # gradients of half-precision inputs differ between the checks by more than its tolerance: the schema is checked
    utils = ("test_schema", "test_faketensor") if dtype in HALF else torch.library._OPCHECK_DEFAULT_UTILS
    arguments = (*tensors, 0.5, 0.9, 3.0, 1.1, True, 1 << 20, save, "cpu")
    torch.library.opcheck(torch.ops.posttrain.linear_logprob.default, arguments, test_utils=utils)


def test_compiled_equals_eager():
    case = Case()

    def function(hidden, weight):
        return linear_logprob(hidden * 2, weight, case.targets, rows=case.rows, need_entropy=True).logprob.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        hidden, weight = case.hidden.float().requires_grad_(), case.weight.float().requires_grad_()
        value = call(hidden, weight)
        value.backward()
        results.append((value.detach(), hidden.grad, weight.grad))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.parametrize("frozen", [True, False])
def test_repeats_bit_for_bit(frozen):
    case = Case(n=300, h=64, v=3000, m=400)
    first, second = (case.run(linear_logprob, torch.float32, frozen=frozen, need_entropy=True) for _ in range(2))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


def test_huge_logits():
    # Integers up to 1e4 are exact in float32, so any error would be the op's own.
    logits = torch.tensor([[1e4, -1e4, 9999.0, 0.0], [-1e4, -1e4, -1e4, -1e4], [1e4, 1e4, 0.0, 3.0]])
    hidden, weight = torch.eye(3), logits.T.contiguous()
    targets = torch.tensor([1, 2, 0])
    ours = linear_logprob(hidden, weight, targets, need_entropy=True)
    truth = reference.linear_logprob(hidden.double(), weight.double(), targets)
    for value, true in zip(ours[:3], truth[:3], strict=True):
        assert_true_to(value, true)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_not_a_number_is_not_hidden(frozen, budget):
    """A NaN in the head's row of any token reaches every result, as it does through the whole logits."""
    case = Case(ignored=())
    case.weight[40] = torch.nan
    (*values, _), grads = case.run(
        linear_logprob, torch.float32, frozen=frozen, memory_budget=budget, need_entropy=True
    )
    _, true_grads = case.run(reference.linear_logprob, torch.float32, frozen=frozen)
    assert all(value.isnan().all() for value in values)
    for grad, truth in zip(grads, true_grads, strict=True):
        assert torch.equal(grad.isnan(), truth.isnan())


@pytest.mark.parametrize("frozen", [True, False])
def test_autocast_changes_nothing(frozen):
    case = Case()
    expected = case.run(linear_logprob, torch.float32, frozen=frozen, need_entropy=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.run(linear_logprob, torch.float32, frozen=frozen, need_entropy=True)
    for a, b in zip([*expected[0], *expected[1]], [*found[0], *found[1]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("where", ["hidden", "weight"])
@pytest.mark.parametrize("frozen", [True, False])
def test_nan_is_not_hidden(where, frozen):
    case = Case(n=4, h=8, v=40, m=6, ignored=())
    getattr(case, where)[1] = torch.nan
    (logprob, *_), (grad, *_) = case.run(linear_logprob, torch.float32, frozen=frozen, wants=("logprob",), lora=False)
    hit = (case.rows == 1) if where == "hidden" else torch.ones(6, dtype=torch.bool)
    assert torch.equal(logprob.isnan(), hit)
    assert torch.equal(grad.isnan().any(1), torch.zeros(4, dtype=torch.bool).index_fill_(0, case.rows[hit], True))


def test_confident_tokens_keep_their_digits():
    gap = torch.tensor([10.0, 20.0, 40.0, 80.0])
    hidden, weight = torch.stack([gap, torch.zeros(4)], 1).requires_grad_(), torch.eye(2)
    logprob = linear_logprob(hidden, weight, torch.zeros(4, dtype=torch.int64)).logprob
    logprob.sum().backward()
    odds = torch.exp(-gap.double())
    torch.testing.assert_close(logprob, -torch.log1p(odds).float(), rtol=1.3e-6, atol=0)
    torch.testing.assert_close(hidden.grad[:, 0], (odds / (1 + odds)).float(), rtol=1.3e-6, atol=0)


def test_float32_adapter_beside_a_half_precision_head():
    case = Case()
    hidden, weight = case.hidden.bfloat16(), case.weight.bfloat16()
    lora_a, lora_b = case.lora_a.float().requires_grad_(), case.lora_b.float().requires_grad_()
    ours = linear_logprob(hidden, weight, case.targets, rows=case.rows, lora=(lora_a, lora_b, 0.5)).logprob
    rounded = (lora_a.bfloat16(), lora_b.bfloat16(), 0.5)
    assert torch.equal(ours, linear_logprob(hidden, weight, case.targets, rows=case.rows, lora=rounded).logprob)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(ours.sum(), (lora_a, lora_b)))


def test_no_bias_over_seeds():
    def error_source(op, dtype):
        def run(seed):
            case = Case(n=8, h=32, v=200, m=8, seed=seed)
            return case.run(op, dtype, lora=False, wants=("logprob",))[0][0].detach()

        return run

    peer = error_source(reference.linear_logprob, torch.float32)
    truth = error_source(reference.linear_logprob, torch.float64)
    assert_unbiased(error_source(linear_logprob, torch.float32), peer, truth)


def test_repeated_rows_cost_no_copy_of_their_gradient():
    """A prompt's last token that predicts the first token of four completions gathers all four gradients."""
    case = Case(n=2, m=4, ignored=())
    case.rows = torch.zeros(4, dtype=torch.int64)
    case.check(torch.float32, lora=False, frozen=True, wants=("logprob",))


def test_backends():
    x = torch.zeros(2, 4)
    assert backend_for("linear_logprob", x) == "cpu"
    with use_backend("reference"):
        assert backend_for("linear_logprob", x) == "reference"
        Case().check(torch.float64)
    if not torch.cuda.is_available():
        with use_backend("cuda"), pytest.raises(BackendError, match=r"CUDA kernels|on cpu"):
            linear_logprob(x, torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64))


def _call(**changes):
    arguments = {
        "hidden": torch.zeros(4, 8),
        "weight": torch.zeros(10, 8),
        "targets": torch.zeros(4, dtype=torch.int64),
    }
    return linear_logprob(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(10, 7)}, r"\[4, 8\] and \[10, 7\]"),
        ({"hidden": torch.zeros(4, 8, dtype=torch.int64)}, "floating"),
        ({"targets": torch.zeros(4)}, "int64"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, "got 5 for 4 rows"),
        ({"targets": torch.tensor([0, 10, 0, 0])}, r"targets\[1\] is 10, out of range \[0, 10\)"),
        ({"targets": torch.tensor([0, 0, -1, 0])}, r"targets\[2\] is -1"),
        ({"rows": torch.tensor([0, 1, 2, 4])}, r"rows\[3\] is 4, out of range \[0, 4\)"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, r"rows must be int64 \[4\]"),
        (
            {"targets": torch.zeros(4, dtype=torch.int64, device="meta")},
            "on cpu like hidden; got targets on meta, no rows",
        ),
        ({"rows": torch.zeros(4, dtype=torch.int64, device="meta")}, "got targets on cpu, rows on meta"),
        ({"bias": torch.zeros(9)}, r"bias must be \[V\] = \[10\]; got \[9\]"),
        ({"bias": torch.zeros(10, dtype=torch.bfloat16)}, "bias must be torch.float32"),
        ({"lora": (torch.zeros(2, 8), torch.zeros(10, 3), 1.0)}, r"got \[2, 8\] and \[10, 3\]"),
        ({"weight": torch.zeros(0, 8)}, r"the vocabulary must not be empty; got weight \[0, 8\]"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"softcap": float("inf")}, "softcap must be positive and finite, got inf"),
    ],
)
def test_errors_name_the_numbers(changes, message):
    with pytest.raises(ValueError, match=f"linear_logprob: .*{message}"):
        _call(**changes)


@pytest.mark.parametrize("frozen", [True, False])
def test_workspace_stays_small(frozen):
    """No [M, V] tensor is ever allocated: the largest beyond inputs and gradients is one tile or [M, H]."""
    m, h, v = 512, 32, 20000
    case = Case(n=m, h=h, v=v, rows=False, ignored=())
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal biggest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                biggest = max(biggest, result.untyped_storage().nbytes())
            return result

    problem = Problem(
        case.hidden.float(), case.weight.float(), case.targets, None, None, None, None, 1.0, 1.0, None, 1.0, False, 0
    )
    with Watch():
        *results, _, _ = logprob_tiled.forward(problem, UNIT if frozen else NOTHING, "cpu")
        if not frozen:
            needs = Needs(True, True, False, False)
            incoming = Incoming(torch.ones(m), None, None)
            logprob_tiled_gradient.backward(problem, incoming, Results(*results), None, needs, "cpu")
    assert biggest <= v * h * 4
