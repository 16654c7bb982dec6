"""The main job: SFT, DPO and GRPO of a small model from random weights, and what it learnt.

    python examples/demo.py [--output_dir runs/demo-1] [--seed N] [--max_steps N]

A miniature of DeepSeek-R1's recipe (arXiv 2501.12948). The cold start, SFT, shows the model worked arithmetic and, more
often, answers without work, so it mostly guesses. DPO prefers right answers among its own samples to wrong ones. GRPO
draws new answers all the time and rewards the right ones. Working a problem out pays, so answers grow longer.

Prints the share of held-out problems answered right after each stage, with samples, and leaves a run folder with
metrics, curves, report.html and checkpoints that plain transformers loads.
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
from demo_report import Answer, write_report

from posttrain import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from posttrain.models import load
from posttrain.rewards import exact_match
from posttrain.rollout import Completion, Engine, SamplingParams
from posttrain.train.config import read_yaml

EXAMPLES = Path(__file__).parent
BATCH = 100
SAMPLES = 4
PAIR_PROMPTS = 500


@dataclass
class Demo:
    """What the stages hand on.

    Attributes:
        output_dir: the run folder.
        model_dir: folder of the newest model.
        settings: overrides of the YAML settings of every stage.
        seed: of the weights, the data order and the samples.
        scores: held-out exact match after each stage, by name of the stage.
        answers: some held-out answers after each stage.
    """

    output_dir: Path
    model_dir: Path
    settings: dict[str, Any]
    seed: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    answers: dict[str, list[Answer]] = field(default_factory=dict)


def start(demo: Demo) -> None:
    """A tiny model with seeded random weights."""
    make_tiny_model.write(demo.model_dir, seed=demo.seed)
    score(demo, "start")


def sft(demo: Demo) -> None:
    """The cold start: supervised fine-tuning on worked and hasty answers."""
    paths = {"data": str(data_file("cold-start")), "eval_data": str(data_file("test"))}
    train(demo, "sft", SFTTrainer, SFTConfig, paths)


def dpo(demo: Demo) -> None:
    """Direct preference optimisation on pairs of the model's own answers."""
    pairs = demo.output_dir / "pairs.jsonl"
    write_rows(pairs, preference_pairs(demo))
    train(demo, "dpo", DPOTrainer, DPOConfig, {"data": str(pairs)})


def grpo(demo: Demo) -> None:
    """Group-relative policy optimisation on whether answers are right."""
    prompts = demo.output_dir / "prompts.jsonl"
    write_rows(prompts, [{"prompt": chat[:-1], "answer": chat[-1]["content"]} for chat in read_chats("train")])
    train(demo, "grpo", GRPOTrainer, GRPOConfig, {"data": str(prompts)})


STAGES: list[Callable[[Demo], None]] = [start, sft, dpo, grpo]


def train(demo: Demo, stage: str, trainer: Any, config: Any, paths: dict[str, str]) -> None:
    """Run a trainer with the settings of examples/<stage>.yaml on the newest model, and score the result."""
    values = read_yaml(EXAMPLES / f"{stage}.yaml") | paths | {"seed": demo.seed}
    values |= {"model": str(demo.model_dir), "output_dir": str(demo.output_dir / stage)}
    demo.model_dir = trainer(args=config.from_mapping(values | demo.settings)).train().checkpoint
    score(demo, stage)


def preference_pairs(demo: Demo) -> list[dict[str, Any]]:
    """A right and a wrong answer to the same problem, for each problem that the newest model answers in both ways."""
    chats = read_chats("train")[:PAIR_PROMPTS]
    model, tokenizer = load(demo.model_dir)
    with Engine(model, tokenizer) as engine:
        drawn = engine.generate([chat[:-1] for chat in chats], SamplingParams(n=8, max_tokens=64, seed=demo.seed))
    pairs = []
    for chat, completions in zip(chats, drawn, strict=True):
        marks = exact_match([], [each.text for each in completions], answer=[chat[-1]["content"]] * len(completions))
        right, wrong = (first(completions, marks, mark) for mark in (1.0, 0.0))
        if right and wrong:
            pairs.append({"prompt": chat[:-1], "chosen": assistant(right), "rejected": assistant(wrong)})
    print(f"{len(pairs)} of {len(chats)} problems have right and wrong answers among 8 samples", flush=True)
    return pairs


def first(completions: list[Completion], marks: list[float | None], mark: float) -> str | None:
    """The first whole answer with this mark."""
    found = (each.text for each, own in zip(completions, marks, strict=True) if own == mark)
    return next(found, None)


def assistant(text: str) -> list[dict[str, str]]:
    """A chat's last message."""
    return [{"role": "assistant", "content": text}]


def score(demo: Demo, stage: str) -> None:
    """Let plain transformers load the newest model and answer the held-out problems; print some answers."""
    chats = read_chats("test")
    texts = generate(demo.model_dir, [chat[:-1] for chat in chats])
    marks = exact_match([], texts, answer=[chat[-1]["content"] for chat in chats])
    answers = [
        Answer(chat[-2]["content"], text, mark or 0.0) for chat, text, mark in zip(chats, texts, marks, strict=True)
    ]
    demo.scores[stage] = sum(answer.mark for answer in answers) / len(answers)
    demo.answers[stage] = answers[:: -(-len(answers) // SAMPLES)]
    print(f"\nafter {stage}: {demo.scores[stage]:.1%} of {len(answers)} held-out problems right; for example")
    for answer in demo.answers[stage]:
        print(f"  {'right' if answer.mark else 'wrong'}  {answer.problem!r} -> {answer.text[:160]!r}")
    print(flush=True)


@torch.no_grad()
def generate(model_dir: Path, prompts: list[list[dict[str, str]]]) -> list[str]:
    """Greedy answers, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32").eval()
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    answers = []
    for at in range(0, len(texts), BATCH):
        batch = tokenizer(texts[at : at + BATCH], return_tensors="pt", padding=True, add_special_tokens=False)
        tokens = model.generate(**batch, max_new_tokens=64, do_sample=False)
        answers += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def data_file(part: str) -> Path:
    """One of the bundled files."""
    return EXAMPLES / "data" / f"arithmetic-{part}.jsonl"


def read_chats(part: str) -> list[list[dict[str, str]]]:
    """The chats of one of the bundled files."""
    lines = data_file(part).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write `rows` as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def new_folder() -> Path:
    """The first of runs/demo-1, runs/demo-2, ... that isn't there."""
    return next(folder for n in count(1) if not (folder := Path("runs") / f"demo-{n}").exists())


def main() -> int:
    """Run the stages; 1 if the model got no better."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, help="run folder (default: the next runs/demo-<n>)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the data order and the samples")
    parser.add_argument("--max_steps", type=int, help="stop every stage early")
    options = parser.parse_args()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    started = time.perf_counter()
    output_dir = options.output_dir or new_folder()
    settings = {} if options.max_steps is None else {"max_steps": options.max_steps}
    demo = Demo(output_dir, output_dir / "start", settings, options.seed)
    for stage in STAGES:
        stage(demo)

    (output_dir / "scores.json").write_text(json.dumps(demo.scores, indent=1) + "\n", encoding="utf-8")
    report = write_report(output_dir, demo.scores, demo.answers)
    summary = ", ".join(f"{share:.1%} after {stage}" for stage, share in demo.scores.items())
    print(f"exact match on held-out problems: {summary}")
    print(f"report {report}; model {demo.model_dir}; {time.perf_counter() - started:.0f} s in all")
    shares = list(demo.scores.values())
    return 0 if shares[-1] > shares[0] else 1


if __name__ == "__main__":
    sys.exit(main())
