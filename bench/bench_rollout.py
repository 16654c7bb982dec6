"""Tokens per second of the rollout engine, against `model.generate` and transformers' continuous batching.

The demo's model and a Llama of 7 million weights (vocabulary 8192, 4 layers of width 256), random weights, float32,
drawing at temperature 1 without an end-of-sequence token:

    batch    32 prompts of 16 tokens, 64 new tokens each
    shared   4 prompts of 256 tokens, 8 completions of 32 tokens each
    mixed    32 prompts of 16 tokens, 8 to 256 new tokens

(of the demo's model, which knows 256 positions, as many as fit)

`model.generate` has a static batch, padded on the left, its cache, and inference mode; it runs until its longest
completion is done. Its prompts are repeated where a prompt has several completions. The floor is the time of the linear
layers alone, as plain GEMMs with as many rows as there are sequences, measured in the same run.
"""

import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from posttrain.bench.case import Problem
from posttrain.bench.decode_peers import continuous_batching
from posttrain.bench.interleave import interleave
from posttrain.models import prepare
from posttrain.rollout import Engine, SamplingParams

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def demo():
    """The demo's model with random weights."""
    from transformers import AutoModelForCausalLM

    sys.path.insert(0, str(ROOT / "examples"))
    from make_tiny_model import write

    folder = Path(tempfile.mkdtemp()) / "model"
    write(folder, seed=0)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def llama():
    """7.1 million weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def workload(kind, config):
    """(prompts, completions of each, new tokens of each prompt), within the model's positions."""
    draw = torch.Generator().manual_seed(0)
    count, length = (4, min(256, config.max_position_embeddings - 32)) if kind == "shared" else (32, 16)
    prompts = torch.randint(3, config.vocab_size, (count, length), generator=draw).tolist()
    if kind == "shared":
        return prompts, 8, [32] * 4
    if kind == "batch":
        return prompts, 1, [64] * 32
    most = min(256, config.max_position_embeddings - length)
    return prompts, 1, [8 + round(i * (most - 8) / 31) for i in torch.randperm(32, generator=draw).tolist()]


class NoWords:
    """A tokenizer for tokens that mean nothing."""

    eos_token_id = bos_token_id = None

    def __init__(self, size):
        self._size = size

    def __len__(self):
        return self._size

    def decode(self, tokens, **options):
        return ""


def posttrain_way(model, prompts, n, lengths):
    """The engine."""
    prepare(model)
    engine = Engine(model, NoWords(model.config.vocab_size), memory=1 << 28)
    params = [SamplingParams(n=n, max_tokens=length, ignore_eos=True) for length in lengths]

    def run():
        results = engine.generate(prompts, params)
        assert [len(c.token_ids) for row in results for c in row] == [m for m in lengths for _ in range(n)]

    run.engine = engine
    return run


def generate_way(model, prompts, n, lengths):
    """`model.generate`, which takes all prompts at once."""
    rows = torch.tensor([prompt for prompt in prompts for _ in range(n)], device=DEVICE)
    longest = max(lengths)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": longest, "min_new_tokens": longest, "pad_token_id": 0}

    def run():
        with torch.inference_mode():
            out = model.generate(rows, attention_mask=torch.ones_like(rows), **options)
        assert out.shape[1] == rows.shape[1] + longest

    return run


def continuous_way(model, prompts, n, lengths):
    """`model.generate_batch`, as `posttrain bench rollout --peers` has it."""
    rows = torch.tensor([prompt for prompt in prompts for _ in range(n)])
    longest = max(lengths)
    generate = continuous_batching(Problem((), None, None, SimpleNamespace(model=model, rows=rows, length=longest)))

    def run():
        assert generate()[0].shape == (len(rows), longest)

    return run


def floor(model, rows):
    """Seconds of the linear layers for a token of each of `rows` sequences."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {m.in_features: torch.randn(rows, m.in_features, device=DEVICE) for m in layers}
    times = []
    with torch.inference_mode():
        for _ in range(30):
            start = time.perf_counter()
            for layer in layers:
                torch.nn.functional.linear(inputs[layer.in_features], layer.weight)
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


TARGETS = {"batch": 4.0, "shared": 6.0, "mixed": 6.0}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("make", [demo, llama])
def test_speed(make, kind, publish):
    model = make()
    prompts, n, lengths = workload(kind, model.config)
    new = sum(lengths) * n
    ways = {"generate": generate_way, "posttrain": posttrain_way}
    if kind == "batch":
        ways["continuous batching"] = continuous_way
    runs = {name: way(make().to(DEVICE).eval(), prompts, n, lengths) for name, way in ways.items()}
    comparison = interleave(runs, "generate", rounds=5)
    running = [sum(length > step for length in lengths) * n for step in range(max(lengths))]
    changes = [0, *(i for i, (a, b) in enumerate(pairwise(running), 1) if a != b), len(running)]
    model.to(DEVICE)
    least = sum((b - a) * floor(model, running[a]) for a, b in pairwise(changes))
    facts = {f"{name} tokens/s": new / spread.median for name, spread in comparison.seconds.items()}
    facts["posttrain time over that of its GEMMs"] = comparison.seconds["posttrain"].median / least
    facts |= runs["posttrain"].engine.stats.metrics
    publish(f"rollout-{make.__name__}-{kind}", f"Rollout, {make.__name__} {kind}", comparison, **facts)
    assert comparison.speedup["posttrain"].median >= TARGETS[kind]
    if kind == "batch":
        ours, theirs = (facts[f"{name} tokens/s"] for name in ("posttrain", "continuous batching"))
        assert ours >= 2 * theirs
