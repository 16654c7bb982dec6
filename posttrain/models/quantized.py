"""Linear layers in 4 bits, for QLoRA (Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023).

`NF4Linear` needs no bitsandbytes, and a model of such layers is saved as bitsandbytes and transformers save theirs:
either reads the other's checkpoint. Layers of bitsandbytes itself, in a model that transformers quantised, run our ops
too, on the memory that they have.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.models.causal_lm import ModelError, causal_lm
from posttrain.ops import nf4_dequantize, nf4_linear, quantize_nf4
from posttrain.ops.nf4_weight import NF4Weight

BITSANDBYTES_MATRIX = "_posttrain_matrix"
_STATE = ".quant_state.bitsandbytes__nf4"


class NF4Linear(nn.Linear):
    """A linear layer with a frozen NF4 weight; `weight` is the packed one, uint8 `[bytes, 1]`.

    The tensors of its state dict are those of bitsandbytes' `Linear4bit`.
    """

    def __init__(self, matrix: NF4Weight, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = matrix.shape
        self.weight = nn.Parameter(matrix.packed.reshape(-1, 1), requires_grad=False)
        self.register_parameter("bias", bias)
        self._matrix = matrix

    @property
    def matrix(self) -> NF4Weight:
        """The weight `[N, K]`."""
        if self._matrix.packed.data_ptr() != self.weight.data_ptr():  # the layer was moved, or copied
            self._matrix = replace(self._matrix.to(self.weight.device), packed=self.weight.data)
        return self._matrix

    @property
    def W_q(self) -> Tensor:
        """The packed weight. Of a layer that has this, PEFT takes `dequantize()` for the weight, which DoRA needs."""
        return self.weight

    def dequantize(self) -> Tensor:
        """The weight `[N, K]` in full."""
        return nf4_dequantize(self.matrix)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        x = input.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else input
        return nf4_linear(x, self.matrix, None if self.bias is None else self.bias.to(x.dtype))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.matrix.state_dict("weight").items():
            if name != "weight":
                destination[prefix + name] = tensor.clone()  # files can't hold the tables that layers share

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        name = f"{prefix}weight"
        if name in state_dict:
            self._matrix = NF4Weight.from_state_dict(state_dict, name)
        others = {key: tensor for key, tensor in state_dict.items() if not key.startswith(f"{name}.")}
        super()._load_from_state_dict(others, prefix, *arguments)


def quantize(causal: Any, *, nested: bool = False) -> None:
    """Turn the linear layers of a causal LM into `NF4Linear`, in place: all but the head, as transformers does.

    Args:
        causal: a transformers model without adapters.
        nested: keep the statistics in 8 bits too ("double quantisation").

    Raises `ModelError` for a model without such layers, as GPT-2 is.
    """
    kept = set(causal._keep_in_fp32_modules or ())
    head = causal.get_output_embeddings()
    layers = {
        name: layer
        for name, layer in causal.named_modules()
        if type(layer) is nn.Linear and layer is not head and kept.isdisjoint(name.split("."))
    }
    if not layers:
        raise ModelError(f"{type(causal).__name__} has no linear layers to hold in 4 bits")
    for name, layer in layers.items():
        matrix = quantize_nf4(layer.weight.detach(), nested=nested)
        causal.set_submodule(name, NF4Linear(matrix, layer.bias))
    _describe(causal, nested)


def dequantize(model: nn.Module) -> None:
    """Turn every `NF4Linear` of `model` back into a linear layer, in place, frozen, with the values it has in 4 bits.

    The new weights have the model's dtype. Adapters stay, and can then be merged.

    Raises `ModelError` for a model without such layers.
    """
    causal = causal_lm(model)
    dtype = causal.dtype
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, NF4Linear)}
    if not layers:
        raise ModelError(f"{type(causal).__name__} has no NF4Linear layers; only those are dequantised here")
    for name, layer in layers.items():
        wide = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        wide.weight = nn.Parameter(nf4_dequantize(layer.matrix, dtype), requires_grad=False)
        wide.bias = layer.bias
        model.set_submodule(name, wide)
    for part in model.modules():
        config: Any = getattr(part, "config", None)
        if hasattr(config, "quantization_config"):
            del config.quantization_config


def bitsandbytes_matrix(layer: Any) -> NF4Weight | str:
    """The weight of bitsandbytes' `Linear4bit`, sharing its memory, or why our ops can't take it."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None or state.quant_type != "nf4":
        return "its weight is not in NF4"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has repacked its weight for inference on the CPU"
    known = layer.__dict__.get(BITSANDBYTES_MATRIX)  # making it waits for a GPU
    if known is None or known.packed.data_ptr() != layer.weight.data_ptr() or known.absmax is not state.absmax:
        known = layer.__dict__[BITSANDBYTES_MATRIX] = NF4Weight.from_bitsandbytes(layer.weight, state)
    return known


def is_nf4(config: Any) -> bool:
    """Whether the checkpoint of this configuration holds NF4 weights as bitsandbytes lays them out."""
    facts = _facts(config)
    return facts.get("load_in_4bit", False) and facts.get("bnb_4bit_quant_type") == "nf4"


def quantization_of(config: Any) -> str | None:
    """How the checkpoint of this configuration is quantised, or None if it isn't."""
    facts = _facts(config)
    method = facts.get("quant_method", "unknown")
    return str(getattr(method, "value", method)) if facts else None


def _facts(config: Any) -> dict[str, Any]:
    facts = getattr(config, "quantization_config", None) or {}
    return facts if isinstance(facts, dict) else facts.to_dict()


def unpack(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, NF4Weight]:
    """Take the NF4 matrices, by the names of their parameters, out of a checkpoint's tensors.

    Memory of their full shape stays in their place. It costs nothing as long as nobody writes to it: `dtype` is the one
    that the model is loaded in, so that nothing is converted; None stands for the dtype of each matrix.
    """
    names = [key.removesuffix(_STATE) for key in tensors if key.endswith(_STATE)]
    matrices = {name: NF4Weight.from_state_dict(tensors, name) for name in names}
    for key in [key for key in tensors if key.partition(".weight.")[0] + ".weight" in matrices]:
        del tensors[key]
    for name, matrix in matrices.items():
        tensors[name] = torch.empty(matrix.shape, dtype=dtype or matrix.dtype)
    return matrices


def install(causal: Any, matrices: dict[str, NF4Weight]) -> None:
    """Put NF4 matrices in place of the weights of these names."""
    for name, matrix in matrices.items():
        path = name.removesuffix(".weight")
        layer = causal.get_submodule(path)
        if type(layer) is not nn.Linear:
            raise ModelError(f"{name} is in 4 bits, and {path} is a {type(layer).__name__}, not a Linear layer")
        causal.set_submodule(path, NF4Linear(matrix, layer.bias))
    _describe(causal, any(matrix.nested is not None for matrix in matrices.values()))


def _describe(causal: Any, nested: bool) -> None:
    """Note in the configuration, which is saved with the model, that it is quantised."""
    causal.config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": str(causal.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }
