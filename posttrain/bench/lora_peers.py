"""Adapters to the LoRA layers and 4-bit matrices of others, as in peers.py.

A peer's layers are PEFT's, with our tensors as their parameters, so that gradients go where ours go. The context has
the layers' shapes, rank, scaling and gate.
"""

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from posttrain.bench.case import Arguments, Function, Problem, Way
from posttrain.bench.device import DEVICE
from posttrain.ops import NF4Weight
from posttrain.ops.nf4_weight import code_table


def peft_linear(problem: Problem) -> Way:
    """PEFT's layer."""
    return _with_layers(problem, lambda layers, x: layers.o_proj(x))


def peft_qkv(problem: Problem) -> Way:
    """PEFT's three layers."""
    return _with_layers(problem, lambda layers, x: (layers.q_proj(x), layers.k_proj(x), layers.v_proj(x)))


def peft_mlp(problem: Problem) -> Way:
    """PEFT's three layers with plain PyTorch's activation between them."""
    silu = problem.context.gate == "swiglu"

    def call(layers: Any, x: Tensor) -> Tensor:
        gate = layers.gate_proj(x)
        gate = functional.silu(gate) if silu else functional.gelu(gate, approximate="tanh")
        return layers.down_proj(gate * layers.up_proj(x))

    return _with_layers(problem, call)


def unsloth_linear(problem: Problem) -> Way:
    """Unsloth's output projection."""
    from unsloth.kernels import apply_lora_o

    return _with_layers(problem, lambda layers, x: apply_lora_o(layers, x[None])[0])


def unsloth_qkv(problem: Problem) -> Way:
    """Unsloth's three projections, out of place."""
    from unsloth.kernels import apply_lora_qkv

    return _with_layers(problem, lambda layers, x: tuple(y[0] for y in apply_lora_qkv(layers, x[None], inplace=False)))


def unsloth_mlp(problem: Problem) -> Way:
    """Unsloth's MLP, out of place."""
    from unsloth.kernels import apply_lora_mlp_geglu_approx, apply_lora_mlp_swiglu

    if problem.context.gate == "swiglu":
        return _with_layers(problem, lambda layers, x: apply_lora_mlp_swiglu(layers, x[None], inplace=False)[0])
    return _with_layers(problem, lambda layers, x: apply_lora_mlp_geglu_approx(layers, x[None])[0])


def _with_layers(problem: Problem, call: Callable[[Any, Tensor], Any]) -> Way:
    """`call` of PEFT's layers around our tensors, and x."""

    def prepare(arguments: Arguments) -> Arguments:
        return (*arguments, _peft_layers(problem, arguments))

    return Way(lambda *arguments: call(arguments[-1], arguments[0]), prepare)


def _peft_layers(problem: Problem, arguments: Arguments) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    context = problem.context
    layers = nn.Module()
    with torch.device("meta"):
        for name, (n, k) in context.shapes.items():
            layers.add_module(name, nn.Linear(k, n, bias=False))
    config = LoraConfig(r=context.rank, lora_alpha=context.scaling * context.rank, target_modules=list(context.shapes))
    inject_adapter_in_model(config, layers)
    for index, name in enumerate(context.shapes):
        layer: Any = layers.get_submodule(name)
        weight, lora_a, lora_b = arguments[1 + 3 * index : 4 + 3 * index]
        layer.base_layer._parameters["weight"] = weight  # the tensors themselves: a Parameter would be another leaf
        layer.lora_A["default"]._parameters["weight"] = lora_a
        layer.lora_B["default"]._parameters["weight"] = lora_b
    return layers


def compiled_dequantize(problem: Problem) -> Function:
    """torch.compile, of both halves of the bytes looked up in a table that is there already."""
    return _compiled(_dequantize)


def compiled_nf4_linear(problem: Problem) -> Function:
    """The same, and the product."""
    return _compiled(lambda x, weight, table: functional.linear(x, _dequantize(weight, table)))


def _compiled(function: Function) -> Function:
    torch._dynamo.reset()  # what was compiled for other shapes
    table = code_table(torch.device(DEVICE)).clone()
    fast = torch.compile(function, dynamic=False)
    return lambda *arguments: fast(*arguments, table)


def _dequantize(weight: NF4Weight, table: Tensor) -> Tensor:
    halves = torch.stack([table[weight.packed.view(-1).int() >> shift & 15] for shift in (4, 0)], -1)
    return (halves.view(-1, weight.blocksize) * weight.absmax[:, None]).view(weight.shape).to(weight.dtype)


def bitsandbytes_dequantize(problem: Problem) -> Way:
    """bitsandbytes' kernel."""
    import bitsandbytes.functional as bnb

    return Way(lambda weight, state: bnb.dequantize_4bit(weight.packed, state), lambda args: (*args, _state(args[0])))


def bitsandbytes_linear(problem: Problem) -> Way:
    """bitsandbytes' matrix-vector kernel for one row, else its `matmul_4bit`.

    On a CPU with AVX-512 and its bfloat16 that computes in bfloat16 whatever x is, and reorders the weights for it
    beforehand, as its `Linear4bit` does at the first inference.
    """
    import bitsandbytes
    import bitsandbytes.functional as bnb

    few = problem.arguments[0].shape[0] <= 16
    if not few:
        return Way(
            lambda x, _, packed, state: bitsandbytes.matmul_4bit(x, packed.t(), state),
            lambda args: (*args, args[1].packed.reshape(-1, 1), _state(args[1])),
        )

    def prepare(arguments: Arguments) -> Arguments:
        weight = arguments[1]
        if DEVICE == "cpu" and bnb.has_avx512bf16():
            return (*arguments, *bnb._convert_weight_packed_for_cpu(weight.packed.clone(), copy(_state(weight))))
        return (*arguments, weight.packed, _state(weight))

    return Way(lambda x, _, packed, state: bnb.gemv_4bit(x, packed, state=state), prepare)


def _state(weight: NF4Weight) -> Any:
    import bitsandbytes.functional as bnb

    table = bnb.get_4bit_type("nf4", device=DEVICE)
    return bnb.QuantState(weight.absmax, torch.Size(weight.shape), table, weight.blocksize, "nf4", weight.dtype)
