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
from collections import Counter

import pytest
from bench_grpo import SHAPE, model_folder
from trl_trainer import (
    gemm_seconds,
    in_turns,
    largest_difference,
    memory,
    posttrain_trainer,
    skip_without_trl,
    trl_trainer,
)

from posttrain.bench.memory import report_peaks

skip_without_trl()
PAIRS, PROMPT, ANSWER = 8, 256, 64
STEPS, SKIPPED = 8, 2
SETTINGS = {
    "learning_rate": 1e-5,
    "per_device_train_batch_size": PAIRS,
    "train_sampling_strategy": "sequential",
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
    return posttrain_trainer("DPO", folder, pairs(), None, max_steps=steps, **SETTINGS)


def their_trainer(folder, steps=STEPS):
    """TRL's."""
    return trl_trainer("DPO", folder, pairs(), max_steps=steps, **SETTINGS)


def floor():
    """Seconds of the step's matrix products alone."""
    width, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    of_a_layer = [(width, width), (width, width // 2), (width, width // 2), (width, width)]
    of_a_layer += [(width, inner), (width, inner), (inner, width)]
    rows = PAIRS * (PROMPT + 2 * ANSWER)
    targets = PAIRS * 2 * ANSWER
    products = Counter((rows, *shape) for shape in of_a_layer for _ in range(4 * SHAPE["num_hidden_layers"]))
    products[targets, width, SHAPE["vocab_size"]] = 4  # three of the policy and one of the reference
    return gemm_seconds(products)


def test_speed(publish):
    folder = str(model_folder())
    floors = []

    def trl():
        floors.append(floor())
        return their_trainer(folder)

    comparison, trained = in_turns({"trl": trl, "posttrain": lambda: our_trainer(folder)}, SKIPPED)
    usual = statistics.median(floors)  # each was measured beside its round's steps
    facts = {"GEMM floor (ms)": 1e3 * usual}
    facts |= {f"{name} against the floor": time.median / usual for name, time in comparison.seconds.items()}
    publish("dpo", "DPO step, 8 pairs of 256 + 2 x 64 tokens", comparison, **facts)
    assert largest_difference(trained) <= 1e-4
    assert comparison.speedup["posttrain"].median >= 2.0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(report):
    found = memory("bench_dpo", str(model_folder()))
    beyond = report_peaks(report, "dpo-memory", "DPO, 8 pairs of 256 + 2 x 64 tokens", found)
    assert beyond["posttrain"] <= 0.5 * beyond["trl"]
