"""The page pool: rules one by one, and any order of calls against a model in plain words."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from sharded_llama.engine.page_pool import PagePool, page_digests

SEED = b"seed"


def pool_of(n_pages, page_size=2, prefix_caching=True):
    return PagePool(n_pages, page_size, prefix_caching, SEED)


def test_a_digest_names_the_page_and_all_before_it():
    def digest(parent, tokens):
        data = parent + np.array(tokens, "<i4").tobytes()
        return hashlib.blake2b(data, key=SEED, digest_size=16).digest()

    first = digest(b"", [1, 2])
    assert page_digests([1, 2, 3, 4, 5], 2, SEED) == [first, digest(first, [3, 4])]
    assert page_digests([3, 4], 2, SEED, first) == [digest(first, [3, 4])]
    assert page_digests([1, 2], 2, b"other") != [first]
    assert page_digests([1], 2, SEED) == []


def test_pages_run_out_and_come_back():
    pool = pool_of(3)
    assert [pool.allocate() for _ in range(4)] == [0, 1, 2, None]
    assert (pool.n_free, pool.n_used) == (0, 3)
    pool.free([0, 1])
    assert (pool.n_free, pool.n_used) == (2, 1)
    assert pool.allocate() == 0, "empty pages are reused, the last one freed first"
    pool.check()


def test_a_shared_page_is_free_when_all_gave_it_back():
    pool = pool_of(1)
    page = pool.allocate()
    pool.share(page)
    pool.free([page])
    assert pool.allocate() is None
    pool.free([page])
    assert pool.n_free == 1
    with pytest.raises(ValueError, match="page 0 is freed twice"):
        pool.free([page])
    with pytest.raises(ValueError, match="only a page in use can be shared"):
        pool.share(page)
    with pytest.raises(ValueError, match="only a page in use can be registered"):
        pool.register(page, b"", [1, 2])


def registered(pool, tokens):
    """Allocates and registers the full pages of `tokens`."""
    pages, parent = [], b""
    for start in range(0, len(tokens) - pool.page_size + 1, pool.page_size):
        pages.append(pool.allocate())
        parent = pool.register(pages[-1], parent, tokens[start : start + pool.page_size])
    return pages


def test_match_finds_the_longest_chain():
    pool = pool_of(4)
    pages = registered(pool, [1, 2, 3, 4, 5, 6])
    assert pool.match([1, 2, 3, 4, 5, 6, 7, 8]) == pages
    assert pool.match([1, 2, 3, 4, 6, 5]) == pages[:2]
    assert pool.match([1, 2, 3]) == pages[:1]
    assert pool.match([3, 4]) == [], "the same tokens after something else are another page"
    assert pool.match([]) == []


def test_a_free_page_can_be_taken_up_again():
    pool = pool_of(2)
    pages = registered(pool, [1, 2, 3, 4])
    pool.free(pages)
    assert pool.n_free == 2
    assert pool.n_evictable_of(pages) == 2
    pool.take(pool.match([1, 2, 3, 4]))
    assert pool.n_free == 0
    assert pool.allocate() is None
    pool.take(pages[:1])
    pool.free(pages)
    assert pool.n_used == 1, "the first page was taken twice"
    pool.check()


def test_eviction_takes_the_least_recently_used_and_of_one_sequence_the_last():
    pool = pool_of(5)
    old, new = registered(pool, [1, 1, 2, 2]), registered(pool, [3, 3, 4, 4])
    pool.free(old)
    pool.free(new)
    assert pool.allocate() == 4, "the empty page comes before any that holds a prefix"
    assert [pool.allocate() for _ in range(3)] == [old[1], old[0], new[1]]
    assert pool.n_evicted == 3
    assert pool.match([1, 1, 2, 2]) == []
    assert pool.match([3, 3, 4, 4]) == new[:1]
    pool.check()


def test_the_first_page_of_a_digest_stays():
    pool = pool_of(2)
    (first,) = registered(pool, [7, 7])
    (second,) = registered(pool, [7, 7])
    assert pool.match([7, 7]) == [first] != [second]
    pool.free([second])
    pool.free([first])
    assert pool.match([7, 7]) == [first]
    assert pool.allocate() == second, "the copy holds nothing that could be found"
    pool.check()


def test_only_full_pages_are_registered():
    pool = pool_of(1)
    with pytest.raises(ValueError, match="a page of 1 tokens is not full; a full one has 2"):
        pool.register(pool.allocate(), b"", [1])


def test_without_prefix_caching_nothing_is_found():
    pool = pool_of(2, prefix_caching=False)
    registered(pool, [1, 2])
    assert pool.match([1, 2]) == []
    pool.free([0])
    assert pool.n_evictable_of([0]) == 1
    assert pool.allocate() == 0
    assert pool.n_evicted == 0
    pool.check()


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(1, 8), st.booleans())
def test_any_order_of_calls(data, n_pages, caching):
    """Sequences over two token values come and go: every page found holds exactly the tokens asked for."""
    pool = pool_of(n_pages, prefix_caching=caching)
    content = {}  # page -> all tokens up to its end, as registered last
    held = []  # pages of each live sequence
    for _ in range(data.draw(st.integers(1, 25))):
        if held and data.draw(st.booleans()):
            pool.free(held.pop(data.draw(st.integers(0, len(held) - 1))))
        tokens = data.draw(st.lists(st.integers(0, 1), max_size=10))
        pages = pool.match(tokens)
        for i, page in enumerate(pages):
            assert content[page] == tokens[: 2 * i + 2]
        n_new = len(tokens) // 2 - len(pages)
        if n_new <= pool.n_free - pool.n_evictable_of(pages):
            pool.take(pages)
            parents = [b"", *page_digests(tokens, 2, SEED)]
            for i in range(len(pages), len(tokens) // 2):
                page = pool.allocate()
                assert all(page not in other for other in [*held, pages]), "a page in use is given out"
                content[page] = tokens[: 2 * i + 2]
                pool.register(page, parents[i], tokens[2 * i : 2 * i + 2])
                pages.append(page)
            held.append(pages)
            if caching:
                assert len(pool.match(tokens)) == len(tokens) // 2
        pool.check()
        assert pool.n_used == len({page for pages in held for page in pages})
    for pages in held:
        pool.free(pages)
    assert pool.n_free == n_pages
