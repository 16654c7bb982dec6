"""A known decoder as the C++ step takes it: every weight where it lies, without a copy.

Only of a small model, its linear layers are also turned, once a call, as csrc/cpu/linear.cpp multiplies with them: it
would turn them anew in every step, an eighth of the time of the demo's model (docs/lab-notes.md).

The modules are read anew for every call of the engine, since adapters are switched and weights replaced between calls.
Whatever the C++ step doesn't do (hooks, DoRA, dtypes other than float32 and float64, other families) is an `Unusual`
model, which runs through its modules (paged.py).
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posttrain import _C
from posttrain.models import head
from posttrain.models.causal_lm import causal_lm, decoder
from posttrain.models.families import FAMILIES, GatedMLP, MergedGatedMLP, Norm
from posttrain.models.lora_layers import Adapted, absorbed, halves, hooked
from posttrain.ops import LoraLayer
from posttrain.rollout.cache import KVCache, LayerShape, StepLayout

# The structures of csrc/decoder.h.
_LINEAR = np.dtype(
    [(name, "i8") for name in ("weight", "turned", "bias", "lora_a", "lora_b", "height", "width", "rank")]
    + [("scaling", "f8")]
)
_NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp", "q_norm", "k_norm")
_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
_LAYER = np.dtype(
    [(name, "i8") for name in _NORMS]
    + [(name, _LINEAR) for name in _LINEARS]
    + [(name, "i8") for name in ("keys", "values", "window", "rope", "norm_each_head")]
)
_SIZES = ("num_layers", "hidden", "heads", "key_heads", "width", "intermediate", "activation", "page_size", "most_rank")
_DECODER = np.dtype(
    [(name, "i8") for name in ("embeddings", "norm", "layers")]
    + [("head", _LINEAR)]
    + [(name, "i8") for name in _SIZES]
    + [(name, "f8") for name in ("embedding_scale", "eps", "scale", "softcap", "logit_scale", "head_softcap")]
)
assert (_DECODER.itemsize, _LAYER.itemsize) == _C.decoder_sizes()

_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")  # in the order of csrc/cpu/kernels.h
_MOST_TURNED = 64 << 20  # bytes
_TURN = 0.05  # seconds of C++ at most, after which other threads and Ctrl-C get their turn
_STEADY_ROPE = {"default", "linear", "llama3", "yarn"}  # kinds whose angles don't depend on the longest sequence


# Addresses of block table, context lengths and query lengths (0 for one each); the table's stride and shape.
Tables = tuple[int, int, int, int, int, int]


class Unusual(Exception):
    """Why a model has to run through its modules."""


class CompiledDecoder:
    """The weights of `model` and the pages of `cache`, described for C++. Raises `Unusual`.

    Attributes:
        vocabulary: how many logits a token has.
        turned: the turned weights of a small model, or None.
    """

    def __init__(self, model: nn.Module, cache: KVCache) -> None:
        causal = causal_lm(model)
        body = decoder(causal)
        self._kept: list[Any] = []
        _check_family(causal)
        self._rotary: Any = body.rotary_emb
        self._dtype, self._device = cache.dtype, cache.device
        if self._dtype not in (torch.float32, torch.float64) or self._device.type != "cpu":
            raise Unusual(f"its weights are {self._dtype} on {self._device}")
        if hooked(body, body.norm, *body.layers):
            raise Unusual("it has hooks")
        self._kinds = _rope_kinds(self._rotary)
        self._head = head(model)
        self.vocabulary = len(self._head.weight)
        layers = np.zeros(len(body.layers), _LAYER)
        for row, layer, shape in zip(layers, body.layers, cache.shapes, strict=True):
            self._describe(row, layer, shape)
        layers["keys"] = [keys.data_ptr() for keys in cache.keys]
        layers["values"] = [values.data_ptr() for values in cache.values]
        record = self._describe_all(body, layers, cache.shapes[0], cache.page_size)
        self._kept.append(record)
        self._address_of_all = int(record.ctypes.data)
        self.turned = self._turn([record["head"], *(row[name] for row in layers for name in _LINEARS)])
        self._workspace = torch.empty(0, dtype=self._dtype)
        self._logits = torch.empty(0, dtype=self._dtype)
        self._cos: list[Tensor] = []
        self._sin: list[Tensor] = []

    def __call__(self, tokens: Tensor, positions: Tensor, rows: Tensor, step: StepLayout) -> Tensor:
        """Logits `[n, V]` of the tokens `rows`, ascending."""
        logits = torch.empty(len(rows), self.vocabulary, dtype=self._dtype)
        angles, threads, table = self._angles(int(positions.max()) + 1), torch.get_num_threads(), step.block_table
        queries = 0 if step.query_lens is None else step.query_lens.data_ptr()
        _C.decode(
            self._dtype.itemsize,
            self._address_of_all,
            (*(x.data_ptr() for x in (tokens, positions, step.slots, rows)), len(tokens), len(rows)),
            angles,
            (table.data_ptr(), step.context_lens.data_ptr(), queries, table.stride(0), *table.shape),
            logits.data_ptr(),
            self._room(len(tokens), len(rows), angles[-1], threads),
            threads,
        )
        return logits

    def burst(
        self,
        tables: Tables,
        ends: tuple[int, ...],
        draws: tuple[int, ...],
        out: tuple[int, ...],
        step: int,
        *,
        longest: int,
        until_one: bool,
    ) -> int:
        """Steps in which every sequence draws a token, as csrc/burst.h has it; the number of the next one.

        Args:
            tables: of the sequences, without query lengths.
            ends: addresses of the most tokens of each, of whether tokens complete it, and of those; how many.
            draws: addresses of temperature, top_k, top_p, min_p, seeds and offsets.
            out: addresses of tokens, log-probabilities, and how many tokens of each.
            step: the number of the first step.
            longest: most tokens of a sequence.
            until_one: whether to stop when one is complete.
        """
        count, angles, threads = tables[-2], self._angles(longest), torch.get_num_threads()
        size = count * self.vocabulary
        if len(self._logits) < size:
            self._logits = torch.empty(size, dtype=self._dtype)
        return _C.burst(
            self._dtype.itemsize,
            self._address_of_all,
            angles,
            tables,
            ends,
            draws,
            out,
            step,
            until_one,
            _TURN,
            self._logits.data_ptr(),
            self._room(count, count, angles[-1], threads),
            threads,
        )

    def _room(self, tokens: int, rows: int, rotated: int, threads: int) -> int:
        """The address of a workspace for a step."""
        size = _C.decoder_workspace(self._dtype.itemsize, self._address_of_all, tokens, rows, rotated, threads)
        if len(self._workspace) < size:
            self._workspace = torch.empty(size, dtype=self._dtype)
        return self._workspace.data_ptr()

    def _angles(self, longest: int) -> tuple[int, int, int, int, int]:
        """Addresses of the cosines and sines of positions below `longest`, of the first and the last kind of layers,
        and how much of a head is rotated."""
        if not self._cos or len(self._cos[0]) < longest:
            every = torch.arange(max(256, 1 << (longest - 1).bit_length()))[None]
            like = torch.empty(0, dtype=self._dtype)
            tables = [self._rotary(like, every, *kind) for kind in self._kinds]
            self._cos, self._sin = ([table[i][0].to(self._dtype).contiguous() for table in tables] for i in (0, 1))
        cos, sin = self._cos, self._sin
        return cos[0].data_ptr(), sin[0].data_ptr(), cos[-1].data_ptr(), sin[-1].data_ptr(), cos[0].shape[1]

    def _describe(self, row: Any, layer: Any, shape: LayerShape) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        if not isinstance(mlp, GatedMLP) or shape.sinks:
            raise Unusual("its layers aren't those of a known family")
        if hooked(attention, mlp):
            raise Unusual("its layers have hooks")
        norms = {
            "before_attention": getattr(layer, "input_layernorm", None),
            "q_norm": getattr(attention, "q_norm", None),
            "k_norm": getattr(attention, "k_norm", None),
        }
        if hasattr(layer, "post_feedforward_layernorm"):  # norms behind attention and MLP
            norms["after_attention"] = layer.post_attention_layernorm
            norms["before_mlp"] = getattr(layer, "pre_feedforward_layernorm", None)
            norms["after_mlp"] = layer.post_feedforward_layernorm
        else:
            norms["before_mlp"] = layer.post_attention_layernorm
        for name, norm in norms.items():
            row[name] = 0 if norm is None else self._norm(norm)[0]
        if norms["q_norm"] is not None:
            row["norm_each_head"] = len(norms["q_norm"].weight) == shape.width
        for name, part in zip(_LINEARS, self._linears(attention, mlp, shape), strict=True):
            self._linear(row[name], part)
        row["window"] = shape.window or 0
        row["rope"] = len(self._kinds) > 1 and self._kinds.index((attention.layer_type,))

    def _linears(self, attention: Any, mlp: Any, shape: LayerShape) -> Iterable[Adapted | str]:
        merged_mlp = isinstance(mlp, MergedGatedMLP)
        if merged_mlp:
            merged = absorbed(attention.qkv_proj)
            inner = shape.heads * shape.width
            yield from _rows(merged, [attention.config.num_attention_heads * shape.width, inner, inner])
        else:
            yield from (absorbed(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
        yield absorbed(attention.o_proj)
        if merged_mlp:
            yield from halves(absorbed(mlp.gate_up_proj))
        else:
            yield from (absorbed(mlp.gate_proj), absorbed(mlp.up_proj))
        yield absorbed(mlp.down_proj)

    def _describe_all(self, body: Any, layers: Any, shape: LayerShape, page_size: int) -> Any:
        record = np.zeros((), _DECODER)
        embeddings = body.embed_tokens
        scale = getattr(embeddings, "embed_scale", None)
        scaled = type(embeddings).__name__.endswith("ScaledWordEmbedding")
        if not (type(embeddings) is nn.Embedding or scaled) or odd_hooks(embeddings):
            raise Unusual("its embeddings aren't those of a known family")
        if body.config.model_type.startswith("gemma") != scaled:
            raise Unusual("its embeddings are scaled in a way of their own")
        weight, bias, head_softcap, logit_scale, lora = self._head
        lora_a, lora_b, scaling = lora or (None, None, 1.0)
        self._linear(record["head"], Adapted(LoraLayer(weight, lora_a, lora_b, scaling, bias)))
        mlp = body.layers[0].mlp
        values = {
            "embeddings": self._address(embeddings.weight),
            "embedding_scale": 1.0 if scale is None else float(torch.as_tensor(scale).to(self._dtype)),
            "num_layers": len(layers),
            "layers": layers.ctypes.data,
            "hidden": embeddings.weight.shape[1],
            "heads": layers["q"]["height"][0] // shape.width,
            "key_heads": shape.heads,
            "width": shape.width,
            "intermediate": layers["gate"]["height"][0],
            "activation": _ACTIVATIONS.index(mlp.activation),
            "page_size": page_size,
            "most_rank": max(int(layers[name]["rank"].max()) for name in _LINEARS),
            "scale": shape.scale,
            "softcap": shape.softcap or 0.0,
            "logit_scale": logit_scale,
            "head_softcap": head_softcap or 0.0,
        }
        values["most_rank"] = max(values["most_rank"], int(record["head"]["rank"]))
        values["norm"], values["eps"] = self._norm(body.norm)
        for name, value in values.items():
            record[name] = value
        self._kept.append(layers)
        return record

    def _norm(self, norm: Any) -> tuple[int, float]:
        if not isinstance(norm, Norm) or hooked(norm):
            raise Unusual("its norms aren't those of a known family")
        weight, eps = norm.scale()
        return self._address(weight.detach().to(self._dtype)), eps

    def _linear(self, row: Any, part: Adapted | str) -> None:
        if isinstance(part, str) or part.magnitude is not None or part.dropout:
            raise Unusual(part if isinstance(part, str) else "it has DoRA or dropout")
        weight, lora_a, lora_b, scaling, bias = part.layer
        if not isinstance(weight, Tensor):
            raise Unusual("its weights are in four bits")
        row["weight"], (row["height"], row["width"]) = self._address(weight), weight.shape
        row["bias"] = 0 if bias is None else self._address(bias)
        if lora_a is not None and lora_b is not None:
            row["lora_a"], row["lora_b"] = (self._address(x.detach().to(self._dtype)) for x in (lora_a, lora_b))
            row["rank"], row["scaling"] = len(lora_a), scaling

    def _turn(self, linears: list[Any]) -> Tensor | None:
        """All weights turned, unless they are too many."""
        columns = _C.turned_columns
        sizes = [-(-int(row["height"]) // columns) * columns * int(row["width"]) for row in linears]
        if sum(sizes) * self._dtype.itemsize > _MOST_TURNED:
            return None
        turned = torch.empty(sum(sizes), dtype=self._dtype)
        for row, part in zip(linears, turned.split(sizes), strict=True):
            row["turned"] = part.data_ptr()
            shape = int(row["height"]), int(row["width"])
            _C.turn_weight(self._dtype.itemsize, int(row["weight"]), *shape, part.data_ptr())
        return turned

    def _address(self, tensor: Tensor) -> int:
        if tensor.dtype != self._dtype or tensor.device != self._device or not tensor.is_contiguous():
            raise Unusual(f"a weight is {tensor.dtype} on {tensor.device} with strides {tensor.stride()}")
        self._kept.append(tensor)
        return tensor.data_ptr()


def _check_family(causal: Any) -> None:
    home = type(causal).__module__
    if not any(home == f"transformers.models.{name}.modeling_{name}" for name in FAMILIES):
        raise Unusual(f"{type(causal).__name__} is not one of {', '.join(FAMILIES)}")


def _rope_kinds(rotary: Any) -> list[tuple[str, ...]]:
    """The arguments with which the rotary embedding gives each of its kinds of angles, two at most."""
    types = rotary.rope_type if isinstance(rotary.rope_type, dict) else {None: rotary.rope_type}
    if not set(types.values()) <= _STEADY_ROPE or hooked(rotary):
        raise Unusual(f"its rotary embedding is {types}")
    return [() if kind is None else (kind,) for kind in types]


def odd_hooks(embeddings: Any) -> bool:
    """Whether there are hooks but the one that transformers sets for activation checkpointing."""
    own = {k: h for k, h in embeddings._forward_hooks.items() if "make_inputs_require_grad" not in h.__qualname__}
    return bool(own or embeddings._forward_pre_hooks or "forward" in embeddings.__dict__)


def _rows(part: Adapted | str, heights: list[int]) -> list[Adapted | str]:
    """A layer in parts of its outputs."""
    if isinstance(part, str) or not isinstance(part.layer.weight, Tensor):
        return [part] * len(heights)
    layer, weights = part.layer, part.layer.weight.split(heights)
    below = [None] * len(heights) if layer.lora_b is None else layer.lora_b.split(heights)
    biases = [None] * len(heights) if layer.bias is None else layer.bias.split(heights)
    rows = zip(weights, below, biases, strict=True)
    return [part._replace(layer=layer._replace(weight=w, lora_b=b, bias=c)) for w, b, c in rows]
