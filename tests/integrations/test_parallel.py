"""FSDP2, DDP and Accelerate in two processes, and torch.compile: our ops keep working, or say that they can't."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny
from tolerance import assert_as_good_as
from two_processes import CHECKS

import posttrain
from posttrain.integrations import counters
from posttrain.integrations.causal_loss import loss_only, replace_loss
from posttrain.integrations.counting import forget
from posttrain.models import prepare

TESTS = Path(__file__).parents[1]


def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "two_processes.py"), str(tmp_path)]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **world, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for output in outputs:
        assert [line for line in output.splitlines() if line.startswith("passed")] == [
            f"passed: {check.__name__}" for check in CHECKS
        ], output


def ids():
    return torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))


def test_an_adapted_model_compiles_as_one_graph():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny("llama", num_hidden_layers=1), config)
    prepare(model)
    inputs = {"input_ids": ids(), "attention_mask": torch.ones(2, 9, dtype=torch.long), "labels": ids()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(**inputs, use_cache=False).loss, parameters)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(**inputs, use_cache=False).loss, parameters)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("error:Dynamo detected")
def test_the_loss_without_logits_compiles_as_one_graph():
    model = tiny("llama", num_hidden_layers=1)
    expected = model(ids(), labels=ids()).loss
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    prepare(model)
    replace_loss(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with loss_only(model):
        output = compiled(input_ids=ids(), labels=ids())
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(output.loss, list(model.parameters())), gradients)
    assert compiled(input_ids=ids(), labels=ids()).logits.shape == (2, 9, 97)


def test_compiled_forwards_do_not_share_prefixes():
    model = tiny("llama", num_hidden_layers=1)
    prepare(model)
    compiled = torch.compile(model, backend="eager")
    with posttrain.shared_prefix(model), pytest.raises(ValueError, match=r"torch.compile traces the forward"):
        compiled(input_ids=ids())


def test_accelerate_with_mixed_precision(request):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    forget()
    AcceleratorState._reset_state(True)  # there is one of it in a process, and trainers of other tests made it
    request.addfinalizer(lambda: AcceleratorState._reset_state(True))
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = tiny("llama")
    prepare(model)
    replace_loss(model)
    wrapped = accelerator.prepare(model)
    with posttrain.shared_prefix(accelerator.unwrap_model(wrapped)), loss_only(model):
        loss = wrapped(input_ids=ids(), labels=ids()).loss
    accelerator.backward(loss)
    exact = tiny("llama")(ids(), labels=ids()).loss
    with torch.autocast("cpu", torch.bfloat16):
        theirs = tiny("llama")(ids(), labels=ids()).loss
    assert_as_good_as(loss.detach().bfloat16(), theirs.bfloat16(), exact)
    fired = {what: count for what, count in counters().items() if not what.startswith("self-check")}
    assert fired == {"loss by linear_logprob": 1, "batch without padding": 1}
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
