"""paged_attention and rope_cache, decoding over a paged cache: what `posttrain bench` runs, and four steps' shapes.

Those are against SDPA on caches that are already contiguous and of one length.
"""

import pytest

from posttrain.bench.case import FORWARD
from posttrain.bench.cases.decode import ATTENTION_PEERS, decode
from posttrain.bench.interleave import interleave
from posttrain.bench.measure import PLAIN, calls_of
from posttrain.bench.suite import pytest_generate_tests, test_case

__all__ = ["pytest_generate_tests", "test_case"]
OPS = ("rope_cache", "paged_attention")
SHAPES = {  # sequences, keys of each, how many of them are shared, heads and key heads, width
    "own": (32, 300, 0, (8, 8), 32),
    "shared": (32, 288, 256, (8, 8), 32),
    "grouped": (32, 288, 256, (16, 4), 64),
    "one": (1, 2048, 0, (16, 4), 64),
}


@pytest.mark.parametrize("name", SHAPES)
def test_decode(name, publish) -> None:
    sequences, keys, shared, heads, width = SHAPES[name]
    calls, missing = calls_of(decode(*SHAPES[name]), ATTENTION_PEERS, FORWARD)
    sharing = f", {shared} of them shared" if shared else ""
    title = f"decode {sequences} x {keys} keys{sharing}, {heads[0]} heads over {heads[1]} of {width}"
    publish(f"paged-attention-{name}", title, interleave(calls, PLAIN, rounds=25), **missing)
