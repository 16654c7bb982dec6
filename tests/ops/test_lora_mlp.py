"""lora_mlp: true to the reference, differentiable, and frugal: it makes again what PEFT's layers keep."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from tolerance import HALF, check
from torch import Tensor, nn
from torch.nn import functional

from posttrain import ops
from posttrain.ops import LoraLayer, lora_linear, lora_mlp, lora_qkv, quantize_nf4, reference
from posttrain.ops.layout import PackedLayout
from posttrain.ops.lora_layer import flatten

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
PLAIN = {"silu": functional.silu, "gelu": functional.gelu, "gelu_tanh": partial(functional.gelu, approximate="tanh")}


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype) / 4


def operands(rows: int, width: int, inner: int, rank: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, then weight, A, B of gate, up and down."""
    shapes = [(rows, width)]
    for n, k in ((inner, width), (inner, width), (width, inner)):
        shapes += [(n, k), (rank, k), (n, rank)]
    return [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def of(op, activation: str = "silu", **options):
    """`op` as a function of the operands."""

    def call(x: Tensor, *t: Tensor) -> Tensor:
        layers = [LoraLayer(*t[i : i + 3], scaling) for i, scaling in ((0, 0.5), (3, 2.0), (6, 1.0))]
        return op(x, *layers, activation, **options)

    return call


def plain(activation: str, x: Tensor, *t: Tensor) -> Tensor:
    """What PEFT computes."""

    def layer(x: Tensor, i: int, scaling: float) -> Tensor:
        return functional.linear(x, t[i]) + functional.linear(functional.linear(x, t[i + 1]), t[i + 2]) * scaling

    return layer(PLAIN[activation](layer(x, 0, 0.5)) * layer(x, 3, 2.0), 6, 1.0)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 8, 16, 2), (1, 7, 5, 1), (63, 40, 97, 8), (300, 24, 50, 13)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_agrees_with_the_reference(activation, shape, dtype) -> None:
    check(of(lora_mlp, activation), of(reference.lora_mlp, activation), operands(*shape, dtype))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_a_normed_x(dtype) -> None:
    x, *rest = operands(20, 16, 24, 4, dtype)

    def call(op):
        return lambda x, w, *t: of(op, norm=(w, 1e-5))(x, *t)

    def peer(x, w, *t):
        return plain("silu", functional.rms_norm(x, x.shape[-1:], w, 1e-5), *t)

    check(call(lora_mlp), call(reference.lora_mlp), [4 * x, (1 + x[0]) / 4, *rest], peer)


def test_the_reference_is_the_plain_mlp() -> None:
    inputs = operands(20, 12, 16, 3, torch.float64)
    for activation in ACTIVATIONS:
        torch.testing.assert_close(of(reference.lora_mlp, activation)(*inputs), plain(activation, *inputs))


@pytest.mark.usefixtures("poison")
def test_agrees_with_dropout_strides_and_three_dimensions() -> None:
    x, *rest = operands(60, 40, 33, 5)
    options = {"dropout": 0.3, "seed": 4}
    strided = [x.view(3, 20, 40)[:, ::2], *rest]
    check(of(lora_mlp, **options), of(reference.lora_mlp, **options), strided)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_half_precision_is_as_good_as_pytorch(activation, dtype) -> None:
    inputs = operands(63, 40, 97, 8, dtype)
    check(of(lora_mlp, activation), of(reference.lora_mlp, activation), inputs, partial(plain, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation) -> None:
    inputs = [t.requires_grad_() for t in operands(3, 4, 5, 2, torch.float64)]
    assert torch.autograd.gradcheck(of(lora_mlp, activation), inputs, eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.usefixtures("poison")
def test_an_nf4_base_with_several_adapters() -> None:
    x, wg, ag, bg, wu, _, _, wd, ad, bd = operands(40, 30, 50, 4)
    adapter = torch.arange(40).remainder(3) - 1
    gate, up, down = (quantize_nf4(w, nested=nested) for w, nested in ((wg, True), (wu, False), (wd, True)))

    def call(op):
        def mlp(x, *t):
            a = [torch.stack([part, part * part]) for part in t]
            layers = [LoraLayer(gate, *a[:2], (1.0, 2.0)), LoraLayer(up), LoraLayer(down, *a[2:], 0.5)]
            return op(x, *layers, adapter=adapter)

        return mlp

    check(call(lora_mlp), call(reference.lora_mlp), [x, ag, bg, ad, bd])


def test_same_bits_every_time_and_saved_tensors_stay_as_they_are() -> None:
    results = []
    for _ in range(2):
        inputs = [t.requires_grad_() for t in operands(100, 40, 97, 8)]
        saved: list[tuple[Tensor, Tensor]] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append((t, t.clone())) or t, lambda t: t):
            y = of(lora_mlp)(*inputs)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
        for tensor, copy in saved:
            assert torch.equal(tensor, copy)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# Activation memory

WIDTH, INNER, HEADS, RANK, TOKENS = 64, 176, 4, 4, 96


def saved_bytes(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages, other than those of `parameters`, that `run()` leaves for the backward."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kept = run()
    assert kept.grad_fn is not None
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    held = {p.untyped_storage().data_ptr() for p in parameters}
    return sum(size for address, size in storages.items() if address not in held)


class Peft:
    """The linear layers `names` of `model` in PEFT's LoRA, and as ours take them."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(0)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, init_lora_weights=False)
        inject_adapter_in_model(config, model)
        self.layers: dict[str, Any] = {
            path.rpartition(".")[2]: module for path, module in model.named_modules() if hasattr(module, "lora_A")
        }

    def ours(self, name: str) -> LoraLayer:
        layer = self.layers[name]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return LoraLayer(layer.base_layer.weight, a, b, layer.scaling["default"])


def test_equals_pefts_layers_and_keeps_at_most_three_fifths_of_their_activations() -> None:
    shapes = {"gate": (WIDTH, INNER), "up": (WIDTH, INNER), "down": (INNER, WIDTH)}
    model = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
    peft = Peft(model, list(shapes))
    mine = [peft.ours(name) for name in shapes]
    x = randn(TOKENS, WIDTH, seed=1).requires_grad_()

    def mlp(x: Tensor) -> Tensor:
        return model["down"](functional.silu(model["gate"](x)) * model["up"](x))

    y, expected = lora_mlp(x, *mine), mlp(x)
    torch.testing.assert_close(y, expected)
    used = [x, *(p for p in model.parameters() if p.requires_grad)]
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), used) for out in (y, expected)), strict=True):
        torch.testing.assert_close(a, b)
    every = list(model.parameters())
    ours, theirs = saved_bytes(lambda: lora_mlp(x, *mine), every), saved_bytes(lambda: mlp(x), every)
    assert ours == 4 * TOKENS * (WIDTH + 2 * INNER)
    assert ours <= 0.6 * theirs


def test_a_decoder_layer_keeps_at_most_three_fifths_of_what_it_keeps_with_peft() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    layer = LlamaDecoderLayer(config, 0).requires_grad_(False)
    names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    peft = Peft(layer, names)
    qkv, o, mlp = ([peft.ours(name) for name in part] for part in (names[:3], names[3:4], names[4:]))
    x = randn(1, TOKENS, WIDTH, seed=1).requires_grad_()
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(TOKENS)[None])
    layout = PackedLayout.from_lengths([TOKENS])

    def ours() -> Tensor:
        norm = layer.input_layernorm
        q, k, v = (
            t.view(1, TOKENS, -1, WIDTH // HEADS) for t in lora_qkv(x, *qkv, norm=(norm.weight, norm.variance_epsilon))
        )
        q, k = ops.rope(q, k, cos, sin, unsqueeze_dim=2)
        middle = x + lora_linear(ops.packed_attention(q[0], k[0], v[0], layout).view(1, TOKENS, WIDTH), *o[0])
        norm = layer.post_attention_layernorm
        return middle + lora_mlp(middle, *mlp, norm=(norm.weight, norm.variance_epsilon))

    def theirs() -> Tensor:
        return layer(x, position_embeddings=(cos, sin))

    torch.testing.assert_close(ours(), theirs())
    every = list(layer.parameters())
    assert saved_bytes(ours, every) <= 0.6 * saved_bytes(theirs, every)


# Registration, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_opcheck(dtype) -> None:
    x, *t = (p.detach().requires_grad_() for p in operands(6, 5, 7, 2, dtype))
    norm = torch.ones(5, dtype=dtype, requires_grad=True)
    sources = (x, x, x.new_empty(0, 7))
    layers = [LoraLayer(*t[i : i + 3]) for i in (0, 3, 6)]
    flat = [f for s, layer in zip(sources, layers, strict=True) for f in flatten("lora_mlp", "layer", s, layer, False)]
    torch.library.opcheck(torch.ops.posttrain.lora_mlp, (x, *flat, None, 0.1, 3, norm, 1e-6, "silu", "cpu"))


def test_compiles_without_graph_breaks_to_the_same_bits() -> None:
    op = of(lora_mlp, dropout=0.1, seed=3)
    ours, theirs = ([t.requires_grad_() for t in operands(40, 30, 20, 4)] for _ in range(2))
    y, expected = torch.compile(op, backend="aot_eager", fullgraph=True)(*ours), op(*theirs)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(y, expected)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_wrong_arguments() -> None:
    x, *t = operands(6, 5, 7, 2)
    gate, up, down = (LoraLayer(*t[i : i + 3]) for i in (0, 3, 6))
    with pytest.raises(ValueError, match="activation must be one of silu, gelu, gelu_tanh, got 'relu'"):
        lora_mlp(x, gate, up, down, "relu")
    with pytest.raises(
        ValueError, match=r"lora_mlp: down: needs floating x \[..., K\] and weight \[N, K\]; .*\[5, 6\]"
    ):
        lora_mlp(x, gate, up, LoraLayer(down.weight[:, :6]))
    with pytest.raises(ValueError, match=r"gate and up must have one shape, got \[6, 5\] and \[7, 5\]"):
        lora_mlp(x, LoraLayer(gate.weight[:6]), up, down)


def test_backends_can_be_forced() -> None:
    inputs = operands(6, 5, 7, 2)
    with ops.use_backend("reference"):
        assert torch.equal(of(lora_mlp)(*inputs), of(reference.lora_mlp)(*inputs))
