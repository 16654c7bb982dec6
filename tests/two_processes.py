"""For integrations/test_parallel.py, in two processes on the CPU: our ops under FSDP2, and under DDP in Trainer."""

import os
import sys

import torch
import torch.distributed as dist
from prompted_batches import padded
from tiny_models import tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import posttrain
from posttrain.integrations import counters
from posttrain.integrations.causal_loss import loss_only
from posttrain.integrations.counting import forget
from posttrain.integrations.models import attach, detach
from posttrain.ops import linear_logprob


def batch(rank):
    """Three of six rows, with labels for their tokens."""
    rows = {name: x[3 * rank : 3 * rank + 3] for name, x in padded("right").items()}
    return {**rows, "labels": rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)}


def shard(model, *parts):
    for part in (*parts, model):
        fully_shard(part, mesh=MESH)
    return model


def assert_gradients(model, truth):
    """Those of `model` after its backward in both processes are those of `truth`, which sees both halves."""
    for rank in range(2):
        (truth(**batch(rank)).loss / 2).backward()
    names = [name for name, parameter in truth.named_parameters() if parameter.requires_grad]
    found, expected = dict(model.named_parameters()), dict(truth.named_parameters())
    for name in names:
        assert isinstance(found[name], DTensor)
        theirs = expected[name].grad.float()
        torch.testing.assert_close(found[name].grad.full_tensor(), theirs, msg=lambda text, name=name: name + text)


def shared_prefixes_under_fsdp2():
    model = tiny("qwen3")
    posttrain.patch(model)
    shard(model, *model.model.layers)
    with posttrain.shared_prefix(model):
        model(**batch(RANK)).loss.backward()
    assert_gradients(model, tiny("qwen3", torch.float64))
    assert counters() == {"self-check of the layers of Qwen3Model passed": 1, "batch with shared prefixes": 1}


def loss_without_logits_under_fsdp2():
    for head_alone in (False, True):
        forget()
        model = tiny("qwen3")
        attach(model)
        shard(model, *model.model.layers, *([model.lm_head] if head_alone else []))
        with loss_only(model):
            output = model(**batch(RANK))
        output.loss.backward()
        assert_gradients(model, tiny("qwen3", torch.float64))
        assert counters()["loss by linear_logprob"] == 1 and output.logits is None
        detach()
        assert type(model).__bases__ == (FSDPModule, type(tiny("qwen3")))
        assert type(model.model.layers[0]).__name__ == "FSDPQwen3DecoderLayer"
        torch.testing.assert_close(model(**batch(RANK)).loss, output.loss)


def what_is_sharded_gets_our_ops_later():
    model = tiny("qwen3")
    before = [type(module) for module in shard(model, *model.model.layers).modules()]
    posttrain.enable()
    forget()
    attach(model)
    assert type(model).__name__ == "FSDPQwen3ForCausalLM" and isinstance(model.model.layers[0], FSDPModule)
    with loss_only(model), posttrain.shared_prefix(model):
        model(**batch(RANK)).loss.backward()
    assert_gradients(model, tiny("qwen3", torch.float64))
    left_out = "self-check of layers left out: weights are divided among processes"
    fired = ("model prepared", left_out, "loss by linear_logprob", "batch with shared prefixes")
    assert counters() == dict.fromkeys([*fired, "self-check of the language head passed"], 1), counters()
    posttrain.disable()
    assert [type(module).__mro__[1:] for module in model.modules()] == [cls.__mro__[1:] for cls in before]


def fsdp2_of_accelerate():
    """Accelerate's own code, which it leaves out on a CPU, where its plugin is ignored and it takes DDP."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Qwen3DecoderLayer"]
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert not accelerator.is_fsdp2
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model = tiny("qwen3")
    posttrain.enable()
    forget()
    attach(model)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    for _ in range(2):
        attach(accelerator.unwrap_model(model))  # as a trainer does that is used again
        optimizer.zero_grad()
        with loss_only(model), posttrain.shared_prefix(model):
            loss = model(**batch(RANK)).loss
        accelerator.backward(loss)
    assert_gradients(model, tiny("qwen3", torch.float64))
    fired = counters()
    assert fired["loss by linear_logprob"] == fired["batch with shared prefixes"] == 2
    assert fired["self-check of the layers of Qwen3Model passed"] == 1
    optimizer.step()
    posttrain.disable()
    AcceleratorState._reset_state(True)


def tensor_parallel_model():
    folder = f"{sys.argv[1]}/model"
    tiny("llama", num_key_value_heads=4, vocab_size=98).save_pretrained(folder)  # by the first process
    dist.barrier()

    def loaded():
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)

    theirs = loaded()
    theirs(**batch(0)).loss.backward()
    posttrain.enable()
    model = loaded()
    with loss_only(model), posttrain.shared_prefix(model):
        output = model(**batch(0))
    output.loss.backward()
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor)
    for ours, parameter in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, parameter.grad)
    (said,) = (what for what in counters() if "loss left to transformers" in what)
    assert "the head is divided among processes (DTensor)" in said
    assert counters()["batch with shared prefixes"] == 1
    posttrain.disable()


def adapters_whose_layers_are_sharded_one_by_one():
    from peft import LoraConfig, get_peft_model

    def adapted(dtype):
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        torch.manual_seed(0)
        return get_peft_model(tiny("llama", dtype), config).to(dtype)

    model = adapted(torch.float32)
    posttrain.patch(model)
    shard(model, *(layer.mlp.up_proj for layer in model.get_base_model().model.layers))
    model(**batch(RANK)).loss.backward()
    assert_gradients(model, adapted(torch.float64))


def ops_refuse_what_is_divided():
    divided = distribute_tensor(torch.randn(32, 16), MESH, [Shard(0)])
    try:
        linear_logprob(torch.randn(4, 16), divided, torch.arange(4))
    except ValueError as problem:
        assert "linear_logprob: got a DTensor [32, 16], and ops take plain tensors" in str(problem)
    else:
        raise AssertionError("no error")


def trainer_under_ddp():
    def log():
        options = {"max_steps": 2, "optim": "sgd", "logging_steps": 1, "per_device_train_batch_size": 2}
        options |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
        trainer = Trainer(
            model=tiny("qwen3"),
            args=TrainingArguments(output_dir=sys.argv[1], ddp_find_unused_parameters=False, **options),
            train_dataset=[{name: x[i] for name, x in batch(rank).items()} for rank in range(2) for i in range(3)],
        )
        trainer.train()
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        return [entry[name] for entry in trainer.state.log_history[:2] for name in ("loss", "grad_norm")]

    expected = log()
    posttrain.enable()
    found = log()
    posttrain.disable()
    assert all(abs(one - other) <= 1e-4 for one, other in zip(found, expected, strict=True))
    assert counters()["loss by linear_logprob"] == 2


CHECKS = (
    shared_prefixes_under_fsdp2,
    loss_without_logits_under_fsdp2,
    what_is_sharded_gets_our_ops_later,
    fsdp2_of_accelerate,
    tensor_parallel_model,
    adapters_whose_layers_are_sharded_one_by_one,
    ops_refuse_what_is_divided,
    trainer_under_ddp,
)

if __name__ == "__main__":
    RANK = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    MESH = init_device_mesh("cpu", (2,))
    for check in CHECKS:
        forget()
        check()
        print(f"passed: {check.__name__}", flush=True)
    dist.destroy_process_group()
