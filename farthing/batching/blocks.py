"""Pages of the KV cache: who holds them, which are shared, which may be taken back.

A page is in exactly one of three states, so that free + used + cached = all, always:

- free: holds nothing worth keeping;
- used: referenced by one or more sequences;
- cached: referenced by none, but its content is known by hash and serves the next sequence that
  begins with the same tokens. Taken back, least recently used first, when no page is free.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as TokenSequence

PageHash = bytes


def page_hash(parent: PageHash, tokens: TokenSequence[int]) -> PageHash:
    """Name a full page by its tokens and by all the pages before it (`parent`, b"" for none).

    BLAKE2b with 16 bytes: equal names for different prefixes are not to be met by chance nor to be
    made on purpose, so one client's prefix never answers for another's.
    """
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class OutOfPages(Exception):
    """Neither a free nor a cached page is left."""


class PagePool:
    """Hands out pages, counts their references and remembers what full pages hold."""

    def __init__(self, num_pages: int, page_size: int, prefix_caching: bool = True) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._prefix_caching = prefix_caching
        self._references = [0] * num_pages
        self._hash_of: list[PageHash | None] = [None] * num_pages
        self._page_of: dict[PageHash, int] = {}
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Pages that nobody references but whose content can be used again."""
        return len(self._cached)

    @property
    def used(self) -> int:
        """Pages that some sequence references."""
        return self.num_pages - self.free - self.cached

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out."""
        return self.free + self.cached

    def pages_for(self, tokens: int) -> int:
        """How many pages hold this many tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take pages with one reference each. Raises OutOfPages and takes none if too few."""
        if count > self.available:
            raise OutOfPages(f"{count} pages asked for, {self.available} available")
        pages = [self._take_one() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def match(self, hashes: list[PageHash]) -> list[int]:
        """Reference the pages that hold the longest known beginning of a chain of hashes."""
        pages: list[int] = []
        for name in hashes:
            page = self._page_of.get(name)
            if page is None:
                break
            if self._references[page] == 0:
                del self._cached[page]
            self._references[page] += 1
            pages.append(page)
        return pages

    def publish(self, page: int, name: PageHash) -> None:
        """Make a full, computed page known. The first page of a name keeps it."""
        if self._prefix_caching and self._hash_of[page] is None and name not in self._page_of:
            self._hash_of[page] = name
            self._page_of[name] = page

    def release(self, pages: list[int]) -> None:
        """Give up one reference to each page.

        A sequence's last pages become the least recently used: the beginning of a prefix is worth
        more than its end, since more sequences share it.
        """
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] > 0:
                continue
            if self._hash_of[page] is None:
                self._free.append(page)
            else:
                self._cached[page] = None

    def check_integrity(self) -> None:
        """Raise AssertionError where the books don't match; for tests and debugging."""
        free, cached = set(self._free), set(self._cached)
        used = {page for page, count in enumerate(self._references) if count > 0}
        assert len(free) == len(self._free), "a page is free twice"
        assert len(free) + len(cached) + len(used) == self.num_pages, "a page was lost or doubled"
        assert len(free | cached | used) == self.num_pages, "a page has two states"
        assert all(count >= 0 for count in self._references), "a page was released twice"
        named = {page: name for page, name in enumerate(self._hash_of) if name is not None}
        assert {name: page for page, name in named.items()} == self._page_of, "hashes disagree"
        assert not free & named.keys(), "a free page has a name"
        assert cached <= named.keys(), "a cached page has no name"

    def _take_one(self) -> int:
        if self._free:
            return self._free.pop()
        page, _ = self._cached.popitem(last=False)
        name = self._hash_of[page]
        assert name is not None
        del self._page_of[name]
        self._hash_of[page] = None
        return page
