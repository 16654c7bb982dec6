"""SFT of the demo model on sequences of mixed length: tokens per second, peak memory and losses, against TRL.

Both train the same weights in float32 on the same sequences (conversations of 1 to 6 arithmetic questions, 24 to 256
tokens), 16 to a step, without activation checkpointing (which TRL would have on by default: off is its faster
setting). "packing" is TRL's option: bins of 256 tokens made best-fit decreasing, 8 to a step. A system's speed is its
tokens that are not padding over the time of its optimizer steps, the first three left out.

Shared prompts: each prompt of 216 tokens has 8 completions of 32, and a step has two prompts. Of 16 x 248 tokens
2 x (216 + 8 x 32) have to be computed, so the linear layers, which are nearly all of the work, can be 4.2 times faster
than with copies of the prompts.
"""

import json
import random
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
from trl_trainer import (
    history_of,
    in_turns,
    largest_difference,
    memory,
    posttrain_trainer,
    skip_without_trl,
    step_times,
    trl_trainer,
)

from posttrain.bench.memory import report_peaks
from posttrain.data.share import keep_apart

skip_without_trl()
ROOT = Path(__file__).parents[1]
STEPS, SKIPPED = 18, 3
SETTINGS = {"learning_rate": 1e-3, "max_length": 256, "train_sampling_strategy": "sequential"}


def conversations(count=384):
    """Rows in chat format, of 1 to 6 questions and answers each."""
    lines = (ROOT / "examples/data/arithmetic-train.jsonl").read_text().splitlines()
    turns = [json.loads(line)["messages"] for line in lines]
    draw = random.Random(0)
    return [{"messages": [m for t in draw.sample(turns, draw.randint(1, 6)) for m in t]} for _ in range(count)]


def completions(num_prompts, num_completions=8):
    """Rows of prompts of 216 tokens with completions of 32, the end included."""
    draw = random.Random(0)

    def digits(count):
        return "".join(draw.choice("0123456789") for _ in range(count))

    prompts = [digits(216) for _ in range(num_prompts)]
    return [{"prompt": prompt, "completion": digits(31)} for prompt in prompts for _ in range(num_completions)]


def model_folder():
    """The demo's model with seeded random weights."""
    sys.path.insert(0, str(ROOT / "examples"))
    from make_tiny_model import write

    folder = Path(tempfile.mkdtemp()) / "model"
    write(folder, seed=0)
    return folder


def our_trainer(folder, packing, rows=None, steps=STEPS):
    """posttrain's trainer, ready to train."""
    return posttrain_trainer("SFT", folder, rows or conversations(), max_steps=steps, **_batch(packing), **SETTINGS)


def their_trainer(folder, packing, rows=None, steps=STEPS):
    """TRL's."""
    return trl_trainer("SFT", folder, rows or conversations(), max_steps=steps, **_batch(packing), **SETTINGS)


def _batch(packing):
    return {"packing": packing, "per_device_train_batch_size": 8 if packing else 16}


def with_copies(folder, packing, rows, steps):
    """As `our_trainer`, with every example's own copy of its prompt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posttrain.train.source.share_prefixes", keep_apart)
        return our_trainer(folder, packing, rows, steps)


def compare(systems, packing, rows=None, steps=STEPS):
    """(comparison with TRL of 1000 tokens, median tokens per second, last trainers) of systems that take turns."""
    folder = str(model_folder())
    ready = {name: partial(make, folder, packing, rows, steps) for name, make in systems.items()}
    comparison, trained = in_turns(ready, SKIPPED, seconds=seconds_for_1000_tokens)
    return comparison, {f"{name} tokens/s": 1e3 / time.median for name, time in comparison.seconds.items()}, trained


def seconds_for_1000_tokens(trainer):
    """Those of the steps after the first ones, over their tokens."""
    history = history_of(trainer)
    tokens = history[-1]["num_tokens"] - history[SKIPPED - 1]["num_tokens"]
    return 1e3 * sum(step_times(trainer, SKIPPED)) / tokens


@pytest.mark.parametrize(("packing", "limit"), [(False, 2.0), (True, 1.2)], ids=["no packing", "packing"])
def test_speed(packing, limit, publish):
    comparison, facts, trained = compare({"trl": their_trainer, "posttrain": our_trainer}, packing)
    name = "sft-packing" if packing else "sft"
    publish(name, f"SFT {'with' if packing else 'without'} packing, per 1000 tokens", comparison, **facts)
    if not packing:  # with packing, the bins of the two differ
        assert largest_difference(trained) <= 1e-4
    assert comparison.speedup["posttrain"].median >= limit


def test_shared_prompts(publish):
    systems = {"trl": their_trainer, "posttrain": our_trainer, "posttrain, copies of prompts": with_copies}
    comparison, facts, trained = compare(systems, False, completions(16), steps=8)
    publish("sft-shared-prompts", "SFT with 8 completions per prompt, per 1000 tokens", comparison, **facts)
    for system in systems:
        assert largest_difference(trained, system) <= 1e-4
    assert facts["posttrain tokens/s"] >= 2 * facts["posttrain, copies of prompts tokens/s"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("packing", [False, True], ids=["no packing", "packing"])
def test_memory(packing, report):
    found = memory("bench_sft", str(model_folder()), packing)
    name, title = ("sft-memory-packing", "SFT with packing") if packing else ("sft-memory", "SFT without packing")
    beyond = report_peaks(report, name, title, found)
    assert beyond["posttrain"] <= 0.7 * beyond["trl"]
