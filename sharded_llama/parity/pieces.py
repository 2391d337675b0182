"""How a prompt goes through the cache: in pieces, at different positions in neighbouring rows."""

from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """The positions (B, size) of the tokens that run together; those at the prompt's end and beyond are padding."""

    positions_BL: np.ndarray

    @property
    def starts_B(self) -> np.ndarray:
        return self.positions_BL[:, 0].astype(np.int32)

    def take(self, x_BL: np.ndarray) -> np.ndarray:
        """The piece of an array whose first axes are rows and positions; padding repeats the last position."""
        return x_BL[self._rows(), np.minimum(self.positions_BL, x_BL.shape[1] - 1)]

    def put(self, piece: np.ndarray, x_BL: np.ndarray) -> None:
        """Writes what was computed for the piece to its places, without the padding."""
        real = self.positions_BL < x_BL.shape[1]
        rows = np.broadcast_to(self._rows(), real.shape)
        x_BL[rows[real], self.positions_BL[real]] = piece[real]

    def _rows(self) -> np.ndarray:
        return np.arange(len(self.positions_BL))[:, None]


def pieces_of(batch: int, length: int, chunk: int, n_single: int, start: int = 0) -> list[Piece]:
    """Pieces that cover positions start..length of every row: chunks of one size, then `n_single` tokens one by one.

    Odd rows are one position behind, so that a step never has all of its rows at the same one; what they repeat is
    computed and written again.
    """
    lag_B = np.arange(batch)[:, None] % 2
    end = max(start, length - n_single)
    begins = [(i, chunk) for i in range(start, end, chunk)] + [(i, 1) for i in range(end, length + 1)]
    return [Piece(np.clip(begin - lag_B, 0, length - 1) + np.arange(size)) for begin, size in begins]


def whole_prompts(batch: int, length: int) -> list[Piece]:
    """One piece: the first `length` positions of every row; none if there are no positions."""
    return [Piece(np.tile(np.arange(length), (batch, 1)))] if length else []
