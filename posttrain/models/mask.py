"""The masks of transformers as packed layouts.

transformers describes a mask by a function sees(row, head, query, key) and a padding mask `[B, T]`. Once in a forward,
for each kind of layer, it asks the mask function of the attention implementation to make of them what its attention
needs; that of "sdpa" evaluates all T^2 pairs. But whatever transformers puts together of causal attention, windows,
chunks and packed sequences lets a token see its own sequence before it, as far as the window reaches, and nothing else.
So T - 1 pairs tell all: where a token doesn't see the one before it, a sequence starts. Every row starts one, too, and
padding is left out. What is left is a `PackedLayout`.

This relies on the keywords with which transformers (5.17 and 5.23 were tried) calls a mask function registered in its
`AttentionMaskInterface`, and on its models handing on as `attention_mask` what that returns, even if it is no tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from posttrain.ops.layout import PackedLayout

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class PackedMask:
    """Which of the tokens `[B, T]` of a forward without earlier keys see which.

    Attributes:
        rows: B.
        length: T.
        sees: of row, head, query and key, by index, whether the query sees the key; the indices are integer tensors.
        real: bool `[B, T]`, False for padding, or None where there is none.
        window: how many tokens back a token sees, itself included; None for all.
        device: of the model's tensors.
    """

    ndim: ClassVar[int] = 4  # not a padding mask, if it comes back as the `attention_mask` of a forward
    rows: int
    length: int
    sees: Sees
    real: Tensor | None
    window: int | None
    device: torch.device | str

    @cached_property
    def packing(self) -> tuple[PackedLayout, Tensor | None]:
        """The layout of the tokens that aren't padding, and their indices among all B T, or None if that is all.

        Made when the first layer asks, which synchronises a GPU. Raises `ValueError` if a token sees the next one.
        """
        starts = self._starts()
        real = torch.ones_like(starts) if self.real is None else self.real.cpu()
        index = real.flatten().nonzero().squeeze(1)
        lengths = starts.flatten().cumsum(0)[index].unique_consecutive(return_counts=True)[1]
        layout = PackedLayout.from_lengths(lengths.tolist())
        layout = replace(layout, positions=(index % max(self.length, 1)).int()).to(self.device)
        return layout, None if len(index) == real.numel() else index.to(self.device)

    def _starts(self) -> Tensor:
        """Bool `[B, T]` on the host: where a sequence starts."""
        row = torch.arange(self.rows, device=self.device)[:, None]
        token = torch.arange(self.length, device=self.device)[None]
        head, earlier, later = row.new_zeros(()), token[:, :-1], token[:, 1:]
        pairs = [self.sees(row, head, later, earlier), self.sees(row, head, earlier, later)]
        continues, sees_ahead = torch.stack([pair.expand(self.rows, -1) for pair in pairs]).cpu()
        if sees_ahead.any():
            raise ValueError(
                "attention 'posttrain' is causal, and this model lets tokens see later ones; "
                "use attn_implementation='sdpa'"
            )
        return torch.nn.functional.pad(~continues, (min(self.length, 1), 0), value=True)

    def contiguous(self) -> "PackedMask":
        """Itself: `generate` with a static cache makes the mask before the forward, and asks this of it."""
        return self


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    q_offset: int,
    kv_offset: int,
    mask_function: Sees,
    attention_mask: PackedMask | Tensor | None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str,
    **options: Any,
) -> PackedMask | Tensor | None:
    """The mask function of our attention.

    A `PackedMask`; for queries that follow a cache (one of fixed size says with a tensor, how many keys it holds), and
    while torch.compile traces, what "sdpa" gets. Raises `ValueError` for a mask that a model makes of a function of
    its own, and for a padding mask of another size than the tokens.
    """
    if isinstance(attention_mask, PackedMask):
        return attention_mask
    whole = q_length == kv_length and kv_offset == 0 and isinstance(q_offset, int) and q_offset == 0
    if whole and not torch.compiler.is_compiling():
        if attention_mask is not None and attention_mask.shape != (batch_size, q_length):
            raise ValueError(
                f"the attention_mask of {batch_size} rows of {q_length} tokens must be [{batch_size}, {q_length}], "
                f"got {list(attention_mask.shape)}"
            )
        if use_vmap:
            raise ValueError(
                "attention 'posttrain' has no masks of a model's own; use attn_implementation='sdpa' for this model"
            )
        return PackedMask(batch_size, q_length, mask_function, attention_mask, local_size, device)
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        device=device,
        **options,
    )
