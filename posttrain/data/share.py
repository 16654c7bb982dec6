"""Which tokens of a set of sequences are the same prefix, as a forest in which each is stored once.

Sequences that agree on their first tokens become branches of one segment, and so on within the branches: a prompt and
its completions, a chosen and a rejected answer, turns of a conversation that goes on in several ways. A prefix shorter
than `SHORTEST` tokens is not worth a segment of its own: every sequence keeps its copy.

A tree that is too large for one micro-batch is divided where it branches, as low as possible: each part has what lies
above it, and that is all that is stored again. With capacity C, a segment that ends e tokens after its root leaves
room for C - e tokens below it. So, from the leaves up, what continues a segment is put best-fit into as many bins of
C - e tokens as it needs, and each bin, with the segment on top, is one item for the segment above. Sequences of one
unit (the two answers of a preference pair) must not be parted: each waits outside the bins until it meets the others,
in the segment where their paths part.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from posttrain.data.pack import pack_best_fit

SHORTEST = 16

_Part = tuple[int, list[int]]  # tokens, and the sequences that end in them


@dataclass
class Forest:
    """Segments in depth-first order, and which of them each sequence consists of.

    Attributes:
        tokens: of each segment.
        parents: index of each segment's parent, -1 for a root.
        paths: for each sequence, its segments from the root on.
    """

    tokens: list[NDArray[np.int32]] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """Of the segments."""
        return [len(tokens) for tokens in self.tokens]

    @property
    def num_tokens(self) -> int:
        """Of all segments."""
        return sum(self.lengths)

    def places(self) -> list[NDArray[np.int64]]:
        """For each sequence, where each of its tokens lies when the segments are laid end to end."""
        ends = np.cumsum([0, *self.lengths])
        ranges = [np.arange(start, end) for start, end in pairwise(ends)]
        return [np.concatenate([np.empty(0, np.int64), *(ranges[segment] for segment in path)]) for path in self.paths]

    def select(self, sequences: Iterable[int]) -> "Forest":
        """The forest of these sequences alone, numbered in the order given."""
        paths = [self.paths[sequence] for sequence in sequences]
        kept = sorted({segment for path in paths for segment in path})
        number = {segment: new for new, segment in enumerate(kept)} | {-1: -1}
        return Forest(
            tokens=[self.tokens[segment] for segment in kept],
            parents=[number[self.parents[segment]] for segment in kept],
            paths=[[number[segment] for segment in path] for path in paths],
        )

    def divide(self, capacity: int, units: Sequence[int] | None = None) -> list[list[int]]:
        """Bins of sequences, each sequence once, whose forests have at most `capacity` tokens each.

        `units[i]` is the unit that sequence i belongs to; a unit is never parted. Without it each sequence is one.
        A forest that fits stays whole. Raises `ValueError` if a unit alone doesn't fit.
        """
        if self.num_tokens <= capacity:
            return [list(range(len(self.paths)))] if self.paths else []
        units = range(len(self.paths)) if units is None else units
        sizes = Counter(units)
        ends: list[int] = []
        for length, parent in zip(self.lengths, self.parents, strict=True):
            ends.append(length + (ends[parent] if parent >= 0 else 0))
        below: list[list[_Part]] = [[] for _ in range(len(ends) + 1)]  # of each segment, and last of no segment
        for sequence, path in enumerate(self.paths):
            below[path[-1] if path else -1].append((0, [sequence]))
        for segment in reversed(range(len(ends))):
            length = len(self.tokens[segment])
            whole, waiting = self._gather(below[segment], segment, units, sizes)
            parts = _join(whole, capacity - ends[segment]) + waiting
            below[self.parents[segment]] += [(length + size, members) for size, members in parts]
        whole, _ = self._gather(below[-1], -1, units, sizes)
        return [sorted(members) for _, members in _join(whole, capacity)]

    def _gather(
        self, parts: list[_Part], segment: int, units: Sequence[int], sizes: Mapping[int, int]
    ) -> tuple[list[_Part], list[_Part]]:
        """`parts` with the members of each unit that is all there joined, and those whose unit isn't all there.

        A joined unit counts the tokens that it has below `segment`.
        """
        whole: list[_Part] = []
        alone: dict[int, list[_Part]] = {}
        for part in parts:
            unit = units[part[1][0]]
            if len(part[1]) < sizes[unit]:
                alone.setdefault(unit, []).append(part)
            else:
                whole.append(part)
        waiting: list[_Part] = []
        for unit, found in alone.items():
            if len(found) < sizes[unit]:
                waiting += found
                continue
            members = [member for _, group in found for member in group]
            below = {place for member in members for place in self.paths[member] if place > segment}
            whole.append((sum(len(self.tokens[place]) for place in below), members))
        return whole, waiting


def share_prefixes(sequences: Sequence[NDArray[np.int32]]) -> Forest:
    """The forest of `sequences` with shared prefixes; what shares nothing stays in order."""
    forest = Forest(paths=[[] for _ in sequences])
    # (sequences, tokens of them that have a segment, tokens they are known to agree on, segment they continue)
    open_groups = [(list(range(len(sequences))), 0, 0, -1)]
    while open_groups:
        members, start, agreed, parent = open_groups.pop()
        common = _common_prefix([sequences[i] for i in members], agreed)
        if len(members) == 1 or common - start >= SHORTEST:
            if common > start:
                parent = _add(forest, sequences[members[0]][start:common], members, parent)
            start = common
        branches: dict[int, list[int]] = {}
        for i in members:
            if len(sequences[i]) > common:
                branches.setdefault(int(sequences[i][common]), []).append(i)
            elif common > start:
                branches[-1 - i] = [i]  # ends here, with tokens that have no segment yet
        open_groups += [(branch, start, common, parent) for branch in reversed(branches.values())]
    return forest


def keep_apart(sequences: Sequence[NDArray[np.int32]]) -> Forest:
    """The forest in which every sequence is a segment of its own."""
    return Forest(list(sequences), [-1] * len(sequences), [[i] for i in range(len(sequences))])


def _add(forest: Forest, tokens: NDArray[np.int32], members: list[int], parent: int) -> int:
    """A new segment that all members go through; returns its index."""
    segment = len(forest.tokens)
    forest.tokens.append(tokens)
    forest.parents.append(parent)
    for i in members:
        forest.paths[i].append(segment)
    return segment


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


def _join(parts: list[_Part], capacity: int) -> list[_Part]:
    """`parts` in bins of at most `capacity` tokens, as few as best-fit decreasing finds."""
    sizes = [size for size, _ in parts]
    bins = [range(len(parts))] if parts and sum(sizes) <= capacity else pack_best_fit(sizes, capacity)
    return [(sum(parts[i][0] for i in bin), [member for i in bin for member in parts[i][1]]) for bin in bins]
