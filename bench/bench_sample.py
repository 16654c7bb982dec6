"""Drawing tokens, against softmax and multinomial, with transformers' filters where there are some."""

import pytest
import torch
from elementwise import DEVICE
from torch import Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from posttrain import ops
from posttrain.bench.interleave import interleave

ROWS = 32
FILTERS = {"plain": {}, "top_p": {"top_p": 0.9}, "top_k-top_p": {"top_k": 20, "top_p": 0.95}}


@pytest.mark.parametrize("size", [8192, 151936])
@pytest.mark.parametrize("name", FILTERS)
def test_sample(name, size, publish) -> None:
    """Ours also gives the log-probability, which the peer would take another pass for."""
    filters = {"top_k": 0, "top_p": 1.0} | FILTERS[name]
    logits = torch.randn(ROWS, size, device=DEVICE) * 2
    seeds = torch.arange(ROWS, device=DEVICE)
    warpers = LogitsProcessorList()
    if filters["top_k"]:
        warpers.append(TopKLogitsWarper(int(filters["top_k"])))
    if filters["top_p"] < 1:
        warpers.append(TopPLogitsWarper(filters["top_p"]))

    def ours() -> tuple[Tensor, Tensor]:
        return ops.sample(logits, temperature=1.0, min_p=0.0, seeds=seeds, offsets=seeds, **filters)

    def multinomial() -> Tensor:
        return torch.multinomial(warpers(None, logits).softmax(-1), 1)

    result = interleave({"multinomial": multinomial, "posttrain": ours}, "multinomial", rounds=15)
    publish(f"sample-{name}-{size}", f"sample {name}, {ROWS} rows of {size}", result)
