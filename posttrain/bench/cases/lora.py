"""lora_linear, lora_qkv and lora_mlp over frozen matrices of the models' layers.

Operations: of a frozen `[N, K]` the product in the forward and that for the gradient of x in the backward, and of the
adapter `2 R (N + K)` a row, once in the forward and twice more in the backward. Bytes are those of x, the results,
their gradients, and the weights once in each direction.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

from torch import Tensor
from torch.nn import functional

from posttrain import ops
from posttrain.bench import lora_peers as peers
from posttrain.bench.case import BOTH, FORWARD, Case, Function, Problem, Work, randn
from posttrain.bench.device import DTYPE, WIDER
from posttrain.bench.shapes import ModelShape, Suite
from posttrain.ops import LoraLayer

Shapes = dict[str, tuple[int, int]]  # (N, K) of each layer, by name
_SCALING = 2.0


def lora_linear(suite: Suite) -> list[Case]:
    """The output projection of attention."""

    def problem(model: ModelShape) -> Problem:
        shapes = {"o_proj": (model.hidden, model.heads * model.width)}
        return _problem(suite.tokens, model, shapes, _linear, _plain_linear)

    named: peers.Makers = {"PEFT": peers.peft_linear}
    return _cases(suite, "lora_linear", lambda m: f"[{m.hidden}, {m.heads * m.width}]", problem, named)


def lora_qkv(suite: Suite) -> list[Case]:
    """The projections to queries, keys and values."""

    def problem(model: ModelShape) -> Problem:
        rows, few = model.heads * model.width, model.key_heads * model.width
        shapes = {name: (n, model.hidden) for name, n in (("q_proj", rows), ("k_proj", few), ("v_proj", few))}
        return _problem(suite.tokens, model, shapes, _qkv, _plain_qkv)

    def title(m: ModelShape) -> str:
        return f"[{m.heads * m.width} + 2 x {m.key_heads * m.width}, {m.hidden}]"

    named: peers.Makers = {"PEFT": peers.peft_qkv, "Unsloth": peers.unsloth_qkv}
    return _cases(suite, "lora_qkv", title, problem, named)


def lora_mlp(suite: Suite) -> list[Case]:
    """The MLP, with SiLU or, of Gemma, the tanh form of GELU."""

    def problem(model: ModelShape) -> Problem:
        shapes = {"gate_proj": (model.inner, model.hidden), "up_proj": (model.inner, model.hidden)}
        shapes |= {"down_proj": (model.hidden, model.inner)}
        tanh = model.gate == "geglu"
        return _problem(suite.tokens, model, shapes, *((_mlp_gelu, _plain_gelu) if tanh else (_mlp_silu, _plain_silu)))

    named: peers.Makers = {"PEFT": peers.peft_mlp, "Unsloth": peers.unsloth_mlp}
    return _cases(suite, "lora_mlp", lambda m: f"{m.hidden} to {m.inner}, {m.gate}", problem, named)


def _cases(
    suite: Suite,
    op: str,
    title: Callable[[ModelShape], str],
    make: Callable[[ModelShape], Problem],
    named: peers.Makers,
) -> list[Case]:
    cases = {}
    for model in suite.models:
        full = f"[{suite.tokens}, ...] x {title(model)}, rank {model.rank}"
        numbers = 3.0 * model.hidden * model.inner + 8.0 * suite.tokens * (model.hidden + model.inner)
        need = numbers * 2 * (DTYPE.itemsize + WIDER.itemsize)
        cases[full] = Case(op, full, need, partial(make, model), (FORWARD, BOTH), named)
    return list(cases.values())


def _problem(tokens: int, model: ModelShape, shapes: Shapes, ours: Function, plain: Function) -> Problem:
    """Arguments are x, then W, A and B of each layer."""
    wide = next(iter(shapes.values()))[1]
    arguments = [randn(tokens, wide, grad=True)]
    for n, k in shapes.values():
        arguments += [randn(n, k, scale=k**-0.5), randn(model.rank, k, scale=k**-0.5, grad=True)]
        arguments += [randn(n, model.rank, scale=0.5 * model.rank**-0.5, grad=True)]
    sizes = [(n * k, model.rank * (n + k)) for n, k in shapes.values()]
    flops = [2.0 * tokens * (frozen * (1 + back) + low * (1 + 2 * back)) for back in (0, 1) for frozen, low in sizes]
    forward, both = sum(flops[: len(sizes)]), sum(flops[len(sizes) :])
    weights = sum(frozen + low for frozen, low in sizes) * DTYPE.itemsize
    ends = tokens * (wide + (shapes["down_proj"][0] if "down_proj" in shapes else sum(n for n, _ in shapes.values())))
    work = {
        FORWARD: Work(forward, weights + ends * DTYPE.itemsize),
        BOTH: Work(both, 2 * weights + 3 * ends * DTYPE.itemsize),
    }
    context = SimpleNamespace(shapes=shapes, rank=model.rank, scaling=_SCALING, gate=model.gate)
    return Problem(tuple(arguments), ours, plain, work, context)


def _layers(tensors: tuple[Tensor, ...]) -> list[LoraLayer]:
    triples = (tensors[i : i + 3] for i in range(0, len(tensors), 3))
    return [LoraLayer(weight, lora_a, lora_b, _SCALING) for weight, lora_a, lora_b in triples]


def _linear(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    return ops.lora_linear(x, weight, lora_a, lora_b, _SCALING)


def _qkv(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    q, k, v = _layers(tensors)
    return ops.lora_qkv(x, q, k, v)


def _mlp_silu(x: Tensor, *tensors: Tensor) -> Tensor:
    gate, up, down = _layers(tensors)
    return ops.lora_mlp(x, gate, up, down)


def _mlp_gelu(x: Tensor, *tensors: Tensor) -> Tensor:
    gate, up, down = _layers(tensors)
    return ops.lora_mlp(x, gate, up, down, "gelu_tanh")


def _plain_linear(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    return functional.linear(x, weight) + _SCALING * functional.linear(functional.linear(x, lora_a), lora_b)


def _plain_qkv(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(_plain_linear(x, *tensors[i : i + 3]) for i in range(0, 9, 3))


def _plain_silu(x: Tensor, *tensors: Tensor) -> Tensor:
    gate, up = _plain_linear(x, *tensors[:3]), _plain_linear(x, *tensors[3:6])
    return _plain_linear(functional.silu(gate) * up, *tensors[6:])


def _plain_gelu(x: Tensor, *tensors: Tensor) -> Tensor:
    gate, up = _plain_linear(x, *tensors[:3]), _plain_linear(x, *tensors[3:6])
    return _plain_linear(functional.gelu(gate, approximate="tanh") * up, *tensors[6:])
