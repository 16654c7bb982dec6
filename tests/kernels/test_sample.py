"""The Triton kernel of sample, on the GPU or, small, interpreted on the CPU."""

import math

import pytest
import torch
from tolerance import assert_true_to

from posttrain import ops
from posttrain.kernels import sample as kernels

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(autouse=True)
def triton(triton_device, monkeypatch):
    """Everything here runs on Triton, in blocks that a row has more than one of."""
    monkeypatch.setattr(kernels, "BLOCK", 256)
    with ops.use_backend("triton"):
        yield


def parameters(rows: int, device: str, **given) -> dict:
    """Tensors of one number for each row."""
    off = {"temperature": [1.0], "top_k": [0], "top_p": [1.0], "min_p": [0.0]}
    return {name: torch.tensor(x * (rows + 1), device=device)[:rows] for name, x in (off | given).items()}


def draw(logits, seed=5, **given):
    seeds = torch.arange(len(logits), device=logits.device) + seed
    options = parameters(len(logits), logits.device, **given)
    return ops.sample(logits, **options, seeds=seeds, offsets=seeds * 2**33 - 1)


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": [1.0, 0.0, 0.4, 2.5], "top_k": [0, 3, 1, 5], "min_p": [0.0, 0.0, 0.0, 0.2]},
        {"top_p": [0.5, 0.9, 1e-6, 0.99], "top_k": [0, 0, 7, 30], "temperature": [0.7, 1.0, 1.0, 3.0]},
    ],
    ids=["top_k", "top_p"],
)
@pytest.mark.parametrize("size", [97, 300])
def test_draws_the_tokens_of_the_definition(size, given, triton_device) -> None:
    logits = torch.randn(4, size, generator=torch.Generator().manual_seed(size)) * 2
    tokens, logprobs = draw(logits.to(triton_device), **given)
    with ops.use_backend("reference"):
        expected, true = draw(logits.to(triton_device).double(), **given)
    assert torch.equal(tokens, expected)
    assert_true_to(logprobs, true.double())


def test_rejections_end_at_what_stays(triton_device) -> None:
    """Of many almost equal tokens few stay, so that most first draws are rejected."""
    logits = (torch.arange(300) % 7 == 3).float().repeat(3, 1) * 0.1
    logits[:, [250, 299]] = 0.2
    tokens, _ = draw(logits.to(triton_device), top_k=[2, 2, 0], top_p=[1.0, 0.5, 1e-3])
    assert set(tokens.tolist()) <= {250, 299}


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_logits_of_ten_thousand(shift, triton_device) -> None:
    logits = (torch.randn(2, 300, device=triton_device) * 64).round() / 64 + shift
    tokens, logprobs = draw(logits)
    assert_true_to(logprobs, logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_masked_ties_and_rows_without_a_distribution(triton_device) -> None:
    logits = torch.full((5, 300), -math.inf, device=triton_device)
    logits[0, 280] = 1.0
    logits[1, [7, 270]] = 2.0
    logits[2, :], logits[2, 299] = 0.0, math.nan
    logits[3, 4] = math.inf
    tokens, logprobs = draw(logits, temperature=[1.0, 0.0, 1.0], top_k=[9, 0], top_p=[0.5, 1.0])
    assert tokens.tolist() == [280, 7, 0, 0, 0]
    assert logprobs[:2].tolist() == pytest.approx([0, -math.log(2)], abs=1e-6)
    assert logprobs[2:].isnan().all()


def test_a_row_depends_on_itself_only_and_strides_do_not_matter(triton_device) -> None:
    logits = torch.randn(3, 300, 2, device=triton_device)[..., 0]
    tokens, logprobs = draw(logits, top_p=[0.9])
    for r in range(3):
        alone = draw(logits[r : r + 1].contiguous(), seed=5 + r, top_p=[0.9])
        assert torch.equal(alone[0], tokens[r : r + 1]) and torch.equal(alone[1], logprobs[r : r + 1])


def test_opcheck_and_no_rows(triton_device) -> None:
    logits, seeds = torch.randn(2, 20, device=triton_device), torch.arange(2, device=triton_device)
    arguments = *parameters(2, triton_device).values(), seeds, seeds, "triton"
    torch.library.opcheck(torch.ops.posttrain.sample, (logits, *arguments))
    assert [len(x) for x in draw(logits[:0])] == [0, 0]
