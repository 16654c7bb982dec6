"""Cases small enough for a test, of one op each."""

import pytest
import torch

from posttrain.bench.case import BOTH, FORWARD, Case, Problem, Work


def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@pytest.fixture
def make_case():
    """`make_case(ours=..., plain=..., peers=...)`: a case on 16 numbers, by default twice the argument."""

    def make(ours=doubled, plain=doubled, peers=None, need=0.0, dtype=torch.float32) -> Case:
        def problem() -> Problem:
            x = torch.linspace(-1, 1, 16).to(dtype).requires_grad_()
            return Problem((x,), ours, plain)

        work = {FORWARD: Work(16, 128), BOTH: Work(32, 256)}
        return Case("rope", "tiny", need, problem, work, peers or {})

    return make
