"""Run a model that uses our attention on the tokens of a step, with keys and values in pages.

For the time of a forward the model's attention is `attend`, which gets what it needs as a keyword, as packed layouts
travel. All tokens of a step are one row, and everything else in the decoder works token by token.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from posttrain.models import head
from posttrain.models.causal_lm import causal_lm, decoder
from posttrain.models.lora_layers import hooked
from posttrain.ops import paged_attention, rope_cache, write_cache
from posttrain.rollout.burst import Burst
from posttrain.rollout.cache import KVCache, LayerShape, StepLayout, lay_out
from posttrain.rollout.decoder import CompiledDecoder, Unusual, odd_hooks
from posttrain.rollout.evaluating import evaluating
from posttrain.rollout.graphs import Capture, CudaCapture, DecodeGraph, DecodeGraphs, GraphBurst, read_by
from posttrain.rollout.row_by_row import RowByRow
from posttrain.rollout.scheduler import Step
from posttrain.rollout.sequence import Sequence

NAME = "posttrain_paged"


class PagedRunner:
    """Logits of a step, for a model that `prepare` gave our attention.

    Attributes:
        cache: keys and values.
        compiled: the step in C++, or None.
        obstacle: why the model runs through its modules and not in C++, or None.
        capture: what makes graphs of decoding steps through the modules, or None, as on a CPU.
        graphs: of the model as it is, or None.
    """

    shares = True

    def __init__(self, model: nn.Module, cache: KVCache) -> None:
        self.obstacle: str | None = None
        self._model = model
        self.cache = cache
        self.compiled: CompiledDecoder | None = None
        self.capture: Capture | None = CudaCapture(cache.device) if cache.device.type == "cuda" else None
        self.graphs: DecodeGraphs | None = None
        self._read: tuple[Any, ...] | None = None  # by the graphs

    def begin(self) -> None:
        """Have memory, and see what the model is now."""
        self.cache.allocate()
        causal = causal_lm(self._model)
        with evaluating(causal):
            try:
                self.compiled, self.obstacle = CompiledDecoder(self._model, self.cache), None
            except Unusual as problem:
                self.compiled, self.obstacle = None, str(problem)
        capture = None if self.compiled is not None or _watched(causal) else self.capture
        read = None if capture is None else read_by(causal)
        if read != self._read:
            self._read = read
            self.graphs = None if capture is None else DecodeGraphs(self._logits, self.cache, capture)

    def release(self) -> None:
        """Forget the step in C++, which has workspaces and turned weights, and all graphs; `begin` makes them again."""
        self.compiled = self.graphs = self._read = None

    @property
    def bursts(self) -> bool:
        """Whether there can be a `burst`."""
        return self.compiled is not None or self.graphs is not None

    def burst(
        self, sequences: list[Sequence], steps: int, ends: frozenset[int], *, until_one: bool
    ) -> Burst | GraphBurst | None:
        """Up to `steps` tokens for each of `sequences`, whose pages have room; None if that became impossible."""
        if self.compiled is not None:
            return Burst(sequences, self.compiled, steps, ends, until_one)
        graph = self._graph(sequences)
        return None if graph is None else GraphBurst(sequences, graph, steps, ends)

    def run(self, step: Step) -> Tensor:
        """Logits `[n, V]` behind the n chunks after which a token is drawn."""
        self.cache.copy_pages(step.copies)
        if step.decodes and all(chunk.draws for chunk in step.chunks):
            graph = self._graph([chunk.sequence for chunk in step.chunks])
            if graph is not None:
                graph.run(1)
                assert graph.logits is not None
                return graph.logits[: len(step.chunks)]
        tokens, positions, rows, layout = lay_out(step.chunks, self.cache.page_size, self.cache.device)
        if self.compiled is not None:
            return self.compiled(tokens, positions, rows, layout)
        return self._logits(tokens, positions, layout, rows)

    def _logits(self, tokens: Tensor, positions: Tensor, layout: StepLayout, rows: Tensor | None = None) -> Tensor:
        """Logits `[n, V]` of the tokens `rows`, or of all."""
        causal = causal_lm(self._model)
        with evaluating(causal), RowByRow():
            hidden = _forward(causal, tokens, positions, cache=self.cache, step=layout, turns=True)
            return head(self._model).logits(hidden if rows is None else hidden[rows])

    def _graph(self, sequences: list[Sequence]) -> DecodeGraph | None:
        """A graph that begins where `sequences` are, or None if there are none or the model can't be captured."""
        if self.graphs is None:
            return None
        try:
            return self.graphs.loaded(sequences)
        except RuntimeError as problem:
            self.graphs = None
            warnings.warn(f"decoding runs without captured graphs: {problem}", stacklevel=2)
            return None

    def split(self, sequence: Sequence, twins: list[Sequence]) -> None:
        """Nothing: `twins` have the pages of `sequence`."""

    def drop(self, sequence: Sequence) -> None:
        """Nothing: the pages of `sequence` are dropped."""


def _watched(causal: Any) -> bool:
    """Whether modules that a step runs have hooks, which a graph wouldn't call, but the one that `odd_hooks` knows.

    Not the causal LM itself, whose forward isn't run, and which TRL replaces.
    """
    embeddings = causal.get_input_embeddings()
    others = (module for module in causal.modules() if module is not embeddings and module is not causal)
    return hooked(*others) or odd_hooks(embeddings)


def layer_shapes(model: nn.Module) -> list[LayerShape]:
    """What the layers of `model` keep for a token and how they attend, found by running it on one token."""
    causal = causal_lm(model)
    shapes: dict[int, LayerShape] = {}
    token = torch.zeros(1, dtype=torch.int64, device=causal.get_input_embeddings().weight.device)
    with evaluating(causal):
        _forward(causal, token, token, shapes=shapes)
    return [shapes[layer] for layer in sorted(shapes)]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cache: KVCache | None = None,
    step: StepLayout | None = None,
    angles: tuple[Tensor, Tensor] | None = None,
    shapes: dict[int, LayerShape] | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query `[1, Hq, T, D]` over the cache, once key and value `[1, Hkv, T, D]` are in it.

    With `angles`, cosines and sines `[1, T, R]`, query and key aren't rotated yet (posttrain/models/families.py). With
    `shapes` it only notes what its layer is.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if shapes is not None:
        scale = k.shape[2] ** -0.5 if scaling is None else scaling
        window = None if sliding_window is None else int(sliding_window)
        shapes[module.layer_idx] = LayerShape(k.shape[1], k.shape[2], scale, window, softcap, s_aux is not None)
        return q[None], None
    assert cache is not None and step is not None
    keys, values = cache.keys[module.layer_idx], cache.values[module.layer_idx]
    if angles is None:
        write_cache(k, v, keys, values, step.slots)
    else:
        q = rope_cache(q, k, v, angles[0][0], angles[1][0], keys, values, step.slots)
    out = paged_attention(
        q.contiguous(),
        keys,
        values,
        step.block_table,
        step.context_lens,
        step.query_lens,
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


def _forward(causal: Any, tokens: Tensor, positions: Tensor, **options: Any) -> Tensor:
    """Last hidden states `[T, H]`; a mask of four dimensions is handed on, so transformers makes none."""
    config = causal.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        output = decoder(causal)(
            input_ids=tokens[None],
            position_ids=positions[None],
            attention_mask=torch.empty(1, 1, 0, 0, device=tokens.device),
            use_cache=False,
            **options,
        )
    finally:
        config._attn_implementation = before
    return output.last_hidden_state[0]


AttentionInterface.register(NAME, attend)
