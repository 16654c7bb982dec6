"""What is computed next: continuous batching, prompts in chunks, pre-emption.

Every step has up to `max_tokens` tokens: one of each sequence that is drawing, and for the rest pieces of prompts. A
sequence joins when there is room and leaves when it is complete. When pages run out, the sequence that joined last
gives its pages up, and its tokens are computed again when there is room: it draws the same tokens.

Of sequences with the same prompt, or the same beginning, one computes and the others wait for its pages.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from posttrain.rollout.pages import Digest, OutOfPages, PagePool, page_digests
from posttrain.rollout.sequence import Sequence


class Chunk(NamedTuple):
    """Tokens `[start, end)` of a sequence, which a step computes."""

    sequence: Sequence
    start: int
    end: int

    @property
    def draws(self) -> bool:
        """Whether a token can be drawn after it."""
        return self.end == len(self.sequence.tokens)


class Step(NamedTuple):
    """The chunks of a step, and the pages to copy before it: new page -> old page."""

    chunks: list[Chunk]
    copies: dict[int, int]

    @property
    def num_tokens(self) -> int:
        """Of all chunks."""
        return sum(chunk.end - chunk.start for chunk in self.chunks)

    @property
    def decodes(self) -> bool:
        """Whether each sequence has one token."""
        return self.num_tokens == len(self.chunks)


class Scheduler:
    """Puts sequences into steps.

    Args:
        pool: the pages.
        max_sequences: most sequences in a step.
        max_tokens: most tokens in a step.
        share: whether pages with the same content are held together.
        idle: sequences outside, which lose their pages before one that is waiting or running does, as do sequences that
            are complete and keep theirs.

    Attributes:
        waiting: sequences that aren't in a step yet, or no longer.
        running: the others, in the order in which they joined.
        preempted: how often a sequence had to give its pages up.
        prompt_tokens: of the prompts of all samples.
        shared_tokens: those of them that weren't computed for the sample: found in the cache, or another sample's.
    """

    def __init__(
        self,
        pool: PagePool,
        max_sequences: int,
        max_tokens: int,
        share: bool = True,
        idle: Iterable[Sequence] = (),
    ) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preempted = 0
        self.shared_tokens = 0
        self.prompt_tokens = 0
        self._pool = pool
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens
        self._share = share
        self._idle = list(idle)
        self._counted: set[Sequence] = set()

    def next_step(self) -> Step:
        """The next step, empty if no sequence is left. Raises `OutOfPages` if not one sequence has room."""
        step = Step([], {})
        room = self._max_tokens
        position = 0
        while position < len(self.running) and room:
            sequence = self.running[position]
            end = min(len(sequence.tokens), sequence.computed + room)
            if not self._make_room(sequence, end, step):
                break
            room -= end - sequence.computed
            self._append(sequence, end, step)
            position += 1
        self._admit(room, step)
        if not step.chunks and (self.waiting or self.running):
            raise OutOfPages(f"{self._pool.num_pages} pages of {self._pool.page_size} tokens don't hold one sequence")
        return step

    @property
    def held(self) -> int:
        """Pages with holders."""
        return self._pool.held

    def reserve_ahead(self, sequences: Iterable[Sequence], steps: int) -> int:
        """Pages for `steps` more tokens of each sequence, or for fewer if there is no room; how many it became.

        A sequence doesn't get more than it may have.
        """
        size = self._pool.page_size
        while steps:
            ends = (min(s.computed + steps, s.limit) for s in sequences)
            missing = [max(0, -(-end // size) - len(s.pages)) for s, end in zip(sequences, ends, strict=True)]
            if sum(missing) <= self._pool.available:
                break
            steps //= 2
        if steps:
            for sequence, count in zip(sequences, missing, strict=True):
                sequence.pages += [self._pool.take() for _ in range(count)]
        return steps

    def split(self, sequence: Sequence, twins: Iterable[Sequence]) -> None:
        """`twins` go on from the pages of `sequence`."""
        for twin in reversed(list(twins)):
            self._count_prompt(twin, sequence.start)
            for page in sequence.pages:
                self._pool.hold(page)
            twin.pages = sequence.pages.copy()
            twin.digests = sequence.digests.copy()
            if len(self.running) < self._max_sequences:
                self.running.insert(self.running.index(sequence) + 1, twin)
            else:
                self.waiting.appendleft(twin)

    def remove(self, sequence: Sequence) -> None:
        """`sequence` is complete. If it keeps its pages, then not those that were reserved for what it didn't draw: a
        fork would hold them too, and both would write there."""
        place: Any = self.running if sequence in self.running else self.waiting
        place.remove(sequence)
        if sequence.kept:
            used = -(-sequence.computed // self._pool.page_size)
            self._pool.drop(sequence.pages[used:])
            del sequence.pages[used:]
            self._idle.append(sequence)
        else:
            self.drop(sequence)

    def clear(self) -> None:
        """No sequence goes on."""
        for sequence in (*self.running, *self.waiting):
            if not sequence.kept:
                self.drop(sequence)
        self.running.clear()
        self.waiting.clear()

    def drop(self, sequence: Sequence) -> None:
        """`sequence` gives its pages up."""
        self._pool.drop(sequence.pages)
        sequence.pages, sequence.computed = [], 0

    def _make_room(self, sequence: Sequence, end: int, step: Step) -> bool:
        """Reserve pages, at the cost of those that joined later; False if `sequence` itself had to leave."""
        while True:
            try:
                self._reserve(sequence, end, step)
                return True
            except OutOfPages:
                holder = next((other for other in (*self._idle, *self.waiting) if other.pages), None)
                victim = holder or self.running.pop()
                self.drop(victim)
                if holder is None:
                    self.preempted += 1
                    self.waiting.appendleft(victim)
                if victim is sequence:
                    return False

    def _reserve(self, sequence: Sequence, end: int, step: Step) -> None:
        """Pages for the tokens up to `end`, those that will be written held by nobody else."""
        size, pages = self._pool.page_size, sequence.pages
        first = sequence.computed // size
        if first < len(pages) and self._pool.shared(pages[first]):
            copy = self._pool.take()
            step.copies[copy] = pages[first]
            self._pool.drop([pages[first]])
            pages[first] = copy
        while len(pages) * size < end:
            pages.append(self._pool.take())

    def _append(self, sequence: Sequence, end: int, step: Step) -> None:
        """Put the tokens up to `end` into the step. Full pages are filed now: a step writes all before it reads."""
        step.chunks.append(Chunk(sequence, sequence.computed, end))
        if self._share and end - sequence.computed > 1:  # a prompt: others may have the same
            digests = page_digests(sequence.tokens, self._pool.page_size, sequence.digests)
            for index in range(sequence.computed // self._pool.page_size, end // self._pool.page_size):
                self._pool.file(sequence.pages[index], digests[index])

    def _admit(self, room: int, step: Step) -> None:
        """Let waiting sequences join, as long as each one running can have another page."""
        passed: list[Sequence] = []
        while self.waiting and room and len(self.running) < self._max_sequences:
            sequence = self.waiting.popleft()
            if not sequence.pages and not self._find_pages(sequence):
                passed.append(sequence)
                continue
            found = sequence.computed
            end = min(len(sequence.tokens), sequence.computed + room)
            if self.running and self._pages_missing(sequence, end) + len(self.running) > self._pool.available:
                self.waiting.appendleft(sequence)
                break
            self.running.append(sequence)
            if not self._make_room(sequence, end, step):
                break
            self._count_prompt(sequence, found)
            room -= end - sequence.computed
            self._append(sequence, end, step)
        self.waiting.extendleft(reversed(passed))

    def _count_prompt(self, sequence: Sequence, found: int) -> None:
        """Once for each sample: how many tokens of its prompt were there when it first joined."""
        if not sequence.drawn and sequence not in self._counted:
            self._counted.add(sequence)
            self.shared_tokens += min(found, sequence.start)
            self.prompt_tokens += sequence.start

    def _pages_missing(self, sequence: Sequence, end: int) -> int:
        return -(-end // self._pool.page_size) - len(sequence.pages) + 1

    def _find_pages(self, sequence: Sequence) -> bool:
        """Hold the pages that have the beginning of `sequence`; False if one of them is still being computed."""
        size = self._pool.page_size
        found: list[int] = []
        for digest in self._findable(sequence):
            page = self._pool.find(digest)
            if page is None:
                if digest in self._coming():
                    return False
                break
            found.append(page)
        for page in found:
            self._pool.hold(page)
        sequence.pages, sequence.computed = found, len(found) * size
        return True

    def _findable(self, sequence: Sequence) -> list[Digest]:
        """Digests of the full pages before the last token, which has to be computed in any case."""
        if not self._share:
            return []
        size = self._pool.page_size
        return page_digests(sequence.tokens, size, sequence.digests)[: (len(sequence.tokens) - 1) // size]

    def _coming(self) -> Iterator[Digest]:
        """Digests of pages whose content isn't computed yet."""
        for sequence in self.running:
            yield from sequence.digests[sequence.computed // self._pool.page_size :]
