"""The pages of one data shard: who uses them, which are free, and which hold a known prefix.

A page is in one of three states. Used: sequences hold references to it. Evictable: nobody does, but its content has
been registered, so that a later sequence with the same tokens may take it up again. Empty: nobody does, and nothing is
known of its content. Every operation takes constant time for each page.
"""

import collections
import hashlib
from collections.abc import Sequence

import numpy as np

DIGEST_BYTES = 16
MAX_SEED_BYTES = hashlib.blake2b.MAX_KEY_SIZE


def page_digests(tokens: Sequence[int], page_size: int, seed: bytes, parent: bytes = b"") -> list[bytes]:
    """Digests of the full pages of `tokens`, the first of which follows the page with digest `parent` (b"": none).

    digest = blake2b(parent digest + the page's tokens as int32, key=seed): it names the page's tokens and all before
    them. Whoever does not know the seed cannot make two prefixes of the same digest.
    """
    full = len(tokens) // page_size
    data, width = np.array(tokens[: full * page_size], np.int32).tobytes(), 4 * page_size
    keyed, digests = hashlib.blake2b(digest_size=DIGEST_BYTES, key=seed), []
    for start in range(0, full * width, width):
        digest = keyed.copy()  # half the time of beginning with the key again
        digest.update(parent + data[start : start + width])
        parent = digest.digest()
        digests.append(parent)
    return digests


class PagePool:
    """`n_pages` pages, numbered from 0, of `page_size` positions each.

    Args:
      prefix_caching: without it nothing is registered or found.
      seed: key of the digests, at most MAX_SEED_BYTES. It never changes which page is given out.
    """

    def __init__(self, n_pages: int, page_size: int, prefix_caching: bool, seed: bytes) -> None:
        self.n_pages, self.page_size, self.prefix_caching = n_pages, page_size, prefix_caching
        self.n_evicted = 0  # registered pages that were given out for something else, since the start
        self._seed = seed
        self.references = [0] * n_pages  # of each page
        self._empty = list(range(n_pages - 1, -1, -1))  # a stack: page 0 is given out first
        self._evictable: collections.OrderedDict[int, None] = collections.OrderedDict()  # least recently used first
        self._page_of: dict[bytes, int] = {}
        self._digest_of: list[bytes | None] = [None] * n_pages

    @property
    def n_free(self) -> int:
        """Pages that can be given out, evictable ones included."""
        return len(self._empty) + len(self._evictable)

    @property
    def n_used(self) -> int:
        """Pages that at least one sequence holds."""
        return self.n_pages - self.n_free

    def allocate(self) -> int | None:
        """A page with one reference, or None if none is free. Empty pages first, then the least recently used one."""
        if self._empty:
            page = self._empty.pop()
        elif self._evictable:
            page, _ = self._evictable.popitem(last=False)
            self._forget(page)
            self.n_evicted += 1
        else:
            return None
        self.references[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more reference to a page in use. Raises ValueError if it is not."""
        if self.references[page] == 0:
            raise ValueError(f"page {page} is free; only a page in use can be shared.")
        self.references[page] += 1

    def take(self, pages: Sequence[int]) -> None:
        """One more reference to each of the registered `pages` (as `match` found them), in use or evictable."""
        for page in pages:
            if self.references[page] == 0:
                del self._evictable[page]
            self.references[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """Gives back one reference to each page of a sequence, in the sequence's order.

        The last pages become evictable first: without a page, those after it could not be found any more. Raises
        ValueError for a page without references.
        """
        for page in reversed(pages):
            if self.references[page] == 0:
                raise ValueError(f"page {page} is freed twice.")
            self.references[page] -= 1
            if self.references[page] == 0:
                if self._digest_of[page] is None:
                    self._empty.append(page)
                else:
                    self._evictable[page] = None

    def n_evictable_of(self, pages: Sequence[int]) -> int:
        """How many of `pages` nobody uses: taking them takes so many from the free ones."""
        return sum(self.references[page] == 0 for page in pages)

    def match(self, tokens: Sequence[int]) -> list[int]:
        """Pages of the longest registered chain that `tokens` begin with; takes no references."""
        return self.match_digests(page_digests(tokens, self.page_size, self._seed))

    def match_digests(self, digests: Sequence[bytes]) -> list[int]:
        """`match` of tokens whose `page_digests` are known."""
        pages = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def register(self, page: int, parent: bytes, tokens: Sequence[int]) -> bytes:
        """Lets a page that is full of computed `tokens` be found; `parent`: digest of the page before (b"": none).

        Returns its digest. Raises ValueError unless there are exactly `page_size` tokens and the page is in use.
        """
        if len(tokens) != self.page_size:
            raise ValueError(f"a page of {len(tokens)} tokens is not full; a full one has {self.page_size}.")
        (digest,) = page_digests(tokens, self.page_size, self._seed, parent)
        self.register_digest(page, digest)
        return digest

    def register_digest(self, page: int, digest: bytes) -> None:
        """`register` of a page whose digest is known. If another page has it already, that one stays the one found."""
        if self.references[page] == 0:
            raise ValueError(f"page {page} is free; only a page in use can be registered.")
        if self.prefix_caching and digest not in self._page_of:
            self._forget(page)
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def check(self) -> None:
        """Raises AssertionError if the pool's books contradict each other. Takes time proportional to the pool."""
        free = [*self._empty, *self._evictable]
        assert len(set(free)) == len(free), "a page is free twice"
        assert all(n >= 0 for n in self.references), "a page has less than no references"
        unused = {page for page, n in enumerate(self.references) if n == 0}
        assert set(free) == unused, "the free pages are not those without references"
        assert all(self._digest_of[page] is None for page in self._empty), "an empty page is registered"
        assert all(self._digest_of[page] is not None for page in self._evictable), "an evictable page is not registered"
        registered = {digest: page for page, digest in enumerate(self._digest_of) if digest is not None}
        assert registered == self._page_of, "pages and digests do not belong together"
        assert self.prefix_caching or not registered, "a page is registered without prefix caching"

    def _forget(self, page: int) -> None:
        digest = self._digest_of[page]
        if digest is not None:
            del self._page_of[digest]
            self._digest_of[page] = None
