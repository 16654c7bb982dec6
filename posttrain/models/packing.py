"""Run a decoder on packed sequences: as one row of tokens, or padded where an architecture can't do that.

As one row, the layout travels as a keyword to our attention, positions restart with every sequence, and everything
else in the decoder must work token by token. That is known of the families of families.py. Of another architecture it
is found out: a trial runs two short sequences packed and alone, and the hidden states must be the same.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from posttrain.ops.layout import PackedLayout


def run_packed(decoder: nn.Module, input_ids: Tensor, layout: PackedLayout) -> Tensor:
    """Hidden states `[T, H]` of the tokens `[T]`, from one row of T tokens.

    A mask of four dimensions is handed on as it is, so transformers makes no `[T, T]` one; our attention ignores it.
    """
    output = decoder(
        input_ids=input_ids.unsqueeze(0),
        position_ids=layout.positions.long().unsqueeze(0),
        attention_mask=torch.empty(1, 1, 0, 0, device=input_ids.device),
        use_cache=False,
        layout=layout,
    )
    return output.last_hidden_state[0]


def run_padded(decoder: nn.Module, input_ids: Tensor, layout: PackedLayout) -> Tensor:
    """The same from one padded row for each sequence, as any causal LM takes it.

    Raises `ValueError` for a layout in which a segment continues another.
    """
    if not layout.independent:
        raise ValueError(f"{type(decoder).__name__} runs padded, and then segments can't share a prompt")
    starts = layout.segment_starts
    lengths = [end - start for start, end in pairwise(starts) if end > start]
    rows = pad_sequence(input_ids.split(lengths), batch_first=True)  # [B, L], padded on the right
    real = torch.arange(rows.shape[1], device=rows.device) < torch.tensor(lengths, device=rows.device).unsqueeze(1)
    output = decoder(input_ids=rows, attention_mask=real.long(), use_cache=False)
    return output.last_hidden_state[real]


def obstacle_to_packing(causal: Any) -> str | None:
    """Why `run_packed` is wrong for this model, which has our attention already; None if it is right."""
    config: Any = causal.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if not causal._supports_attention_backend:
        return f"{type(causal).__name__} doesn't use transformers' attention interface, so sequences are padded"
    if causal._is_stateful or kinds or getattr(config, "sliding_window", None):
        return f"{type(causal).__name__} mixes tokens by more than full attention, so sequences are padded"
    try:
        error, magnitude = _trial(causal.base_model)
    except Exception as problem:
        return f"a trial with packed sequences failed, so they are padded ({type(problem).__name__}: {problem})"
    if error <= magnitude * torch.finfo(causal.dtype).eps ** 0.5:
        return None
    return f"a trial with packed sequences was off by {error / magnitude:.1g}, so they are padded"


@torch.no_grad()
def _trial(decoder: Any) -> tuple[float, float]:
    """Largest difference of the hidden states of two sequences packed and alone, and the largest hidden state."""
    lengths = [5, 7]
    device = decoder.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.get_text_config().vocab_size, (12,), generator=generator).to(device)
    training = {module: module.training for module in decoder.modules()}
    decoder.eval()
    try:
        packed = run_packed(decoder, ids, PackedLayout.from_lengths(lengths, device))
        alone = [decoder(input_ids=part[None], use_cache=False).last_hidden_state[0] for part in ids.split(lengths)]
    finally:
        for module, mode in training.items():
            module.training = mode
    expected = torch.cat(alone)
    return (packed - expected).abs().max().item(), expected.abs().max().item()
