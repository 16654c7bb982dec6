"""The main job: train a small model from random weights, and show what it learnt.

    python examples/demo.py [--output_dir runs/demo-1] [--max_steps N]

Trains examples/tiny-model on worked arithmetic by SFT with the settings of examples/sft.yaml, on two CPU cores in a few
minutes. Prints the share of held-out problems answered right before and after, shows sample answers, and leaves a run
folder with metrics, curves and a checkpoint that plain transformers loads.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import make_tiny_model
import torch

from posttrain import SFTConfig, SFTTrainer
from posttrain.rewards import exact_match
from posttrain.train.config import read_yaml

EXAMPLES = Path(__file__).parent
BATCH = 64
SAMPLES = 4


@dataclass
class Demo:
    """What the stages hand on.

    Attributes:
        output_dir: the run folder.
        model_dir: folder of the newest model.
        settings: overrides of the YAML settings of every stage.
        scores: held-out exact match after each stage, by name of the stage.
    """

    output_dir: Path
    model_dir: Path
    settings: dict[str, Any]
    scores: dict[str, float] = field(default_factory=dict)


def start(demo: Demo) -> None:
    """A tiny model with seeded random weights."""
    make_tiny_model.write(demo.model_dir, seed=0)
    score(demo, "start")


def sft(demo: Demo) -> None:
    """Supervised fine-tuning on the worked solutions."""
    paths = {
        "model": str(demo.model_dir),
        "data": str(EXAMPLES / "data" / "arithmetic-train.jsonl"),
        "eval_data": str(EXAMPLES / "data" / "arithmetic-test.jsonl"),
        "output_dir": str(demo.output_dir / "sft"),
    }
    config = SFTConfig.from_mapping(read_yaml(EXAMPLES / "sft.yaml") | paths | demo.settings)
    demo.model_dir = SFTTrainer(args=config).train().checkpoint
    score(demo, "sft")


STAGES: list[Callable[[Demo], None]] = [start, sft]


def score(demo: Demo, stage: str) -> None:
    """Let plain transformers load the newest model and answer the held-out problems; print some answers."""
    lines = (EXAMPLES / "data" / "arithmetic-test.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    prompts = [chat[:-1] for chat in chats]
    right = [chat[-1]["content"] for chat in chats]
    answers = generate(demo.model_dir, prompts)
    marks = exact_match(prompts, answers, answer=right)
    demo.scores[stage] = sum(mark or 0.0 for mark in marks) / len(marks)
    print(f"\nafter {stage}: {demo.scores[stage]:.1%} of {len(marks)} held-out problems right; for example")
    for i in range(0, len(prompts), -(-len(prompts) // SAMPLES)):
        print(f"  {'right' if marks[i] else 'wrong'}  {prompts[i][-1]['content']!r} -> {answers[i][:160]!r}")
    print(flush=True)


@torch.no_grad()
def generate(model_dir: Path, prompts: list[list[dict[str, str]]]) -> list[str]:
    """Greedy answers, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32").eval()
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    answers = []
    for first in range(0, len(texts), BATCH):
        batch = tokenizer(texts[first : first + BATCH], return_tensors="pt", padding=True, add_special_tokens=False)
        tokens = model.generate(**batch, max_new_tokens=96, do_sample=False)
        answers += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def new_folder() -> Path:
    """The first of runs/demo-1, runs/demo-2, ... that isn't there."""
    return next(folder for n in count(1) if not (folder := Path("runs") / f"demo-{n}").exists())


def main() -> int:
    """Run the stages; 1 if the model got no better."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, help="run folder (default: the next runs/demo-<n>)")
    parser.add_argument("--max_steps", type=int, help="stop training early")
    options = parser.parse_args()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    started = time.perf_counter()
    output_dir = options.output_dir or new_folder()
    settings = {} if options.max_steps is None else {"max_steps": options.max_steps}
    demo = Demo(output_dir, output_dir / "start", settings)
    for stage in STAGES:
        stage(demo)

    before, after = demo.scores["start"], demo.scores[STAGES[-1].__name__]
    (output_dir / "scores.json").write_text(json.dumps(demo.scores, indent=1) + "\n", encoding="utf-8")
    print(f"exact match on held-out problems: {before:.1%} before, {after:.1%} after")
    print(f"run folder {output_dir}; model {demo.model_dir}; {time.perf_counter() - started:.0f} s in all")
    return 0 if after > before else 1


if __name__ == "__main__":
    sys.exit(main())
