"""Find out what is not known of an architecture, by running it on two short sequences.

Packing is right for a model whose tokens meet only in our attention, and the language head is known if a linear layer
with a scale and a cap gives the model's own logits. The families of families.py are known to be both.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from posttrain.models.causal_lm import ModelError, decoder
from posttrain.models.head import head
from posttrain.models.packing import run_packed
from posttrain.ops.layout import PackedLayout

_LENGTHS = [5, 7]


def obstacle_to_packing(causal: Any, attention: str) -> str | None:
    """Why `run_packed` would be wrong for this model with our `attention`, or None if it would be right."""
    config = causal.config.get_text_config()
    partial = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if not causal._supports_attention_backend:
        return f"{type(causal).__name__} doesn't use transformers' attention interface, so sequences are padded"
    if causal._is_stateful or partial or getattr(config, "sliding_window", None):
        return f"{type(causal).__name__} mixes tokens by more than full attention, so sequences are padded"
    ids, before = _ids(causal), causal.config._attn_implementation
    with evaluating(causal):
        alone = torch.cat([_hidden(causal, part) for part in ids.split(_LENGTHS)])
        try:
            causal.set_attn_implementation(attention)
            packed = run_packed(decoder(causal), ids, PackedLayout.from_lengths(_LENGTHS, ids.device))
        except Exception as problem:
            return f"a trial with packed sequences failed, so they are padded ({type(problem).__name__}: {problem})"
        finally:
            causal.set_attn_implementation(before)
    return None if _same(packed, alone) else "packed sequences see each other, so they are padded"


def obstacle_to_head(causal: Any) -> str | None:
    """Why `linear_logprob` can't compute the logits of this model, or None if it can."""
    try:
        parts = head(causal)
    except ModelError as problem:
        return str(problem)
    if isinstance(parts.weight, DTensor):
        return f"the language head of {type(causal).__name__} is divided among processes"
    with evaluating(causal):
        ids = _ids(causal)
        expected = causal(input_ids=ids[None], use_cache=False).logits[0]
        logits = parts.logits(_hidden(causal, ids))
    return None if _same(logits, expected) else f"{type(causal).__name__} doesn't compute its logits as we know it"


@contextmanager
def evaluating(causal: Any) -> Iterator[None]:
    """No gradient and no dropout, and afterwards every module in the mode it was in."""
    training = {module: module.training for module in causal.modules()}
    causal.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _ids(causal: Any) -> Tensor:
    size = causal.config.get_text_config().vocab_size
    ids = torch.randint(size, (sum(_LENGTHS),), generator=torch.Generator().manual_seed(0))
    return ids.to(causal.get_input_embeddings().weight.device)


def _hidden(causal: Any, ids: Tensor) -> Tensor:
    return decoder(causal)(input_ids=ids[None], use_cache=False).last_hidden_state[0]


def _same(a: Tensor, b: Tensor) -> bool:
    return (a - b).abs().max().item() <= b.abs().max().item() * torch.finfo(b.dtype).eps ** 0.5
