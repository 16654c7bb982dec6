"""sample, drawing tokens: what `posttrain bench sample` runs, and the same against drawing alone.

Plain PyTorch takes another pass for the log-probability, which ours gives as well; multinomial alone doesn't.
"""

import pytest
import torch
from torch import Tensor

from posttrain.bench.case import FORWARD
from posttrain.bench.cases.decode import SAMPLE_PEERS, draw, filtered
from posttrain.bench.interleave import interleave
from posttrain.bench.measure import calls_of
from posttrain.bench.suite import pytest_generate_tests, test_case

__all__ = ["pytest_generate_tests", "test_case"]
OPS = ("sample",)
FILTERS = {"plain": (0, 1.0), "top_p": (0, 0.9), "top_k-top_p": (20, 0.95)}


@pytest.mark.parametrize("size", [8192, 151936])
@pytest.mark.parametrize("name", FILTERS)
def test_sample(name, size, publish) -> None:
    problem = draw(size, *FILTERS[name])
    (logits,) = problem.arguments

    def multinomial() -> Tensor:
        return torch.multinomial(filtered(logits, *FILTERS[name]).softmax(-1), 1)

    calls, missing = calls_of(problem, SAMPLE_PEERS, FORWARD)
    result = interleave({"multinomial": multinomial, **calls}, "multinomial", rounds=15)
    publish(f"sample-{name}-{size}", f"sample {name}, {len(logits)} rows of {size}", result, **missing)
