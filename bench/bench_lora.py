"""lora_linear and lora_mlp against PEFT's layers and against the frozen layers alone, and what each keeps in memory."""

from collections.abc import Callable

import pytest
import torch
from elementwise import DEVICE, DTYPE, randn, step
from interleave import interleave
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional

from posttrain import ops
from posttrain.ops import LoraLayer

TOKENS, WIDTH, HEIGHT, RANK = 2048, 1024, 4096, 16
KEPT = 0.6


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


def _linear() -> tuple[dict[str, Callable[..., Tensor]], Tensor]:
    layers = _peft(layer=(WIDTH, HEIGHT))
    layer = _ours(layers["layer"])
    functions = {
        "frozen layer alone": lambda x: functional.linear(x, layer.weight),
        "PEFT": layers["layer"],
        "posttrain": lambda x: ops.lora_linear(x, *layer),
    }
    return functions, randn(TOKENS, WIDTH)


def test_lora_linear_forward(publish) -> None:
    functions, x = _linear()
    with torch.no_grad():
        calls = {name: (lambda f=f: f(x)) for name, f in functions.items()}
        comparison = interleave(calls, baseline="frozen layer alone", rounds=21)
    cost = 1 / comparison.speedup["posttrain"].median
    title = f"lora_linear forward [{TOKENS}, {WIDTH}] x [{HEIGHT}, {WIDTH}], rank {RANK}"
    publish("lora_linear-forward", title, comparison, cost=cost, target=1.08)
    assert cost <= 1.08


def test_lora_linear(publish) -> None:
    functions, x = _linear()
    steps = {name: step(function, [x]) for name, function in functions.items()}
    comparison = interleave(steps, baseline="PEFT", rounds=21)
    title = f"lora_linear forward and backward [{TOKENS}, {WIDTH}] x [{HEIGHT}, {WIDTH}], rank {RANK}"
    publish("lora_linear", title, comparison, target=1.3)
    assert comparison.speedup["posttrain"].median >= 1.3


def test_lora_mlp(publish) -> None:
    layers = _peft(gate=(WIDTH, HEIGHT), up=(WIDTH, HEIGHT), down=(HEIGHT, WIDTH))
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
    title = f"lora_mlp forward and backward [{TOKENS}, {WIDTH}], {HEIGHT} inside, rank {RANK}"
    publish("lora_mlp", title, comparison, kept_bytes=kept, kept_ratio=ratio, target=KEPT)
    assert ratio <= KEPT


@pytest.mark.parametrize("grouped", [True, False], ids=["4 key heads", "16 key heads"])
def test_activations_of_a_decoder_layer(grouped, report) -> None:
    """A layer of width 1024 with 16 heads of 64, norms and attention our own, only the linear layers PEFT's or ours."""
    keys = 256 if grouped else WIDTH
    square = {"q": (WIDTH, WIDTH), "k": (WIDTH, keys), "v": (WIDTH, keys), "o": (WIDTH, WIDTH)}
    layers = _peft(**square, gate=(WIDTH, HEIGHT), up=(WIDTH, HEIGHT), down=(HEIGHT, WIDTH))
    mine = {name: _ours(layer) for name, layer in layers.items()}
    norms = torch.ones(2, WIDTH, device=DEVICE, dtype=DTYPE)
    x = randn(TOKENS, WIDTH).requires_grad_()

    def decoder(qkv: Callable, o: Callable, mlp: Callable) -> Tensor:
        layout = ops.layout.PackedLayout.from_lengths([TOKENS]).to(DEVICE)
        q, k, v = (t.view(TOKENS, -1, 64) for t in qkv(ops.rms_norm(x, norms[0])))
        middle = x + o(ops.packed_attention(q, k, v, layout).view(TOKENS, WIDTH))
        return middle + mlp(ops.rms_norm(middle, norms[1]))

    def peft() -> Tensor:
        mlp = lambda t: layers["down"](functional.silu(layers["gate"](t)) * layers["up"](t))  # noqa: E731
        return decoder(lambda t: [layers[name](t) for name in "qkv"], layers["o"], mlp)

    def posttrain() -> Tensor:
        return decoder(
            lambda t: ops.lora_qkv(t, mine["q"], mine["k"], mine["v"]),
            lambda t: ops.lora_linear(t, *mine["o"]),
            lambda t: ops.lora_mlp(t, mine["gate"], mine["up"], mine["down"]),
        )

    kept = {run.__name__: _saved_bytes(run, layers) for run in (peft, posttrain)}
    ratio = kept["posttrain"] / kept["peft"]
    name = f"lora-activations-{'gqa' if grouped else 'mha'}"
    lines = [f"activations of a decoder layer, {TOKENS} tokens: {kept}, ratio {ratio:.2f}"]
    report(name, lines, kept_bytes=kept, ratio=ratio, target=KEPT)
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
