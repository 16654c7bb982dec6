"""DPO of a 7M Llama: time of an optimizer step, losses and peak memory, against TRL.

Both train the same seeded weights (vocabulary 8192, width 256, 4 layers) in float32 on 8 pairs a step, each a prompt of
256 tokens with two answers of 64, against a frozen copy of the first weights, with TRL's defaults except activation
checkpointing (off is TRL's faster setting). The first two steps are left out.

The floor is what the step's matrix products alone take, in the sizes in which the mathematics needs them: the policy
forward and backward and the reference forward, prompts once for both answers, the head for the answers' tokens only.
"""

import random
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec

import pytest
import torch
from bench_grpo import SHAPE, model_folder

from posttrain.bench.interleave import Comparison, Spread
from posttrain.bench.memory import peaks, report_peaks

for _peer in ("datasets", "trl"):
    if find_spec(_peer) is None:  # found, not imported: that would count as memory of ours
        pytest.skip(f"compares with TRL, and {_peer} is not installed", allow_module_level=True)

PAIRS, PROMPT, ANSWER = 8, 256, 64
STEPS, SKIPPED, ROUNDS = 8, 2, 3
COMMON = {
    "learning_rate": 1e-5,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": PAIRS,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": not torch.cuda.is_available(),
    "train_sampling_strategy": "sequential",
    "disable_tqdm": True,
}


def pairs():
    """Rows of prompts of 256 tokens with two answers of 64, the end included."""
    draw = random.Random(0)
    letters = [chr(0x4E00 + n) for n in range(SHAPE["vocab_size"] - 3)]

    def text(length):
        return "".join(draw.choices(letters, k=length))

    return [
        {"prompt": text(PROMPT), "chosen": text(ANSWER - 1), "rejected": text(ANSWER - 1)} for _ in range(STEPS * PAIRS)
    ]


def our_trainer(folder, steps=STEPS):
    """posttrain's trainer, ready to train."""
    from posttrain import DPOConfig, DPOTrainer

    return DPOTrainer(str(folder), None, DPOConfig(output_dir=tempfile.mkdtemp(), max_steps=steps, **COMMON), pairs())


def trl_trainer(folder, steps=STEPS):
    """TRL's, with the times of its steps in `step_times`."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            times.append(-time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            times[-1] += time.perf_counter()

    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        args=DPOConfig(
            output_dir=tempfile.mkdtemp(),
            max_steps=steps,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
            **COMMON,
        ),
        train_dataset=Dataset.from_list(pairs()),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Clock()],
    )
    trainer.step_times = times
    return trainer


def run_ours(folder):
    """(seconds of each step, losses)."""
    trainer = our_trainer(folder)
    trainer.train()
    history = [record for record in trainer.log_history if "loss" in record]
    return [record["step_time"] for record in history][SKIPPED:], [record["loss"] for record in history]


def run_trl(folder):
    """(seconds of each step, losses)."""
    trainer = trl_trainer(folder)
    trainer.train()
    losses = [float(record["loss"]) for record in trainer.state.log_history if "loss" in record]
    return trainer.step_times[SKIPPED:], losses


def floor():
    """Seconds of the step's matrix products alone."""
    width, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    of_a_layer = [(width, width), (width // 2, width), (width // 2, width), (width, width)]
    of_a_layer += [(inner, width), (inner, width), (width, inner)]
    rows = PAIRS * (PROMPT + 2 * ANSWER)
    targets = PAIRS * 2 * ANSWER
    calls = [(rows, *shape) for shape in of_a_layer for _ in range(4 * SHAPE["num_hidden_layers"])]
    calls += [(targets, SHAPE["vocab_size"], width)] * 4  # three of the policy and one of the reference
    inputs = {(m, k): torch.randn(m, k) for m, n, k in calls} | {(n, k): torch.randn(n, k) for m, n, k in calls}

    def once():
        started = time.perf_counter()
        for m, n, k in calls:
            torch.nn.functional.linear(inputs[m, k], inputs[n, k])
        return time.perf_counter() - started

    return min(once() for _ in range(4))


def test_speed(publish):
    folder = model_folder()
    seconds, losses, floors = {"trl": [], "posttrain": []}, {}, []
    for _ in range(ROUNDS):
        floors.append(floor())
        for name, run in (("trl", run_trl), ("posttrain", run_ours)):
            steps, losses[name] = run(folder)
            seconds[name].append(statistics.median(steps))
    ratios = {name: [a / b for a, b in zip(seconds["trl"], found, strict=True)] for name, found in seconds.items()}
    comparison = Comparison(
        "trl",
        {name: Spread.of(found) for name, found in seconds.items()},
        {name: Spread.of(found) for name, found in ratios.items()},
    )
    beyond = {
        f"{name}, times the GEMM floor": statistics.median(s / f for s, f in zip(found, floors, strict=True))
        for name, found in seconds.items()
    }
    publish("dpo", "DPO step, 8 pairs of 256 + 2 x 64 tokens", comparison, **{"GEMM floor, s": min(floors)}, **beyond)
    assert max(abs(a - b) for a, b in zip(losses["trl"], losses["posttrain"], strict=True)) <= 1e-4
    assert comparison.speedup["posttrain"].median >= 2.0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(report):
    folder = str(model_folder())
    found = {}
    for name in ("trl", "our"):
        setup = f"import bench_dpo as b\nb.{name}_trainer({folder!r}, 2).train()\n"
        setup += f"trainer = b.{name}_trainer({folder!r}, 4)"
        found["posttrain" if name == "our" else name] = peaks(setup, "trainer.train()")
    beyond = report_peaks(report, "dpo-memory", "DPO, 8 pairs of 256 + 2 x 64 tokens", found)
    assert beyond["posttrain"] <= 0.5 * beyond["trl"]
