"""Common prefixes of other people's batches, computed once.

Every causal LM of transformers computes hidden states in a decoder and logits from those. While prefixes are shared,
the decoder gets a forward that regroups the batch (regroup.py), runs the forest and hands back hidden states in the
caller's shape. What comes after the decoder, the language head and the loss, is the caller's.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.integrations.counting import count, say
from posttrain.integrations.models import patch, unpatch
from posttrain.integrations.regroup import Regrouped, regroup
from posttrain.models.causal_lm import ModelError, causal_lm, decoder
from posttrain.models.lora_layers import per_row
from posttrain.models.packing import packed_output
from posttrain.models.prepare import is_prepared

_ATTENTION = "posttrain"
_BATCH = ("attention_mask", "position_ids", "cache_position")
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")  # for other attentions
_RECORDED = ("output_attentions", "output_hidden_states", "output_router_logits")


@contextmanager
def shared_prefix(model: nn.Module) -> Iterator[None]:
    """Forwards of `model` inside compute what sequences of a batch begin with alike only once, and no padding.

    For batches `[B, T]` of token ids, padded (with an `attention_mask`) or padding-free (with `position_ids`), and for
    sequences that have at least 16 first tokens in common, at the same positions. Hidden states, logits (with
    `logits_to_keep`, too), losses and gradients are those of a forward without this; the hidden states of padding are
    zeros. There is no cache in the output. Dropout, if there is any, draws once for tokens that are computed once.

    A model that wasn't patched is, and stays so, since gradient checkpointing runs its layers again after the forward.

    Raises:
        ValueError: a model without our attention (`ModelError`), which is left as it was; and from a forward inside,
            with what it was given: no tokens, a cache or a wish for one, embeddings in place of ids, hidden states of
            all layers, attention weights or a router's logits, tensors that would have to be regrouped too, padding
            between tokens, NEFTune's noise, adapters of PEFT that differ by row, torch.compile.
    """
    causal, patched = causal_lm(model), False
    if not is_prepared(model):
        patch(model)
        patched = True
    obstacle = _no_attention(causal)
    if obstacle is not None:
        if patched:
            unpatch(model)
        raise ModelError(f"shared_prefix: {obstacle}")
    with _replaced(causal, strict=True):
        yield


@contextmanager
def shared_where_possible(*models: nn.Module | None) -> Iterator[None]:
    """The same for trainers that haven't asked for it: what can't be shared runs as always, counted with the reason."""
    with ExitStack() as replaced:
        for model in models:
            if model is None or not is_prepared(model):
                continue
            try:
                replaced.enter_context(_replaced(causal_lm(model), strict=False))
            except ModelError as problem:
                count(f"model left alone: {problem}")
        yield


@contextmanager
def _replaced(causal: Any, strict: bool) -> Iterator[None]:
    body = decoder(causal)
    before = vars(body).get("forward")
    if isinstance(before, _Forward):  # inside another of these
        yield
        return
    body.forward = _Forward(causal, body.forward, strict)
    try:
        yield
    finally:
        if before is None:
            del body.forward
        else:
            body.forward = before


class _Forward:
    """Stands in for the forward of a causal LM's decoder."""

    def __init__(self, causal: Any, theirs: Callable[..., Any], strict: bool) -> None:
        self.causal = causal
        self.theirs = theirs
        self.strict = strict

    def __call__(self, input_ids: Tensor | None = None, *arguments: Any, **kwargs: Any) -> Any:
        found = _regrouped(self.causal, input_ids, arguments, kwargs)
        if not isinstance(found, str):
            return self._run(found, kwargs)
        if self.strict:
            raise ValueError(f"shared_prefix: {found}")
        count(f"batch left as it is: {found}")
        say(f"posttrain: a batch is left as it is: {found}")
        return self.theirs(input_ids, *arguments, **kwargs)

    def _run(self, batch: Regrouped, kwargs: dict[str, Any]) -> Any:
        shared = batch.layout.num_tokens < batch.tokens
        count("batch with shared prefixes" if shared else "batch without padding")
        ours = (*_BATCH, *_PACKING, "use_cache", "past_key_values", "inputs_embeds")
        rest = {name: value for name, value in kwargs.items() if name not in ours}
        output = packed_output(self.theirs, batch.input_ids, batch.layout, **rest)
        output.last_hidden_state = batch.spread(output.last_hidden_state[0])
        return output


def _regrouped(
    causal: Any, input_ids: Tensor | None, arguments: tuple[Any, ...], kwargs: dict[str, Any]
) -> Regrouped | str:
    """The forest of what a decoder is given, or why it should run as it is."""
    obstacle = _no_attention(causal) or _noisy(causal) or _not_alone(causal.config, input_ids, arguments, kwargs)
    obstacle = obstacle or per_row(decoder(causal))
    if obstacle is not None:
        return obstacle
    assert input_ids is not None
    return regroup(input_ids, kwargs.get("attention_mask"), kwargs.get("position_ids"))


def _no_attention(causal: Any) -> str | None:
    found = causal.config._attn_implementation
    return None if found == _ATTENTION else f"the attention of {type(causal).__name__} is {found!r}, not ours"


def _noisy(causal: Any) -> str | None:
    embeddings = causal.get_input_embeddings()
    if embeddings.training and getattr(embeddings, "neftune_noise_alpha", None):
        return "NEFTune adds noise to every token, by the shape of the batch"
    return None


def _not_alone(config: Any, input_ids: Tensor | None, arguments: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """What a forward is given, or should give, besides hidden states of token ids with a mask and positions."""
    if torch.compiler.is_compiling():
        return "torch.compile traces the forward, and what tokens are alike is known only when it runs"
    if input_ids is None or input_ids.ndim != 2:
        shape = "none" if input_ids is None else str(list(input_ids.shape))
        return f"the forward needs input_ids [B, T], got {shape}"
    if not input_ids.numel():
        return f"the batch {list(input_ids.shape)} has no tokens"
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        return "the forward has a cache (past_key_values or use_cache=True), and a forest of sequences has none"
    for name in _RECORDED:
        if kwargs.get(name, getattr(config, name, False)):
            return f"{name} asks for more than the last hidden states"
    if arguments or kwargs.get("return_dict") is False:
        return "the decoder is called with arguments by position, or for a tuple"
    other = {name: value for name, value in kwargs.items() if name not in (*_BATCH, *_PACKING)}
    tensors = [name for name, value in other.items() if isinstance(value, Tensor) and value.ndim]
    return f"{', '.join(tensors)} would have to be regrouped, too" if tensors else None
