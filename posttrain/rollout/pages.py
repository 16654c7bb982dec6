"""Who holds which page of the key-value cache.

A page holds the keys and values of `page_size` consecutive tokens of a sequence, for every layer. Sequences that begin
with the same tokens hold the same pages: a full page is filed under a digest of all tokens up to its end, and counts
its holders. A page without holders is free, but keeps its content and its place in the file until it is taken for
something else, the longest unused first.

    free (never used or forgotten) -> held by 1, 2, ... sequences -> idle (filed, nobody holds it) -> held again or free
"""

from collections import Counter
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

Digest = bytes


class OutOfPages(RuntimeError):
    """Every page is held."""


class PagePool:
    """Counts the holders of `num_pages` pages."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._holders: Counter[int] = Counter()
        self._fresh = 0  # pages from here on have never been used
        self._free: list[int] = []
        self._idle: dict[int, None] = {}  # in the order in which they lost their last holder
        self._page_of: dict[Digest, int] = {}
        self._digest_of: dict[int, Digest] = {}

    @property
    def held(self) -> int:
        """Pages with holders."""
        return len(self._holders)

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return self.num_pages - self.held

    def take(self) -> int:
        """A page for one holder, with any content. Raises `OutOfPages`."""
        if self._free:
            page = self._free.pop()
        elif self._fresh < self.num_pages:
            page, self._fresh = self._fresh, self._fresh + 1
        elif self._idle:
            page = next(iter(self._idle))
            del self._idle[page]
            del self._page_of[self._digest_of.pop(page)]
        else:
            raise OutOfPages(f"all {self.num_pages} pages of {self.page_size} tokens are held")
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more holder for a page that is held or idle."""
        self._idle.pop(page, None)
        self._holders[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """One holder less for each of `pages`."""
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                del self._holders[page]
                if page in self._digest_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def shared(self, page: int) -> bool:
        """Whether others hold `page`, too."""
        return self._holders[page] > 1

    def file(self, page: int, digest: Digest) -> None:
        """File a full page, unless another has the same content."""
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def find(self, digest: Digest) -> int | None:
        """The page filed under `digest`."""
        return self._page_of.get(digest)

    def forget(self) -> None:
        """Empty the file: no content is found any more."""
        self._free += self._idle
        self._idle.clear()
        self._page_of.clear()
        self._digest_of.clear()


def page_digests(tokens: list[int], page_size: int, known: list[Digest]) -> list[Digest]:
    """The digests of all full pages of `tokens`; `known` has those of the first ones, and gets the others."""
    for index in range(len(known), len(tokens) // page_size):
        content = np.array(tokens[index * page_size : (index + 1) * page_size], np.int64).tobytes()
        before = known[-1] if known else b""
        known.append(blake2b(before + content, digest_size=16).digest())
    return known
