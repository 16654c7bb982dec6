"""What trainers save under enable() loads in a process that has no posttrain, and gives the same logits."""

import subprocess
import sys

import pytest
import torch
from tiny_model import build_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import posttrain

IDS = list(range(2, 30))
LOADER = """
import sys
sys.modules["posttrain"] = None  # importing it is an error from here on
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, trained, adapter, ids, out = sys.argv[1:]
ids = torch.tensor([[int(i) for i in ids.split(",")]])
found = [AutoModelForCausalLM.from_pretrained(trained, dtype="float32")]
found.append(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), adapter))
with torch.no_grad():
    torch.save([model.eval()(ids).logits for model in found], out)
assert not [name for name in sys.modules if name.startswith("posttrain.")]
"""


def saved(folder, base, **options):
    """The logits of a model after two steps of TRL's SFT under enable(); its checkpoint is in `folder`."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    posttrain.enable()
    try:
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(base, dtype="float32"),
            args=SFTConfig(
                output_dir=str(folder), max_steps=2, save_steps=2, report_to="none", use_cpu=True, bf16=False
            ),
            train_dataset=Dataset.from_list([{"text": f"{n} and {n + 1} are {2 * n + 1}."} for n in range(16)]),
            processing_class=AutoTokenizer.from_pretrained(base),
            **options,
        )
        trainer.train()
    finally:
        posttrain.disable()
    with torch.no_grad():
        return trainer.model.eval()(torch.tensor([IDS])).logits


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_and_adapters_load_without_posttrain(tmp_path):
    from peft import LoraConfig

    base = build_model(tmp_path / "base")
    full = saved(tmp_path / "full", base)
    adapted = saved(tmp_path / "lora", base, peft_config=LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    folders = [base, tmp_path / "full/checkpoint-2", tmp_path / "lora/checkpoint-2"]
    out = tmp_path / "logits.pt"
    arguments = [*map(str, folders), ",".join(map(str, IDS)), str(out)]
    run = subprocess.run([sys.executable, "-c", LOADER, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for found, expected in zip(torch.load(out), (full, adapted), strict=True):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        untrained = AutoModelForCausalLM.from_pretrained(base, dtype="float32")(torch.tensor([IDS])).logits
    assert not any(torch.allclose(untrained, logits, atol=1e-6) for logits in (full, adapted))
