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
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from posttrain.bench.interleave import Comparison, Spread
from posttrain.bench.memory import peaks, report_peaks
from posttrain.data.share import keep_apart

for _peer in ("datasets", "trl"):
    if find_spec(_peer) is None:  # found, not imported: that would count as memory of ours
        pytest.skip(f"compares with TRL, and {_peer} is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[1]
STEPS, SKIPPED, ROUNDS = 18, 3, 3
COMMON = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_steps": STEPS,
    "max_length": 256,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": not torch.cuda.is_available(),
    "train_sampling_strategy": "sequential",
    "disable_tqdm": True,
}


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


def our_trainer(folder, packing, rows=None):
    """posttrain's trainer, ready to train."""
    from posttrain import SFTConfig, SFTTrainer

    args = SFTConfig(output_dir=tempfile.mkdtemp(), packing=packing, **_batch(packing), **COMMON)
    return SFTTrainer(str(folder), args, rows or conversations())


def trl_trainer(folder, packing, rows=None):
    """TRL's, with the times of its steps in `step_times`."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            times.append(-time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            times[-1] += time.perf_counter()

    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        SFTConfig(
            output_dir=tempfile.mkdtemp(),
            packing=packing,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
            **_batch(packing),
            **COMMON,
        ),
        train_dataset=Dataset.from_list(rows or conversations()),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Clock()],
    )
    trainer.step_times = times
    return trainer


def _batch(packing):
    return {"per_device_train_batch_size": 8 if packing else 16}


def run_ours(folder, packing, rows=None):
    """(tokens per second, losses)."""
    trainer = our_trainer(folder, packing, rows)
    trainer.train()
    history = [record for record in trainer.log_history if "loss" in record]
    return _speed(history, [record["step_time"] for record in history]), [record["loss"] for record in history]


def run_trl(folder, packing, rows=None):
    """(tokens per second, losses)."""
    trainer = trl_trainer(folder, packing, rows)
    trainer.train()
    history = [record for record in trainer.state.log_history if "loss" in record]
    return _speed(history, trainer.step_times), [float(record["loss"]) for record in history]


def run_copies(folder, packing, rows):
    """As `run_ours`, with every example's own copy of its prompt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posttrain.train.source.share_prefixes", keep_apart)
        return run_ours(folder, packing, rows)


def _speed(history, step_times):
    tokens = history[-1]["num_tokens"] - history[SKIPPED - 1]["num_tokens"]
    return tokens / sum(step_times[SKIPPED:])


def compare(systems, packing, rows=None):
    """(comparison with TRL, median tokens per second, losses of the last round) of systems that take turns."""
    folder = model_folder()
    speeds = {name: [] for name in systems}
    losses = {}
    for _ in range(ROUNDS):
        for name, run in systems.items():
            speed, losses[name] = run(folder, packing, rows)
            speeds[name].append(speed)
    ratios = {name: [a / b for a, b in zip(s, speeds["trl"], strict=True)] for name, s in speeds.items()}
    seconds = {name: Spread.of([1e3 / v for v in s]) for name, s in speeds.items()}  # of 1000 tokens
    comparison = Comparison("trl", seconds, {name: Spread.of(r) for name, r in ratios.items()})
    return comparison, {f"{name} tokens/s": statistics.median(s) for name, s in speeds.items()}, losses


@pytest.mark.parametrize(("packing", "limit"), [(False, 2.0), (True, 1.2)], ids=["no packing", "packing"])
def test_speed(packing, limit, publish):
    comparison, facts, losses = compare({"trl": run_trl, "posttrain": run_ours}, packing)
    name = "sft-packing" if packing else "sft"
    publish(name, f"SFT {'with' if packing else 'without'} packing, per 1000 tokens", comparison, **facts)
    if not packing:  # with packing, the bins of the two differ
        assert max(abs(a - b) for a, b in zip(losses["trl"], losses["posttrain"], strict=True)) <= 1e-4
    assert comparison.speedup["posttrain"].median >= limit


def test_shared_prompts(publish, monkeypatch):
    monkeypatch.setitem(COMMON, "max_steps", 8)
    systems = {"trl": run_trl, "posttrain": run_ours, "posttrain, copies of prompts": run_copies}
    comparison, facts, losses = compare(systems, False, completions(16))
    publish("sft-shared-prompts", "SFT with 8 completions per prompt, per 1000 tokens", comparison, **facts)
    for system in systems:
        assert max(abs(a - b) for a, b in zip(losses["trl"], losses[system], strict=True)) <= 1e-4
    assert facts["posttrain tokens/s"] >= 2 * facts["posttrain, copies of prompts tokens/s"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("packing", [False, True], ids=["no packing", "packing"])
def test_memory(packing, report):
    folder = str(model_folder())
    found = {}
    for name in ("trl", "our"):
        setup = f"import bench_sft as b\nb.COMMON['max_steps'] = 2\nb.{name}_trainer({folder!r}, {packing}).train()\n"
        setup += f"b.COMMON['max_steps'] = b.STEPS\ntrainer = b.{name}_trainer({folder!r}, {packing})"
        found["posttrain" if name == "our" else name] = peaks(setup, "trainer.train()")
    beyond = report_peaks(
        report, f"sft-memory{'-packing' if packing else ''}", f"SFT {'with' if packing else 'without'} packing", found
    )
    assert beyond["posttrain"] <= 0.7 * beyond["trl"]
