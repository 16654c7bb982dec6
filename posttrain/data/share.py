"""Which tokens of a set of sequences are the same prefix, as a forest in which each is stored once.

Sequences that agree on their first tokens become branches of one segment, and so on within the branches: a prompt and
its completions, a chosen and a rejected answer, turns of a conversation that goes on in several ways. A prefix shorter
than `SHORTEST` tokens is not worth a segment of its own: every sequence keeps its copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

SHORTEST = 16


@dataclass
class SharedPrefixes:
    """Segments in depth-first order, and where each sequence lies.

    Attributes:
        lengths: of the segments.
        parents: index of each segment's parent, -1 for a root.
        tokens: of each segment.
        places: for each sequence, the packed index of each of its tokens.
        num_tokens: of all segments.
    """

    lengths: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    tokens: list[NDArray[np.int32]] = field(default_factory=list)
    places: list[NDArray[np.int64]] = field(default_factory=list)
    num_tokens: int = 0


def share_prefixes(sequences: Sequence[NDArray[np.int32]]) -> SharedPrefixes:
    """The forest of `sequences`; what shares nothing stays in order."""
    shared = SharedPrefixes(places=[np.empty(0, np.int64) for _ in sequences])
    # (sequences, tokens of them that have a segment, tokens they are known to agree on, segment they continue)
    open_groups = [(list(range(len(sequences))), 0, 0, -1)]
    while open_groups:
        members, start, agreed, parent = open_groups.pop()
        common = _common_prefix([sequences[i] for i in members], agreed)
        if len(members) == 1 or common - start >= SHORTEST:
            if common > start:
                parent = _add(shared, sequences, members, start, common, parent)
            start = common
        branches: dict[int, list[int]] = {}
        for i in members:
            if len(sequences[i]) > common:
                branches.setdefault(int(sequences[i][common]), []).append(i)
            elif common > start:
                branches[-1 - i] = [i]  # ends here, with tokens that have no segment yet
        open_groups += [(branch, start, common, parent) for branch in reversed(branches.values())]
    return shared


def _add(
    shared: SharedPrefixes,
    sequences: Sequence[NDArray[np.int32]],
    members: list[int],
    start: int,
    end: int,
    parent: int,
) -> int:
    """A new segment of the tokens start to end of all members; returns its index."""
    first = shared.num_tokens
    shared.num_tokens += end - start
    shared.lengths.append(end - start)
    shared.parents.append(parent)
    shared.tokens.append(sequences[members[0]][start:end])
    for i in members:
        shared.places[i] = np.concatenate([shared.places[i], np.arange(first, first + end - start)])
    return len(shared.lengths) - 1


def _common_prefix(sequences: list[NDArray[np.int32]], agreed: int) -> int:
    """How many first tokens all of them share, at least `agreed`."""
    first = sequences[0] if sequences else np.empty(0, np.int32)
    common = len(first)
    for other in sequences[1:]:
        common = min(common, len(other))
        different = np.flatnonzero(first[agreed:common] != other[agreed:common])
        if len(different):
            common = agreed + int(different[0])
    return common
