"""lora_linear and lora_mlp against PEFT's layers and against the frozen layers alone, and what each keeps in memory.

On a CPU the step is also measured with the allocator that Python comes with, in a process of its own: there every
result of PEFT's that we don't make waits for the system's page faults, as it does for most users.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from elementwise import DEVICE, DTYPE, randn, step
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain import ops
from posttrain.bench.interleave import Comparison, Spread, interleave
from posttrain.models import prepare
from posttrain.ops import LoraLayer
from posttrain.ops.layout import PackedLayout

TOKENS, WIDTH, HEIGHTS, RANK = (8192, 4096, (4096, 14336), 16) if DEVICE == "cuda" else (2048, 1024, (4096,), 16)
FORWARD, STEP = (1.05, 1.0) if DEVICE == "cuda" else (1.08, 1.3)  # of the frozen layer's time; of PEFT's speed
KEPT = 0.6
each_height = pytest.mark.parametrize("height", HEIGHTS)


def _peft(**shapes: tuple[int, int]) -> nn.ModuleDict:
    """Frozen linear layers in PEFT's LoRA."""
    layers = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
    layers.to(DEVICE, DTYPE)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(shapes), init_lora_weights=False)
    inject_adapter_in_model(config, layers)
    return layers


def _ours(layer) -> LoraLayer:
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return LoraLayer(layer.base_layer.weight, a, b, layer.scaling["default"])


def _three_calls(x: Tensor, layer: LoraLayer) -> Tensor:
    """Three GEMMs of the library, the last adding to the first."""
    low = functional.linear(x, layer.lora_a)
    return torch.addmm(functional.linear(x, layer.weight), low, layer.lora_b.T, alpha=layer.scaling)


def _linear(height: int) -> tuple[dict[str, Callable[..., Tensor]], Tensor]:
    layers = _peft(layer=(WIDTH, height))
    layer = _ours(layers["layer"])
    functions = {
        "frozen layer alone": lambda x: functional.linear(x, layer.weight),
        "PEFT": layers["layer"],
        "three calls": lambda x: _three_calls(x, layer),
        "posttrain": lambda x: ops.lora_linear(x, *layer),
    }
    return functions, randn(TOKENS, WIDTH)


def _each_way(calls: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """On a GPU also our call with the large products fused with those of rank R, and with the library's."""
    if DEVICE == "cpu":
        return calls
    from posttrain.kernels import lora as kernels

    def forced(fused: bool) -> None:
        default, kernels.fused = kernels.fused, lambda x: fused
        try:
            calls["posttrain"]()
        finally:
            kernels.fused = default

    return {**calls, "posttrain, fused": lambda: forced(True), "posttrain, library": lambda: forced(False)}


def _name(name: str, height: int) -> str:
    return name if height == HEIGHTS[0] else f"{name}-{height}"


@each_height
def test_lora_linear_forward(height, publish) -> None:
    functions, x = _linear(height)
    with torch.no_grad():
        calls = _each_way({name: (lambda f=f: f(x)) for name, f in functions.items()})
        comparison = interleave(calls, baseline="frozen layer alone", rounds=21)
    cost = 1 / comparison.speedup["posttrain"].median
    title = f"lora_linear forward [{TOKENS}, {WIDTH}] x [{height}, {WIDTH}], rank {RANK}"
    publish(_name("lora_linear-forward", height), title, comparison, cost=cost, target=FORWARD)
    assert cost <= FORWARD


@each_height
def test_lora_linear(height, publish) -> None:
    comparison = steps(height)
    publish(_name("lora_linear", height), _step_title(height), comparison, target=STEP)
    if DEVICE == "cuda":
        assert comparison.speedup["posttrain"].median >= STEP
        assert comparison.speedup["posttrain"].median >= comparison.speedup["three calls"].median


@pytest.mark.skipif(DEVICE == "cuda", reason="the system's allocator is a matter of the CPU")
def test_lora_linear_with_memory_from_the_system(publish) -> None:
    program = "import json, bench_lora; print(json.dumps(bench_lora.steps(bench_lora.HEIGHTS[0], False).as_dict()))"
    here = Path(__file__).parent
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=here)
    result = json.loads(run.stdout.splitlines()[-1])
    spreads = ({name: Spread(**spread) for name, spread in result[key].items()} for key in ("seconds", "speedup"))
    comparison = Comparison(result["baseline"], *spreads)
    publish("lora_linear-system-memory", f"{_step_title(HEIGHTS[0])}, memory from the system", comparison, target=STEP)
    assert comparison.speedup["posttrain"].median >= STEP


def steps(height: int, keep_freed_memory: bool = True) -> Comparison:
    """Forward and backward of the layer, against PEFT's."""
    functions, x = _linear(height)
    calls = _each_way({name: step(function, [x]) for name, function in functions.items()})
    return interleave(calls, baseline="PEFT", rounds=21, keep_freed_memory=keep_freed_memory)


def _step_title(height: int) -> str:
    return f"lora_linear forward and backward [{TOKENS}, {WIDTH}] x [{height}, {WIDTH}], rank {RANK}"


def test_lora_mlp(publish) -> None:
    inner = HEIGHTS[-1]
    layers = _peft(gate=(WIDTH, inner), up=(WIDTH, inner), down=(inner, WIDTH))
    mine = [_ours(layers[name]) for name in ("gate", "up", "down")]
    functions = {
        "PEFT": lambda x: layers["down"](functional.silu(layers["gate"](x)) * layers["up"](x)),
        "posttrain": lambda x: ops.lora_mlp(x, *mine),
    }
    x = randn(TOKENS, WIDTH)
    kept = {name: _saved_bytes(lambda f=f: f(x.requires_grad_()), layers) for name, f in functions.items()}
    steps = {name: step(function, [x]) for name, function in functions.items()}
    comparison = interleave(steps, baseline="PEFT", rounds=11)
    ratio = kept["posttrain"] / kept["PEFT"]
    title = f"lora_mlp forward and backward [{TOKENS}, {WIDTH}], {inner} inside, rank {RANK}"
    publish("lora_mlp", title, comparison, kept_bytes=kept, kept_ratio=ratio, target=KEPT)
    assert ratio <= KEPT


@pytest.mark.parametrize("key_heads", [4, 16])
def test_activations_of_a_decoder_layer(key_heads, report) -> None:
    """A Llama layer with heads 64 wide and PEFT's adapters, as transformers runs it and after `prepare`."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=WIDTH,
        intermediate_size=HEIGHTS[-1],
        num_hidden_layers=1,
        num_attention_heads=WIDTH // 64,
        num_key_value_heads=key_heads,
        attn_implementation="sdpa",
    )
    lora = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config).to(DEVICE, DTYPE), lora)
    body = model.get_base_model().model
    x, positions = randn(1, TOKENS, WIDTH).requires_grad_(), torch.arange(TOKENS, device=DEVICE)[None]
    inputs = {"position_embeddings": body.rotary_emb(x, positions), "position_ids": positions}
    kept = {"PEFT": _saved_bytes(lambda: body.layers[0](x, **inputs), model)}
    prepare(model)
    inputs["layout"] = PackedLayout.from_lengths([TOKENS]).to(DEVICE)
    kept["posttrain"] = _saved_bytes(lambda: body.layers[0](x, **inputs), model)
    ratio = kept["posttrain"] / kept["PEFT"]
    sizes = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in kept.items())
    lines = [f"activations of a decoder layer, {TOKENS} tokens, {key_heads} key heads: {sizes}, ratio {ratio:.3f}"]
    report(f"lora-activations-{key_heads}", lines, kept_bytes=kept, ratio=ratio, target=KEPT)
    assert ratio <= KEPT


def _saved_bytes(run: Callable[[], Tensor], layers: nn.Module) -> int:
    """Bytes of the distinct storages, other than parameters', that `run()` leaves for the backward."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kept = run()
    assert kept.grad_fn is not None
    held = {p.untyped_storage().data_ptr() for p in layers.parameters()}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return sum(size for address, size in sizes.items() if address not in held)
