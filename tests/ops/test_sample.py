"""sample against its definition in float64 and transformers' filters; its distribution, seeds and log-probabilities."""

import math

import pytest
import torch
from tolerance import assert_true_to, assert_unbiased
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from posttrain.ops import backend_for, explain, reference, sample, use_backend
from posttrain.ops.backend import Choice

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
FILTERS = [
    {},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"top_k": 1},
    {"top_p": 1e-6},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"temperature": 0.6, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 3.0, "top_p": 0.999, "min_p": 1e-3},
    {"temperature": 1e-3},
    {"temperature": 1e-6},
    {"temperature": 0.0, "top_k": 3},
]


def logits_of(rows: int, size: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * spread


def run(logits: Tensor, seed: int = 0, offset: int = 0, **parameters) -> tuple[Tensor, Tensor]:
    """Row r with seed + r."""
    seeds = torch.arange(len(logits)) + seed
    return sample(logits, **OFF | parameters, seeds=seeds, offsets=torch.full_like(seeds, offset))


def kept(logits: Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> Tensor:
    """What transformers leaves."""
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        logits = warper(None, logits)
    return logits > -math.inf


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("size", [97, 50257, 151936])
def test_agrees_with_the_definition(size, filters):
    """Which differ only where rounding decides, about once in a million draws."""
    logits = logits_of(4, size)
    tokens, logprobs = run(logits, seed=-3, offset=2**40 + 1, **filters)
    with use_backend("reference"):
        expected, true = run(logits.double(), seed=-3, offset=2**40 + 1, **filters)
    assert torch.equal(tokens, expected)
    assert_true_to(logprobs, true.double())
    scaled = logits.double() / (filters.get("temperature", 1) or 1)
    assert_true_to(logprobs, scaled.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])


@pytest.mark.parametrize("filters", FILTERS[:-1], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_draws_what_transformers_keeps(backend, filters):
    """All of it where it is little, and nothing else."""
    logits = logits_of(1, 60, spread=3.0).expand(4000, 60)
    with use_backend(backend):
        tokens, _ = run(logits, **filters)
    mask = kept(logits[:1].double(), **filters)[0]
    assert mask[tokens].all()
    probable = mask & (
        (logits[0].double() / filters.get("temperature", 1)).masked_fill(~mask, -math.inf).softmax(-1) > 0.01
    )
    assert set(probable.nonzero()[:, 0].tolist()) <= set(tokens.tolist())


@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.3}, {"temperature": 2.0}], ids=str)
def test_frequencies(filters):
    """Chi-square of 40,000 draws, below its value that one seed in a thousand exceeds."""
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5, 0.5, -4.0])
    tokens, _ = run(logits.expand(40000, 7), seed=123, **filters)
    mask = kept(logits[None].double(), **filters)[0]
    p = (logits.double() / filters.get("temperature", 1)).masked_fill(~mask, -math.inf).softmax(-1)
    expected, observed = p * 40000, torch.bincount(tokens, minlength=7)
    assert not observed[~mask].any()
    degrees = int(mask.sum()) - 1
    bound = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46}[degrees]
    assert ((observed - expected)[mask] ** 2 / expected[mask]).sum() < bound


@pytest.mark.parametrize("which", ["seed", "offset"])
def test_seeds_and_offsets_give_independent_draws(which):
    """Of two equal tokens, neighbours in seed or offset agree half of the time."""
    seeds = torch.arange(20000) if which == "seed" else torch.zeros(20000, dtype=torch.int64)
    offsets = torch.arange(20000) if which == "offset" else torch.zeros(20000, dtype=torch.int64)
    tokens, _ = sample(torch.zeros(20000, 2), **OFF, seeds=seeds, offsets=offsets)
    for lag in (1, 2, 256):
        assert abs((tokens[lag:] == tokens[:-lag]).double().mean() - 0.5) < 4 * 0.5 / 20000**0.5
    assert abs(tokens.double().mean() - 0.5) < 4 * 0.5 / 20000**0.5


def test_the_random_numbers_are_philox():
    """The known answers of Salmon et al.'s Random123 for counters and keys of zeros and of ones."""
    zero, ones = torch.tensor(0), torch.tensor(-1)
    assert [int(x) for x in reference._philox(zero, zero, zero)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    noise = reference.gumbel(ones[None], ones[None], 1000, torch.float64)
    assert noise.shape == (1, 1000) and noise.isfinite().all()
    assert abs(noise.mean() - 0.57722) < 4 * 1.2825 / 1000**0.5


def test_a_row_depends_on_itself_only():
    logits = logits_of(9, 1000)
    mixed = {
        "temperature": torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 2.0, 1.0, 0.7, 1.0]),
        "top_k": torch.tensor([0, 0, 4, 50, 0, 0, 7, 0, 1]),
        "top_p": torch.tensor([1.0, 0.5, 0.9, 1.0, 0.3, 0.95, 0.8, 1.0, 1.0]),
        "min_p": torch.tensor([0.0, 0.0, 0.1, 0.0, 0.0, 0.02, 0.0, 0.0, 0.5]),
    }
    seeds, offsets = torch.arange(9) * 7, torch.arange(9)
    tokens, logprobs = sample(logits, **mixed, seeds=seeds, offsets=offsets)
    for r in range(9):
        row = slice(r, r + 1)
        own = {name: x[row] for name, x in mixed.items()}
        alone = sample(logits[row], **own, seeds=seeds[row], offsets=offsets[row])
        assert torch.equal(alone[0], tokens[row]) and torch.equal(alone[1], logprobs[row])
        numbers = {name: x[r].item() for name, x in mixed.items()}
        assert torch.equal(sample(logits[row], **numbers, seeds=seeds[row], offsets=offsets[row])[0], tokens[row])


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_logits_of_ten_thousand(shift):
    logits = (logits_of(6, 1000) * 64).round() / 64 + shift
    for temperature in (1.0, 0.7):
        tokens, logprobs = run(logits, temperature=temperature)
        truth = (logits.double() / temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        assert_true_to(logprobs, truth)


def test_logprobs_lean_to_no_side():
    def result(dtype, function):
        return lambda seed: function(logits_of(8, 3000, seed).to(dtype))

    def plain(logits):
        return logits.log_softmax(-1).gather(-1, run(logits)[0][:, None])[:, 0]

    ours = result(torch.float32, lambda logits: run(logits)[1])

    def truth(seed):
        logits = logits_of(8, 3000, seed)
        return logits.double().log_softmax(-1).gather(-1, run(logits)[0][:, None])[:, 0]

    assert_unbiased(ours, result(torch.float32, plain), truth)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_masked_logits_and_ties(backend):
    """Tokens of minus infinity are never drawn; of equal ones all stay, or the first is taken."""
    one = torch.full((1, 100), -math.inf)
    one[0, 41] = -3.0
    tied = torch.tensor([[1.0, 3.0, 3.0, 3.0, 2.0]])
    with use_backend(backend):
        for filters in FILTERS:
            tokens, logprobs = run(one, **filters)
            assert tokens.item() == 41 and logprobs.item() == 0
        assert run(tied, temperature=0.0)[0].item() == 1
        for filters in ({"top_k": 1}, {"top_k": 2}, {"top_p": 0.1}, {"top_k": 1, "top_p": 0.5}):
            assert set(run(tied.expand(50, 5), **filters)[0].tolist()) == {1, 2, 3}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_a_distribution_says_nan_and_leaves_the_others(bad, temperature, backend):
    logits = logits_of(4, 130)
    with use_backend(backend):
        expected = run(logits, temperature=temperature, top_k=9, top_p=0.9)
        logits[1, 129], logits[3] = bad, -math.inf
        tokens, logprobs = run(logits, temperature=temperature, top_k=9, top_p=0.9)
    assert tokens[1] == tokens[3] == 0 and logprobs[[1, 3]].isnan().all()
    assert torch.equal(tokens[::2], expected[0][::2]) and torch.equal(logprobs[::2], expected[1][::2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_and_strides(dtype):
    logits = logits_of(5, 300).to(dtype)
    tokens, logprobs = run(logits, top_p=0.9)
    assert logprobs.dtype == torch.float32
    assert_true_to(logprobs, logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
    wide = torch.stack([logits, logits * 2], 2)
    assert torch.equal(run(wide[..., 0], top_p=0.9)[0], tokens)
    assert torch.equal(run(logits.T.contiguous().T, top_p=0.9)[0], tokens)


def test_no_rows_and_one_token():
    assert [x.shape for x in run(torch.zeros(0, 9))] == [(0,), (0,)]
    tokens, logprobs = run(torch.randn(3, 1), top_k=1, top_p=0.5, min_p=1.0)
    assert not tokens.any() and not logprobs.any()


def test_any_number_of_threads():
    logits = logits_of(7, 5000)
    threads = torch.get_num_threads()
    first = run(logits, top_k=100, top_p=0.9)
    torch.set_num_threads(1)
    second = run(logits, top_k=100, top_p=0.9)
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    ones, indices = torch.ones(3), torch.arange(3)
    arguments = logits_of(3, 20).to(dtype), ones, indices, ones, ones * 0.1, indices, indices, "cpu"
    torch.library.opcheck(torch.ops.posttrain.sample, arguments)


def test_backends_and_their_reasons():
    assert backend_for("sample", torch.ones(1)) == "cpu"
    assert explain("sample", torch.ones(1).half()) == Choice(
        "cpu", "has cpu kernels for float32, which float16 is widened to"
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"logits": torch.zeros(9)}, r"floating \[S, V\], got torch.float32 \[9\]"),
        ({"logits": torch.zeros(2, 9).int()}, r"got torch.int32 \[2, 9\]"),
        ({"logits": torch.zeros(2, 9).requires_grad_()}, "no gradient; call it under torch.no_grad"),
        ({"logits": torch.zeros(2, 0)}, r"got torch.float32 \[2, 0\]"),
        ({"seeds": torch.zeros(3).long()}, r"seeds must be int64 \[2\] on cpu, got torch.int64 \[3\]"),
        ({"offsets": torch.zeros(2)}, r"offsets must be int64 \[2\] on cpu, got torch.float32 \[2\]"),
        ({"temperature": -0.1}, "temperature must be 0, or finite and at least 1e-06, got -0.1"),
        ({"temperature": 1e-39}, "temperature must be .* got 1e-39"),
        ({"temperature": torch.tensor([1.0, 1e-39])}, "temperature must be .* at least 1e-06, got"),
        ({"temperature": math.nan}, "temperature must be .* got nan"),
        ({"temperature": math.inf}, "temperature must be .* got inf"),
        ({"temperature": torch.tensor([1.0, -1.0])}, r"temperature must be .* got \[1.0, -1.0\]"),
        ({"temperature": torch.ones(2, 1)}, r"a number or \[2\] on cpu.* got torch.float32 \[2, 1\]"),
        ({"top_k": -1}, r"top_k must be an integer of at least 0, below 2\^63, got -1"),
        ({"top_k": 2**63}, "top_k must be an integer .* got 9223372036854775808"),
        ({"top_k": 1.5}, "top_k must be an integer .* got 1.5"),
        ({"top_k": torch.ones(2)}, r"an integer of at least 0, below 2\^63; got torch.float32 \[2\]"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": torch.tensor([1.0, 1.5])}, "top_p must be above 0 and at most 1, got"),
        ({"min_p": 1.1}, "min_p must be 0 to 1, got 1.1"),
        ({"min_p": torch.tensor([0.0, math.nan])}, "min_p must be 0 to 1, got"),
    ],
)
def test_wrong_arguments(parameters, message):
    numbers = {"logits": torch.zeros(2, 9), "seeds": torch.zeros(2).long(), "offsets": torch.zeros(2).long()}
    arguments = numbers | OFF | parameters
    with pytest.raises(ValueError, match=message):
        sample(arguments.pop("logits"), **arguments)
