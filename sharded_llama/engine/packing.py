"""From the scheduler's plan to the arrays that the device takes."""

from typing import NamedTuple

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
        counts = [[self._rows_of(chunk) for chunk in chunks] for chunks in plan.chunks]
        shape = self.sizes.shape_for(
            max(len(d) + sum(s for s, _ in c) for d, c in zip(plan.decode, counts, strict=True)),
            max(sum(b for _, b in c) for c in counts),
        )
        rows = np.zeros((self.n_shards, shape.n_rows, Column.COUNT), np.int32)
        rows[:, :, Column.SLOT] = self.sizes.slots
        tokens = np.zeros((self.n_shards, shape.n_blocks * shape.block), np.int32)
        columns, plain = [], True
        for shard in range(self.n_shards):
            sampling = self._fill(shard, plan, shape, rows[shard], tokens[shard])
            columns.append(shard * shape.n_rows + sampling)
            plain = plain and bool(self._plain[shard, rows[shard, sampling, Column.SLOT]].all())
        work = Work(shape, plan.n_steps, plain, rows.reshape(-1, Column.COUNT), tokens.reshape(-1, max(1, shape.block)))
        *changes, last = self._changes(plan) or [None]
        if last is not None:  # the last changes go with the rows
            work = work._replace(tables_U3=last.tables_U3, copies_C2=last.copies_C2)
        return Packed([*changes, work], np.concatenate(columns))

    def _rows_of(self, chunk: Chunk) -> tuple[int, int]:
        """How many rows of one token and of a block of tokens a chunk takes."""
        n = len(chunk.tokens)
        return (n, 0) if n == 1 or self.sizes.block == 1 else (0, -(-n // self.sizes.block))

    def _fill(self, shard: int, plan: Plan, shape: StepShape, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Fills one shard's rows (R, X) and tokens. Returns the rows that sample: decoding ones, then chunks'."""
        decode = plan.decode[shard]
        n, first_block = len(decode), 0
        sampling = list(range(n))
        for chunk in plan.chunks[shard]:
            self._set_slot(shard, chunk.seq.slot, chunk.seq.params)
            n_single, n_blocks = self._rows_of(chunk)
            if n_single:
                at = slice(n, n + n_single)
                rows[at, Column.TOKEN] = chunk.tokens
                n, size = at.stop, 1
            else:
                at = slice(shape.n_single + first_block, shape.n_single + first_block + n_blocks)
                size = shape.block
                tokens[first_block * size :][: len(chunk.tokens)] = chunk.tokens
                first_block += n_blocks
            first = size * np.arange(at.stop - at.start)
            rows[at, Column.START] = chunk.start + first
            rows[at, Column.LENGTH] = np.minimum(len(chunk.tokens) - first, size)
            rows[at, Column.SLOT] = chunk.seq.slot
            if self.sizes.run_length > 1:
                rows[at, Column.RUN_PLACE] = first % self.sizes.run_length
            rows[at, Column.TEMPERATURE :] = self._params[shard, chunk.seq.slot]
            if chunk.last:
                rows[at.stop - 1, Column.SAMPLES] = 1
                sampling.append(at.stop - 1)
        if decode:
            at = slice(0, len(decode))
            slots = np.fromiter((s.slot for s in decode), np.int32, len(decode))
            rows[at, Column.TOKEN] = FROM_SLOT
            rows[at, Column.START] = plan.decode_starts[shard]
            rows[at, Column.LENGTH] = 1
            rows[at, Column.SLOT] = slots
            rows[at, Column.SAMPLES] = 1
            if plan.n_steps > 1:
                n_pages = np.fromiter((len(s.pages) for s in decode), np.int32, len(decode))
                rows[at, Column.LIMIT] = n_pages * PAGE_SIZE
            rows[at, Column.TEMPERATURE :] = self._params[shard, slots]
        return np.array(sampling, np.int64)

    def _set_slot(self, shard: int, slot: int, params: SamplingParams) -> None:
        self._params[shard, slot] = pack_params(pack_rows([params]))[0]
        self._plain[shard, slot] = params.temperature == 0 and not params.logprobs

    def _changes(self, plan: Plan) -> list[Work]:
        """Changes of tables and pages, as many calls as they take."""
        tables = _grouped(plan.table_updates, self.n_shards, TABLE_CHANGES, (self.sizes.slots, 0, 0))
        copies = _grouped(plan.copies, self.n_shards, PAGE_COPIES, (0, self.n_pages))
        none = np.zeros((0, 0), np.int32)
        n_calls = max(len(tables), len(copies))
        tables += [None] * (n_calls - len(tables))
        copies += [None] * (n_calls - len(copies))
        return [Work(None, 0, True, none, none, *changes) for changes in zip(tables, copies, strict=True)]


def _grouped(changes: list[tuple], n_shards: int, size: int, nothing: tuple[int, ...]) -> list[np.ndarray | None]:
    """Tuples (shard, ..) as arrays (n_shards * size, ..) of what is behind the shard, as few as hold them all."""
    by_shard: list[list[tuple]] = [[] for _ in range(n_shards)]
    for shard, *change in changes:
        by_shard[shard].append(tuple(change))
    groups: list[np.ndarray | None] = []
    for first in range(0, max(map(len, by_shard)), size):
        group = np.empty((n_shards, size, len(nothing)), np.int32)
        group[:] = nothing
        for shard, of_shard in enumerate(by_shard):
            part = of_shard[first : first + size]
            if part:
                group[shard, : len(part)] = part
        groups.append(group.reshape(n_shards * size, -1))
    return groups
