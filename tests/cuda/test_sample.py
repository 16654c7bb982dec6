"""sample with the CUDA kernels: one pass over the vocabulary, and a second look where filters reject or count."""

import math

import pytest
import torch
from tolerance import assert_true_to, assert_unbiased
from torch import Tensor

from posttrain import ops

pytestmark = pytest.mark.usefixtures("poison", "cuda")

# One row each.
FILTERS = {
    "temperature": [1.0, 0.0, 0.4, 2.5, 0.7, 1.0, 1.0, 3.0, 1e-6, 1.0, 1.0, 0.6],
    "top_k": [0, 3, 1, 5, 0, 0, 7, 30, 0, 0, 700, 40],
    "top_p": [1.0, 0.5, 1.0, 1.0, 0.5, 0.9, 1e-6, 0.99, 1.0, 1.0, 0.9, 1.0],
    "min_p": [0.0, 0.0, 0.0, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 1e-3],
}
ROWS = len(FILTERS["temperature"])


def logits_of(rows: int, size: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * spread


def draw(logits: Tensor, seed: int = 5, **given) -> tuple[Tensor, Tensor]:
    """Row r with seed + r; a list has the numbers of the first rows, and is repeated."""
    rows = len(logits)
    off = {"temperature": [1.0], "top_k": [0], "top_p": [1.0], "min_p": [0.0]}
    parameters = {name: torch.tensor(x * (rows + 1), device=logits.device)[:rows] for name, x in (off | given).items()}
    seeds = torch.arange(rows, device=logits.device) + seed
    return ops.sample(logits, **parameters, seeds=seeds, offsets=seeds * 2**33 - 1)


def draw_by_definition(logits: Tensor, **given) -> tuple[Tensor, Tensor]:
    with ops.use_backend("reference"):
        tokens, logprobs = draw(logits.cpu().double(), **given)
    return tokens, logprobs.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spread", [0.5, 4.0])
@pytest.mark.parametrize("size", [1, 97, 1500, 5003])
def test_draws_the_tokens_of_the_definition(size, spread, dtype, device) -> None:
    logits = logits_of(ROWS, size, seed=size, spread=spread).to(device, dtype)
    tokens, logprobs = draw(logits, **FILTERS)
    expected, true = draw_by_definition(logits, **FILTERS)
    assert torch.equal(tokens.cpu(), expected)
    assert_true_to(logprobs.cpu(), true)


def test_draws_the_tokens_of_the_definition_from_a_whole_vocabulary(device) -> None:
    logits = logits_of(2, 151936)
    filters = {"top_k": [0, 50], "top_p": [0.95], "temperature": [0.8]}
    tokens, logprobs = draw(logits.to(device), **filters)
    expected, true = draw_by_definition(logits, **filters)
    assert torch.equal(tokens.cpu(), expected)
    assert_true_to(logprobs.cpu(), true)


def test_rejections_end_at_what_stays(device) -> None:
    """Of many almost equal tokens few stay, so that most first draws are rejected."""
    logits = (torch.arange(1200) % 7 == 3).float().repeat(6, 1) * 0.1
    logits[:, [250, 1199]] = 0.2
    tokens, _ = draw(logits.to(device), top_k=[2, 2, 0], top_p=[1.0, 0.5, 1e-3])
    assert set(tokens.tolist()) == {250, 1199}


def test_ties_and_masked_logits(device) -> None:
    """Tokens of minus infinity are never drawn; of equal ones all stay, or the first is taken."""
    tied = torch.tensor([1.0, 3.0, 3.0, 3.0, 2.0], device=device).repeat(40, 1)
    assert set(draw(tied, temperature=[0.0])[0].tolist()) == {1}
    for filters in ({"top_k": [1]}, {"top_k": [2]}, {"top_p": [0.1]}, {"top_k": [1], "top_p": [0.5]}):
        assert set(draw(tied, **filters)[0].tolist()) == {1, 2, 3}
    one = torch.full((ROWS, 1300), -math.inf, device=device)
    one[:, 1041] = -3.0
    tokens, logprobs = draw(one, **FILTERS)
    assert set(tokens.tolist()) == {1041} and not logprobs.any()
    few = logits_of(ROWS, 1300).to(device)
    few[:, 9:] = -math.inf  # top_k of some rows is more than what has a probability
    assert torch.equal(draw(few, **FILTERS)[0].cpu(), draw_by_definition(few, **FILTERS)[0])


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_logits_of_ten_thousand(shift, device) -> None:
    logits = (logits_of(2, 1300) * 64).round() / 64 + shift
    logits[:, 600:] -= 2e4 * (shift > 0)
    tokens, logprobs = draw(logits.to(device))
    expected, true = draw_by_definition(logits)
    assert torch.equal(tokens.cpu(), expected)
    assert_true_to(logprobs.cpu(), true)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_a_distribution_says_nan_and_leaves_the_others(bad, temperature, device) -> None:
    logits = logits_of(4, 1130)
    options = {"temperature": [temperature], "top_k": [9], "top_p": [0.9]}
    expected = draw(logits.to(device), **options)
    logits[1, 1129], logits[3] = bad, -math.inf
    tokens, logprobs = draw(logits.to(device), **options)
    assert tokens[1] == tokens[3] == 0 and logprobs[[1, 3]].isnan().all()
    assert torch.equal(tokens[::2], expected[0][::2]) and torch.equal(logprobs[::2], expected[1][::2])


def test_any_rows_and_places(device) -> None:
    """A row alone, again, beside others, or anywhere in memory: the same bits."""
    logits = logits_of(ROWS, 1301).to(device)
    tokens, logprobs = draw(logits, **FILTERS)
    again = draw(logits, **FILTERS)
    assert torch.equal(again[0], tokens) and torch.equal(again[1], logprobs)
    wide = torch.full((ROWS, 1310), math.nan, device=device)
    wide[:, 3:1304] = logits
    strided = torch.stack([logits, logits * 2], 2)[..., 0]
    for other in (wide[:, 3:1304], strided):
        moved = draw(other, **FILTERS)
        assert torch.equal(moved[0], tokens) and torch.equal(moved[1], logprobs)
    for r in range(ROWS):
        own = {name: x[r : r + 1] for name, x in FILTERS.items()}
        alone = draw(logits[r : r + 1], seed=5 + r, **own)
        assert torch.equal(alone[0], tokens[r : r + 1]) and torch.equal(alone[1], logprobs[r : r + 1])


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("temperature", "top_p", "min_p") for value in (math.nan, math.inf, -1.0, 2.0, 1e-45)]
    + [("top_k", value) for value in (-1, -(2**63), 2**31 + 1, 2**63 - 1)],
)
def test_numbers_out_of_range_on_the_device_give_tokens_of_the_row(name, value, device) -> None:
    """Nobody reads a GPU's parameters to check them, and the next step looks up what was drawn."""
    logits, seeds = logits_of(4, 1300).to(device), torch.arange(4, device=device)
    ones = torch.ones(4, device=device)
    good = {"temperature": ones, "top_k": 9 * (seeds % 2), "top_p": 0.9 * ones, "min_p": 0.1 * ones}
    parameters = good | {name: torch.full_like(good[name], value)}
    tokens, _ = torch.ops.posttrain.sample(logits, *parameters.values(), seeds, seeds, "cuda")
    assert ((tokens >= 0) & (tokens < 1300)).all()
    if name == "min_p" and not value <= 1:
        assert torch.equal(tokens, logits.argmax(-1))


def test_logprobs_lean_to_no_side(device) -> None:
    logits = {seed: logits_of(2, 600, seed) for seed in range(64)}
    draws = {seed: draw(x.to(device)) for seed, x in logits.items()}

    def plain(seed: int, dtype: torch.dtype) -> Tensor:
        return logits[seed].to(dtype).log_softmax(-1).gather(-1, draws[seed][0].cpu()[:, None])[:, 0]

    assert_unbiased(
        lambda seed: draws[seed][1].cpu(),
        lambda seed: plain(seed, torch.float32),
        lambda seed: plain(seed, torch.float64),
    )


def test_opcheck_and_no_rows(device) -> None:
    logits, seeds = torch.randn(2, 20, device=device), torch.arange(2, device=device)
    ones = torch.ones(2, device=device)
    arguments = logits, ones, seeds, ones, ones * 0.1, seeds, seeds, "cuda"
    torch.library.opcheck(torch.ops.posttrain.sample, arguments)
    assert [len(x) for x in draw(logits[:0])] == [0, 0]
