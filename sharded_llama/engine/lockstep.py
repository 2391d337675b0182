"""Several processes, one plan: process 0 sends what it is about to execute, the others execute the same."""

import numpy as np
from jax.experimental import multihost_utils

from .options import Sizes
from .runner import PAGE_COPIES, TABLE_CHANGES, Work
from .steps import Column, StepShape

HEADER = 8
STOP, WORK = 0, 1


class Lockstep:
    """Messages of one fixed size, so that sending them compiles once. A `Work` is sent as it is, None as the end."""

    def __init__(self, sizes: Sizes, n_shards: int):
        self._n_shards = n_shards
        rows = max(s.n_rows for s in sizes.shapes) * Column.COUNT
        tokens = max(s.n_blocks * s.block for s in sizes.shapes)
        self._size = HEADER + n_shards * (rows + tokens + 3 * TABLE_CHANGES + 2 * PAGE_COPIES)

    def send(self, work: Work | None) -> None:
        """In process 0."""
        message = np.zeros(self._size, np.int32)
        if work is not None:
            shape = work.shape or StepShape(0, 0, 0)
            tables, copies = work.tables_U3 is not None, work.copies_C2 is not None
            message[:HEADER] = (WORK, *shape, work.n_steps, work.greedy, tables, copies)
            arrays = (work.rows_RX, work.tokens_CQ, work.tables_U3, work.copies_C2)
            flat = np.concatenate([x.reshape(-1) for x in arrays if x is not None])
            message[HEADER : HEADER + flat.size] = flat
        multihost_utils.broadcast_one_to_all(message)

    def receive(self) -> Work | None:
        """In the other processes."""
        message = np.asarray(multihost_utils.broadcast_one_to_all(np.zeros(self._size, np.int32)))
        kind, n_single, n_blocks, block, n_steps, greedy, tables, copies = message[:HEADER].tolist()
        if kind == STOP:
            return None
        shape = StepShape(n_single, n_blocks, block)
        rest = message[HEADER:]

        def take(rows: int, width: int) -> np.ndarray:
            nonlocal rest
            taken, rest = rest[: rows * width].reshape(rows, width), rest[rows * width :]
            return taken

        n = self._n_shards
        return Work(
            shape if shape.n_rows else None,
            n_steps,
            bool(greedy),
            take(n * shape.n_rows, Column.COUNT),
            take(n * n_blocks, block),
            take(n * TABLE_CHANGES, 3) if tables else None,
            take(n * PAGE_COPIES, 2) if copies else None,
        )
