"""Guesses at what comes next: what came after the last tokens where they stood before in the sequence."""

from collections.abc import Sequence

import numpy as np


class PromptLookup:
    """The tokens of one sequence, to be searched.

    Args:
      least, most: how many of the last tokens must stand before; more are tried first.

    The method is prompt lookup decoding (https://github.com/apoorvumang/prompt-lookup-decoding).
    """

    def __init__(self, tokens: Sequence[int], least: int, most: int):
        self._least, self._most = least, most
        self._size = 0
        self._buffer = np.empty(max(64, 2 * len(tokens)), np.int32)
        self.extend(tokens)

    def __len__(self) -> int:
        return self._size

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens to the end."""
        size = self._size + len(tokens)
        if size > len(self._buffer):
            self._buffer = np.concatenate([self._buffer[: self._size], np.empty(size, np.int32)])
        self._buffer[self._size : size] = tokens
        self._size = size

    def propose(self, n: int) -> list[int]:
        """At most `n` tokens: those after the latest place that has so many after it, else after the earliest place."""
        known = self._buffer[: self._size]
        for length in range(min(self._most, self._size - 1), self._least - 1, -1):
            starts = np.flatnonzero(known[: self._size - length] == known[self._size - length])
            for offset in range(1, length):
                starts = starts[known[starts + offset] == known[self._size - length + offset]]
            if len(starts):
                whole = starts[starts + length + n <= self._size]
                first = (whole[-1] if len(whole) else starts[0]) + length
                return known[first : first + n].tolist()
        return []
