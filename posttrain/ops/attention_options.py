"""How packed_attention and paged_attention make scores: what both take, check, and hand to kernels."""

import math
from typing import NamedTuple

from torch import Tensor


class ScoreOptions(NamedTuple):
    """As kernels take them: window and softcap are 0 for none."""

    scale: float
    window: int
    softcap: float


def score_options(
    op: str, q: Tensor, scale: float | None, window: int | None, softcap: float | None, sinks: Tensor | None
) -> ScoreOptions:
    """The options of `op` for q `[T, Hq, D]`, with what None stands for; `ValueError` for those that can't be."""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"{op}: window must be an integer of at least 1, got {window!r}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap must be positive and finite, got {softcap}")
    if sinks is not None and (sinks.shape != q.shape[1:2] or not sinks.is_floating_point() or sinks.device != q.device):
        raise ValueError(
            f"{op}: sinks must be [{q.shape[1]}], floating, on {q.device}; "
            f"got {list(sinks.shape)} {sinks.dtype} on {sinks.device}"
        )
    window = 0 if window is None else min(window, 2**31 - 1)  # the largest int32, as all positions are
    return ScoreOptions(q.shape[-1] ** -0.5 if scale is None else scale, window, softcap or 0.0)
