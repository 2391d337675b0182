"""From the scheduler's plan to the arrays that the device takes."""

from typing import Any, NamedTuple

import numpy as np

from ..kv_cache import PAGE_SIZE
from ..sampling import SamplingParams, pack_rows
from .options import Sizes
from .runner import PAGE_COPIES, TABLE_CHANGES, Work
from .scheduler import Chunk, Plan
from .steps import FROM_SLOT, Column, StepShape, pack_params


class Packed(NamedTuple):
    works: list[Work]  # to be executed in this order; the last one has the rows
    columns: np.ndarray  # for each sequence of `plan.rows`, its row among those of the last work


class Packer:
    """Keeps what does not change from step to step: the sampling parameters of the sequence in each slot."""

    def __init__(self, sizes: Sizes, n_shards: int, n_pages: int):
        self.sizes, self.n_shards, self.n_pages = sizes, n_shards, n_pages
        self._params = np.zeros((n_shards, sizes.slots, Column.COUNT - Column.TEMPERATURE), np.int32)
        self._plain = np.ones((n_shards, sizes.slots), bool)  # greedy, and asks for no other tokens' probabilities

    def pack(self, plan: Plan) -> Packed:
        singles, blocks = zip(*(_pieces(chunks, self.sizes.block) for chunks in plan.chunks), strict=True)
        n_single = max(len(d) + len(s) for d, s in zip(plan.decode, singles, strict=True))
        shape = self.sizes.shape_for(n_single, max(map(len, blocks)))
        rows = np.zeros((self.n_shards, shape.n_rows, Column.COUNT), np.int32)
        rows[:, :, Column.SLOT] = self.sizes.slots
        tokens = np.zeros((self.n_shards, shape.n_blocks, shape.block), np.int32)
        columns: list[Any] = []
        plain = True
        for shard in range(self.n_shards):
            sampling = self._fill(shard, plan, singles[shard], blocks[shard], shape, rows[shard], tokens[shard])
            columns.append(shard * shape.n_rows + sampling)
            plain = plain and bool(self._plain[shard, rows[shard, sampling, Column.SLOT]].all())
        work = Work(
            shape,
            plan.n_steps,
            plain,
            rows.reshape(-1, Column.COUNT),
            tokens.reshape(-1, shape.block),
        )
        works = self._changes(plan)
        # Changes that fit one call each go with the rows.
        if works:
            work = work._replace(tables_U3=works[-1].tables_U3, copies_C2=works[-1].copies_C2)
        return Packed([*works[:-1], work], np.concatenate(columns))

    def _fill(
        self,
        shard: int,
        plan: Plan,
        singles: list["Piece"],
        blocks: list["Piece"],
        shape: StepShape,
        rows: np.ndarray,
        tokens: np.ndarray,
    ) -> np.ndarray:
        """Fills one shard's rows and tokens. Returns the rows that sample: decoding ones, then chunks in order."""
        decode = plan.decode[shard]
        n = len(decode)
        for piece in (*singles, *blocks):
            self._set_slot(shard, piece.slot, piece.params)
        if n:
            slots = np.fromiter((s.slot for s in decode), np.int32, n)
            rows[:n, Column.TOKEN] = FROM_SLOT
            rows[:n, Column.START] = plan.decode_starts[shard]
            rows[:n, Column.LENGTH] = 1
            rows[:n, Column.SLOT] = slots
            rows[:n, Column.SAMPLES] = 1
            if plan.n_steps > 1:
                rows[:n, Column.LIMIT] = np.fromiter((len(s.pages) for s in decode), np.int32, n) * PAGE_SIZE
            rows[:n, Column.TEMPERATURE :] = self._params[shard, slots]
        last: dict[int, int] = {}  # row of the last piece of every chunk that samples, by the chunk's number
        for row, piece in enumerate(singles, n):
            rows[row, : Column.LIMIT] = (piece.tokens[0], piece.start, 1, piece.slot, piece.samples)
            rows[row, Column.TEMPERATURE :] = self._params[shard, piece.slot]
            if piece.samples:
                last[piece.chunk] = row
        for i, piece in enumerate(blocks):
            row = shape.n_single + i
            rows[row, : Column.LIMIT] = (0, piece.start, len(piece.tokens), piece.slot, piece.samples)
            rows[row, Column.TEMPERATURE :] = self._params[shard, piece.slot]
            tokens[i, : len(piece.tokens)] = piece.tokens
            if piece.samples:
                last[piece.chunk] = row
        return np.array([*range(n), *(last[chunk] for chunk in sorted(last))], np.int64)

    def _set_slot(self, shard: int, slot: int, params: SamplingParams) -> None:
        self._params[shard, slot] = pack_params(pack_rows([params]))[0]
        self._plain[shard, slot] = params.temperature == 0 and not params.logprobs

    def _changes(self, plan: Plan) -> list[Work]:
        """Changes of tables and pages, as many calls as they take."""
        tables = _grouped(plan.table_updates, self.n_shards, TABLE_CHANGES, (self.sizes.slots, 0, 0))
        copies = _grouped(plan.copies, self.n_shards, PAGE_COPIES, (0, self.n_pages))
        none = np.zeros((0, 0), np.int32)
        return [
            Work(
                None,
                0,
                True,
                none,
                none,
                tables[i] if i < len(tables) else None,
                copies[i] if i < len(copies) else None,
            )
            for i in range(max(len(tables), len(copies)))
        ]


class Piece(NamedTuple):
    """One row's part of a chunk."""

    chunk: int  # number of the chunk within its shard's
    slot: int
    start: int
    tokens: list[int]
    samples: bool
    params: SamplingParams


def _pieces(chunks: list[Chunk], block: int) -> tuple[list[Piece], list[Piece]]:
    """The rows of one shard's chunks: those of one token, and those of up to `block`."""
    singles, blocks = [], []
    for number, (seq, start, tokens, last) in enumerate(chunks):
        for first in range(0, len(tokens), block):
            part = tokens[first : first + block]
            samples = last and first + block >= len(tokens)
            piece = Piece(number, seq.slot, start + first, part, samples, seq.params)
            (singles if len(tokens) == 1 or block == 1 else blocks).append(piece)
    return singles, blocks


def _grouped(changes: list[tuple], n_shards: int, size: int, nothing: tuple[int, ...]) -> list[np.ndarray]:
    """Tuples (shard, ..) as arrays (n_shards * size, ..) of what is behind the shard, as few as hold them all."""
    by_shard: list[list[tuple]] = [[] for _ in range(n_shards)]
    for shard, *change in changes:
        by_shard[shard].append(tuple(change))
    groups = []
    for first in range(0, max(map(len, by_shard)), size):
        group = np.empty((n_shards, size, len(nothing)), np.int32)
        group[:] = nothing
        for shard, of_shard in enumerate(by_shard):
            part = of_shard[first : first + size]
            if part:
                group[shard, : len(part)] = part
        groups.append(group.reshape(n_shards * size, -1))
    return groups
