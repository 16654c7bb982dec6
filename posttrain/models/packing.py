"""Run a decoder on packed sequences: as one row of tokens, or padded where an architecture can't do that.

As one row, the layout travels as a keyword to our attention, positions restart with every sequence, and everything
else in the decoder must work token by token (trial.py).
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from posttrain.ops.layout import PackedLayout


def run_packed(decoder: nn.Module, input_ids: Tensor, layout: PackedLayout) -> Tensor:
    """Hidden states `[T, H]` of the tokens `[T]`, from one row of T tokens."""
    return packed_output(decoder, input_ids, layout).last_hidden_state.squeeze(0)


def packed_output(decoder: Callable[..., Any], input_ids: Tensor, layout: PackedLayout, **kwargs: Any) -> Any:
    """What `decoder`, or its forward, gives for one row of the T tokens.

    A mask of four dimensions is handed on as it is, so transformers makes no `[T, T]` one; our attention ignores it.
    """
    return decoder(
        input_ids=input_ids.unsqueeze(0),
        position_ids=layout.positions.long().unsqueeze(0),
        attention_mask=torch.empty(1, 1, 0, 0, device=input_ids.device),
        use_cache=False,
        layout=layout,
        **kwargs,
    )


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
