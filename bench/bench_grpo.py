"""GRPO of a 7M Llama on the CPU: time of an optimizer step, generation and all, and peak memory, against TRL.

Both train the same seeded weights (vocabulary 8192, width 256, 4 layers) in float32 on 4 prompts with 8 completions
each, with the reward, loss and temperature of TRL's defaults, without activation checkpointing (off is TRL's faster
setting) and with TRL's own generation. Completions end where the policy says so, one in 8192 tokens at the start, so
both have nearly all their tokens; the mean length is reported. The first two steps are left out.

The floor is what the step's matrix products alone take, in the sizes in which the mathematics needs them: prompts once,
one token of every completion at a time, and forward and backward over all packed tokens.
"""

import random
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from trl_trainer import gemm_seconds, history_of, in_turns, memory, posttrain_trainer, skip_without_trl, trl_trainer

from posttrain.bench.memory import report_peaks

skip_without_trl()
PROMPTS, GENERATIONS, SKIPPED = 4, 8, 2
SHAPE = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
SETTINGS = {
    "learning_rate": 1e-5,
    "per_device_train_batch_size": PROMPTS * GENERATIONS,
    "num_generations": GENERATIONS,
}
SIZES = {"short prompts": (12, 64), "long prompts": (256, 32)}  # tokens of a prompt and of a completion


def model_folder():
    """The 7M Llama with seeded random weights, and a tokenizer of one token for each character."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(chr(0x4E00 + n) for n in range(SHAPE["vocab_size"] - 3))]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = Path(tempfile.mkdtemp()) / "model"
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPE, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def rows(length, count=64):
    """Prompts of `length` tokens."""
    draw = random.Random(0)
    letters = [chr(0x4E00 + n) for n in range(SHAPE["vocab_size"] - 3)]
    return [{"prompt": "".join(draw.choices(letters, k=length))} for _ in range(count)]


def even(prompts, completions, completion_ids, **columns):
    """The share of even tokens: cheap, and different for nearly every completion."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def our_trainer(folder, size, steps=8):
    """posttrain's trainer, ready to train."""
    prompt, completion = SIZES[size]
    settings = SETTINGS | {"max_steps": steps, "max_completion_length": completion, "log_completions": False}
    settings["max_tokens_per_batch"] = PROMPTS * GENERATIONS * (prompt + completion)
    return posttrain_trainer("GRPO", folder, rows(prompt), even, **settings)


def their_trainer(folder, size, steps=8):
    """TRL's."""
    prompt, completion = SIZES[size]
    settings = SETTINGS | {"max_steps": steps, "max_completion_length": completion}
    return trl_trainer("GRPO", folder, rows(prompt), even, **settings)


def floor(size):
    """Seconds of the step's matrix products alone."""
    width, inner, layers = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_hidden_layers"]
    layer = [(width, width), (width, width // 2), (width, width // 2), (width, width)]
    layer += [(width, inner), (width, inner), (inner, width)]
    head = (width, SHAPE["vocab_size"])
    prompt, completion = SIZES[size]
    drawn, steps = PROMPTS * GENERATIONS, completion - 1
    packed = PROMPTS * (prompt + GENERATIONS * completion)
    products: Counter[tuple[int, int, int]] = Counter()  # (rows, in, out) -> how many; a backward pass has two
    for k, n in layer:
        products += Counter({(PROMPTS * prompt, k, n): layers})
        products += Counter({(drawn, k, n): layers * steps})
        products += Counter({(packed, k, n): layers * 3})
    products += Counter({(PROMPTS, *head): 1})
    products += Counter({(drawn, *head): steps})
    products += Counter({(drawn * completion, *head): 3})
    return gemm_seconds(products)


@pytest.mark.parametrize(("size", "limit"), [("short prompts", 2.5), ("long prompts", 8.0)])
def test_speed(size, limit, publish):
    folder = str(model_folder())
    systems = {"trl": lambda: their_trainer(folder, size), "posttrain": lambda: our_trainer(folder, size)}
    comparison, trained = in_turns(systems, SKIPPED)
    lengths = {
        name: statistics.mean(float(record["completions/mean_length"]) for record in history_of(trainer))
        for name, trainer in trained.items()
    }
    least = floor(size)
    facts = {f"{name} tokens of a completion": found for name, found in lengths.items()}
    facts |= {"GEMM floor (ms)": 1e3 * least}
    facts |= {f"{name} against the floor": time.median / least for name, time in comparison.seconds.items()}
    prompt, completion = SIZES[size]
    title = f"GRPO, {PROMPTS} prompts of {prompt} x {GENERATIONS} completions of {completion}, per step"
    publish(f"grpo-{size.replace(' ', '-')}", title, comparison, **facts)
    assert abs(lengths["trl"] / lengths["posttrain"] - 1) < 0.02
    assert comparison.speedup["posttrain"].median >= limit


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("size", SIZES)
def test_memory(size, report):
    found = memory("bench_grpo", str(model_folder()), size)
    beyond = report_peaks(report, f"grpo-memory-{size.replace(' ', '-')}", f"GRPO, {size}", found)
    assert beyond["posttrain"] <= 0.5 * beyond["trl"]
