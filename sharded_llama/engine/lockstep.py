"""Several processes, one plan: process 0 sends what it is about to execute, the others execute the same."""

import numpy as np
from jax.experimental import multihost_utils

from ..sampling import Mode
from .options import Sizes
from .runner import PAGE_COPIES, TABLE_CHANGES, Work
from .steps import Column, StepShape

HEADER = 15
STOP, WORK = 0, 1


class Lockstep:
    """Messages of one size, so that sending them compiles once. A `Work` is sent as it is, None as the end.

    Changes of slots and counts are rare and large: they follow in messages of their own, whose shapes the first tells.
    """

    def __init__(self, sizes: Sizes, n_shards: int):
        self._n_shards = n_shards
        rows = max(s.n_rows for s in sizes.shapes) * Column.COUNT
        tokens = max(s.n_blocks * s.block for s in sizes.shapes)
        self._size = HEADER + n_shards * (rows + tokens + 3 * TABLE_CHANGES + 2 * PAGE_COPIES)

    def send(self, work: Work | None) -> None:
        """In process 0."""
        message = np.zeros(self._size, np.int32)
        if work is None:
            multihost_utils.broadcast_one_to_all(message)
            return
        shape = work.shape or StepShape(0, 0, 0)
        tables, copies = work.tables_U3 is not None, work.copies_C2 is not None
        large = [np.zeros((0, 0), np.int32) if x is None else x for x in (work.slots_UX, work.known_UX)]
        message[:HEADER] = (
            *(WORK, *shape, work.n_steps, work.mode, tables, copies, work.chooses),
            *(size for x in large for size in x.shape),
            work.for_draft,
        )
        arrays = (work.rows_RX, work.tokens_CQ, work.tables_U3, work.copies_C2)
        flat = np.concatenate([np.zeros(0, np.int32), *(x.reshape(-1) for x in arrays if x is not None)])
        message[HEADER : HEADER + flat.size] = flat
        multihost_utils.broadcast_one_to_all(message)
        for array in large:
            if array.size:
                multihost_utils.broadcast_one_to_all(array)

    def receive(self) -> Work | None:
        """In the other processes."""
        message = np.asarray(multihost_utils.broadcast_one_to_all(np.zeros(self._size, np.int32)))
        kind, *rest = message[:HEADER].tolist()
        if kind == STOP:
            return None
        n_of_shape = len(StepShape._fields)
        shape = StepShape(*rest[:n_of_shape])
        n_steps, mode, tables, copies, chooses, *sizes, for_draft = rest[n_of_shape:]
        rest = message[HEADER:]

        def take(rows: int, width: int) -> np.ndarray:
            nonlocal rest
            taken, rest = rest[: rows * width].reshape(rows, width), rest[rows * width :]
            return taken

        def receive_large(rows: int, width: int) -> np.ndarray | None:
            if not rows * width:
                return None
            return np.asarray(multihost_utils.broadcast_one_to_all(np.zeros((rows, width), np.int32)))

        n = self._n_shards
        has_rows = bool(shape.n_rows)
        return Work(
            shape=shape if has_rows else None,
            n_steps=n_steps,
            mode=Mode(mode),
            rows_RX=take(n * shape.n_rows, Column.COUNT) if has_rows else None,
            tokens_CQ=take(n * shape.n_blocks, shape.block) if has_rows else None,
            tables_U3=take(n * TABLE_CHANGES, 3) if tables else None,
            copies_C2=take(n * PAGE_COPIES, 2) if copies else None,
            slots_UX=receive_large(*sizes[:2]),
            known_UX=receive_large(*sizes[2:]),
            chooses=bool(chooses),
            for_draft=bool(for_draft),
        )
