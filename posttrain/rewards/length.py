"""Length of completions: a penalty that grows from nothing to -1 over the last tokens before a limit.

    0                                      L <= limit - margin
    (limit - margin - L) / margin          limit - margin < L <= limit
    -1                                     limit < L

(Yu et al., "DAPO", 2025, arXiv 2503.14476, equation 13: a completion that is cut off is punished gradually.)
"""

from collections.abc import Sequence
from typing import Any


class OverlongPenalty:
    """A reward function of the number of tokens.

    Args:
        limit: tokens from which the penalty is whole; usually max_completion_length.
        margin: tokens before the limit over which it grows.

    Raises:
        ValueError: unless 0 < margin <= limit.
    """

    def __init__(self, limit: int, margin: int) -> None:
        if not 0 < margin <= limit:
            raise ValueError(f"OverlongPenalty: margin must be from 1 to the limit {limit}, got {margin}")
        self._limit = limit
        self._margin = margin
        self.__name__ = "overlong_penalty"

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float]:
        """From -1.0 to 0.0 for each completion."""
        free = self._limit - self._margin
        return [min(0.0, max(-1.0, (free - len(ids)) / self._margin)) for ids in completion_ids]
