"""lora_linear, lora_qkv and lora_mlp over frozen matrices of the models' layers.

Operations: of a frozen `[N, K]` the product in the forward and that for the gradient of x in the backward, and of the
adapter `2 R (N + K)` a row, once in the forward and twice more in the backward. Bytes are those of x, the results,
their gradients, and the weights once in each direction.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from posttrain import ops
from posttrain.bench import lora_peers as peers
from posttrain.bench.case import BOTH, FORWARD, Case, Function, Problem, Work, randn
from posttrain.bench.device import DTYPE, WIDER
from posttrain.bench.peers import Makers, compiled
from posttrain.bench.shapes import ModelShape, Suite
from posttrain.ops import LoraLayer

Shapes = dict[str, tuple[int, int]]  # (N, K) of each layer, by name
_SCALING = 2.0


class Group(NamedTuple):
    """Layers that are computed together: their shapes, in words and by name, our function and plain PyTorch's."""

    title: str
    shapes: Shapes
    ours: Function
    plain: Function


def lora_linear(suite: Suite) -> list[Case]:
    """The output projection of attention."""

    def group(m: ModelShape) -> Group:
        rows = m.heads * m.width
        return Group(f"[{m.hidden}, {rows}]", {"o_proj": (m.hidden, rows)}, _linear, _plain_linear)

    return _cases(suite, "lora_linear", group, {"PEFT": peers.peft_linear, "Unsloth": peers.unsloth_linear})


def lora_qkv(suite: Suite) -> list[Case]:
    """The projections to queries, keys and values."""

    def group(m: ModelShape) -> Group:
        rows, few = m.heads * m.width, m.key_heads * m.width
        shapes = {name: (n, m.hidden) for name, n in (("q_proj", rows), ("k_proj", few), ("v_proj", few))}
        return Group(f"[{rows} + 2 x {few}, {m.hidden}]", shapes, _qkv, _plain_qkv)

    return _cases(suite, "lora_qkv", group, {"PEFT": peers.peft_qkv, "Unsloth": peers.unsloth_qkv})


def lora_mlp(suite: Suite) -> list[Case]:
    """The MLP, with SiLU or, of Gemma, the tanh form of GELU."""

    def group(m: ModelShape) -> Group:
        shapes = {"gate_proj": (m.inner, m.hidden), "up_proj": (m.inner, m.hidden), "down_proj": (m.hidden, m.inner)}
        functions = (_mlp_gelu, _plain_gelu) if m.gate == "geglu" else (_mlp_silu, _plain_silu)
        return Group(f"{m.hidden} to {m.inner}, {m.gate}", shapes, *functions)

    return _cases(suite, "lora_mlp", group, {"PEFT": peers.peft_mlp, "Unsloth": peers.unsloth_mlp})


def _cases(suite: Suite, op: str, group_of: Callable[[ModelShape], Group], named: Makers) -> list[Case]:
    cases = {}
    for model in suite.models:
        group = group_of(model)
        title = f"[{suite.tokens}, ...] x {group.title}, rank {model.rank}"
        numbers = sum(2.0 * n * k + 5.5 * suite.tokens * (n + k) for n, k in group.shapes.values())
        need = numbers * (DTYPE.itemsize + WIDER.itemsize)
        make, work = partial(_problem, suite.tokens, model, group), _work(suite.tokens, model.rank, group.shapes)
        cases[title] = Case(op, title, need, make, work, {"torch.compile": compiled, **named})
    return list(cases.values())


def _work(tokens: int, rank: int, shapes: Shapes) -> dict[str, Work]:
    sizes = [(n * k, rank * (n + k)) for n, k in shapes.values()]
    forward, both = (2.0 * tokens * sum(w * (1 + back) + low * (1 + 2 * back) for w, low in sizes) for back in (0, 1))
    weights = sum(frozen + low for frozen, low in sizes)
    outputs = shapes["down_proj"][0] if "down_proj" in shapes else sum(n for n, _ in shapes.values())
    ends = tokens * (next(iter(shapes.values()))[1] + outputs)
    return {
        FORWARD: Work(forward, (weights + ends) * DTYPE.itemsize),
        BOTH: Work(both, (2 * weights + 3 * ends) * DTYPE.itemsize),
    }


def _problem(tokens: int, model: ModelShape, group: Group) -> Problem:
    """Arguments are x, then W, A and B of each layer."""
    arguments = [randn(tokens, next(iter(group.shapes.values()))[1], grad=True)]
    for n, k in group.shapes.values():
        arguments += [randn(n, k, scale=k**-0.5), randn(model.rank, k, scale=k**-0.5, grad=True)]
        arguments += [randn(n, model.rank, scale=0.5 * model.rank**-0.5, grad=True)]
    context = SimpleNamespace(shapes=group.shapes, rank=model.rank, scaling=_SCALING, gate=model.gate)
    return Problem(tuple(arguments), group.ours, group.plain, context)


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
