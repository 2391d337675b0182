"""Sets of tokens as words of 32 bits: bit t % 32 of word t // 32."""

from collections.abc import Iterable

import numpy as np

from ..sampling.slots import n_words


def of_flags(flags_V: np.ndarray) -> np.ndarray:
    """Words (W,) uint32 of booleans (V,); bits beyond V are clear."""
    padded = np.zeros(n_words(len(flags_V)) * 32, bool)
    padded[: len(flags_V)] = flags_V
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32, copy=False)


def of_ids(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """Words (W,) uint32 with the bits of `ids`; those that are not below vocab_size are left out."""
    flags_V = np.zeros(vocab_size, bool)
    flags_V[[i for i in ids if 0 <= i < vocab_size]] = True
    return of_flags(flags_V)


def all_of(vocab_size: int) -> np.ndarray:
    """Words (W,) uint32 with the bits of every token below vocab_size."""
    return of_flags(np.ones(vocab_size, bool))


def has(words_W: np.ndarray, token: int) -> bool:
    """Whether a token is in a set; none beyond its words is."""
    return 0 <= token < 32 * len(words_W) and bool(words_W[token // 32] >> np.uint32(token % 32) & 1)


def clear(words_W: np.ndarray, token: int) -> None:
    """Takes one token out, in place."""
    words_W[token // 32] &= ~np.uint32(1 << (token % 32))


def lowest(words_W: np.ndarray) -> int | None:
    """The smallest token of a set, None when it is empty."""
    filled = np.flatnonzero(words_W)
    if not len(filled):
        return None
    word = int(words_W[filled[0]])
    return int(filled[0]) * 32 + (word & -word).bit_length() - 1
