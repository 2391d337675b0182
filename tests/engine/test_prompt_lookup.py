"""Prompt lookup: what it proposes against a search by hand, and how its memory grows."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from sharded_llama.engine.prompt_lookup import PromptLookup


def searched(tokens, least, most, n):
    """What should be proposed: the longest end of at most `most` tokens that stands before decides.

    Of the places where it stands, the latest with n tokens after it; where none has so many, the earliest has most.
    """
    for length in range(most, least - 1, -1):
        places = [
            at for at in range(len(tokens) - length) if tokens[at : at + length] == tokens[len(tokens) - length :]
        ]
        if places:
            following = [tokens[at + length : at + length + n] for at in places]
            whole = [f for f in following if len(f) == n]
            return whole[-1] if whole else following[0]
    return []


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], 2, [3, 4]),
        ([1, 2, 3, 1, 2, 4, 5, 1, 2], 2, [4, 5]),  # the latest
        ([1, 2, 3, 4, 5, 1, 2, 9, 1, 2], 4, [3, 4, 5, 1]),  # the latest has three tokens after it
        ([7, 7, 7, 7], 3, [7]),  # three stand before, overlapping; one token follows
        ([1, 2, 3, 4], 3, []),
        ([5], 3, []),
        ([8, 1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 2, [9, 2]),  # three tokens are more than two
    ],
)
def test_examples(tokens, n, expected):
    assert PromptLookup(tokens, 2, 3).propose(n) == expected == searched(tokens, 2, 3, n)


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 6),
)
def test_as_searched_by_hand(pieces, least, more, n):
    """Tokens may come in any pieces."""
    first, *others = pieces
    lookup, tokens = PromptLookup(first, least, least + more), list(first)
    for piece in [[], *others]:
        lookup.extend(piece)
        tokens += piece
        assert len(lookup) == len(tokens)
        assert lookup.propose(n) == searched(tokens, least, least + more, n)


def test_tokens_of_any_int32():
    tokens = [2**31 - 1, 0, 2**31 - 2, 2**31 - 1, 0]
    assert PromptLookup(tokens, 1, 4).propose(5) == [2**31 - 2, 2**31 - 1, 0]


def test_memory_is_linear_and_grows_seldom():
    lookup, tokens = PromptLookup(range(10), 2, 4), list(range(10))
    buffers = {id(lookup._buffer): lookup._buffer}  # kept, so that no two have the same id
    for i in range(20_000):
        lookup.extend([i % 1000])
        tokens.append(i % 1000)
        buffers[id(lookup._buffer)] = lookup._buffer
        assert len(lookup._buffer) <= max(64, 2 * len(lookup))
    assert len(buffers) < 15, "it doubles"
    np.testing.assert_array_equal(lookup._buffer[: len(lookup)], tokens)
    assert lookup.propose(3) == [0, 1, 2]
    lookup.extend(range(100_000))
    assert len(lookup._buffer) <= 2 * len(lookup)
    assert lookup._buffer.itemsize == 4
