"""From the scheduler's plan to the arrays that the device takes."""

import dataclasses
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import numpy as np

from ..constraints import RowMask
from ..kv_cache import PAGE_SIZE
from ..sampling import Mode, SamplingParams, mode_of, pack_rows
from ..sampling.entropy_settings import pack_settings
from ..sampling.slots import pack_known, pack_slot
from .options import Sizes
from .prompt_lookup import PromptLookup
from .runner import PAGE_COPIES, SLOT_CHANGES, TABLE_CHANGES, Work
from .scheduler import Chunk, Plan
from .sequence import Sequence
from .steps import FROM_SLOT, Column, StepShape, pack_params


@dataclasses.dataclass(eq=False)
class SequenceSampling:
    """What the engine knows of a sequence beside the scheduler, as its `Sequence.params`."""

    params: SamplingParams
    seed: int
    mask: RowMask | None = None
    prompt_logprobs: list[Any] | None = None  # by position, as they come
    lookup: PromptLookup | None = None


class ScoredRows(NamedTuple):
    """Rows that stand for prompt tokens: what follows them is known, and its probability is wanted."""

    seq: Sequence
    start: int  # position of the first
    columns: np.ndarray


class Packed(NamedTuple):
    works: list[Work]  # to be executed in this order; the last one has the rows
    columns: np.ndarray  # for each sequence of `plan.rows`, its row among those that the last work chooses from
    scored: list[ScoredRows]
    masked: list[Sequence]  # those that sample under a mask that their last token decides: see `Packer.masks`


class Packer:
    """Keeps what does not change from step to step: the sampling parameters of the sequence in each slot."""

    def __init__(self, sizes: Sizes, n_shards: int, n_pages: int, vocab_size: int):
        self.sizes, self.n_shards, self.n_pages, self.vocab_size = sizes, n_shards, n_pages, vocab_size
        self._params = np.zeros((n_shards, sizes.slots, Column.COUNT - Column.TOP_K), np.int32)
        self._mode = np.zeros((n_shards, sizes.slots), np.int32)
        self._is_set = np.zeros((n_shards, sizes.slots), bool)  # the slot's mask, biases and so on are not neutral
        self._switching: list[Sequence] = []  # their mask changes when they have some tokens
        # Changes of a slot that there is not.
        self._no_slot = np.concatenate([[sizes.slots], pack_slot(vocab_size)]).astype(np.int32)
        (self._no_counts,) = pack_known(sizes.slots, (), ())

    def pack(self, plan: Plan) -> Packed:
        slots, known = self._place(plan)
        slots += self._switched(plan)
        counts = [[self._rows_of(chunk) for chunk in chunks] for chunks in plan.chunks]
        n_decode = [len(d) + sum(map(len, guesses)) for d, guesses in zip(plan.decode, plan.drafts, strict=True)]
        shape = self.sizes.shape_for(
            max(n + sum(s for s, _ in c) for n, c in zip(n_decode, counts, strict=True)),
            max(sum(b for _, b in c) for c in counts),
            max(map(self._n_logits, n_decode, plan.chunks, counts)),
        )
        rows = np.zeros((self.n_shards, shape.n_rows, Column.COUNT), np.int32)
        rows[:, :, Column.SLOT] = self.sizes.slots
        tokens = np.zeros((self.n_shards, shape.n_blocks * shape.block), np.int32)
        columns, scored, mode = [], [], Mode.GREEDY
        for shard in range(self.n_shards):
            sampling, of_shard = self._fill(shard, plan, shape, rows[shard], tokens[shard])
            looked_at = [sampling, *(s.columns for s in of_shard)]
            slots_of_rows = rows[shard, np.concatenate(looked_at), Column.SLOT]
            column_of = shard * shape.n_logits + _choose_from(rows[shard], sampling, shape)
            columns.append(column_of[sampling])
            scored += [s._replace(columns=column_of[s.columns]) for s in of_shard]
            mode = max(mode, Mode(self._mode[shard, slots_of_rows].max(initial=0)))
        masked = [seq for seq in plan.rows if _has_dynamic_mask(seq)]
        work = Work(
            shape,
            plan.n_steps,
            mode,
            rows.reshape(-1, Column.COUNT),
            tokens.reshape(-1, max(1, shape.block)),
            chooses=not masked,
        )
        *changes, last = self._changes(plan, slots, known) or [None]
        if last is not None:  # the last changes go with the rows
            names = ("tables_U3", "copies_C2", "slots_UX", "known_UX")
            work = work._replace(**{name: getattr(last, name) for name in names})
        return Packed([*changes, work], np.concatenate(columns), scored, masked)

    def masks(self, masks: Seq[tuple[Sequence, np.ndarray]]) -> list[Work]:
        """What ends a step with masked rows: their masks, uint32 words of the vocabulary, and the choice."""
        slots = [self._slot_change(seq, mask) for seq, mask in masks]
        *changes, last = [Work(slots_UX=group) for group in self._grouped_slots(slots)] or [Work()]
        return [*changes, last._replace(chooses=True)]

    def pack_drafting(
        self, plan: Plan, drafted: Seq[tuple[Sequence, int]], n_steps: int
    ) -> tuple[list[Work], list[int]]:
        """Has a model guess what follows sequences whose newest token stands at a position: n_steps tokens of each.

        Returns what to execute, the plan's changes first, and the row of each sequence.
        """
        by_shard = [[(seq, start) for seq, start in drafted if seq.shard == shard] for shard in range(self.n_shards)]
        shape = self.sizes.shape_for(max(map(len, by_shard)), 0)
        rows = np.zeros((self.n_shards, shape.n_rows, Column.COUNT), np.int32)
        rows[:, :, Column.SLOT] = self.sizes.slots
        mode, column_of = Mode.GREEDY, {}
        for shard, of_shard in enumerate(by_shard):
            for row, (seq, start) in enumerate(of_shard):
                rows[shard, row, : Column.LIMIT] = (seq.tokens[-1], start, 1, seq.slot, 1)
                rows[shard, row, Column.LIMIT] = len(seq.pages) * PAGE_SIZE
                rows[shard, row, Column.TOP_K :] = self._params[shard, seq.slot]
                mode = max(mode, Mode.SAMPLE if seq.params.params.temperature > 0 else Mode.GREEDY)
                column_of[id(seq)] = shard * shape.n_logits + row
        work = Work(shape, n_steps, mode, rows.reshape(-1, Column.COUNT), np.zeros((0, 1), np.int32), chooses=True)
        return [*self._changes(plan, [], []), work], [column_of[id(seq)] for seq, _ in drafted]

    def _place(self, plan: Plan) -> tuple[list[tuple], list[tuple]]:
        """Notes the parameters of sequences that got a slot. Returns changes of slots, and of counts."""
        slots, known = [], []
        for seq in plan.placed:
            if seq.slot < 0:  # it has lost it again
                continue
            sampling: SequenceSampling = seq.params
            params, at = sampling.params, (seq.shard, seq.slot)
            self._params[at] = pack_params(pack_rows([params], [sampling.seed]))[0]
            self._mode[at] = mode_of(params)
            is_set = bool(sampling.mask or params.logit_bias or params.entropy)
            if is_set or self._is_set[at]:
                mask = None
                if sampling.mask is not None and not sampling.mask.is_dynamic:
                    generated = seq.tokens[len(seq.prompt) :]
                    mask = sampling.mask.mask(generated)
                    if len(generated) < sampling.mask.switch_at and seq not in self._switching:
                        self._switching.append(seq)
                slots.append(self._slot_change(seq, mask))
            self._is_set[at] = is_set
            if params.has_penalties:
                prompt = seq.prompt if params.repetition_penalty != 1 else ()  # the others do not look at it
                known += [(seq.shard, c) for c in pack_known(seq.slot, prompt, seq.tokens[len(seq.prompt) :])]
        return slots, known

    def _switched(self, plan: Plan) -> list[tuple]:
        """Changes of slots whose sequences' masks are different from this step on."""
        if not self._switching:
            return []
        changes, rows = [], set(plan.rows)
        for seq in list(self._switching):
            if seq.finish_reason is not None:
                self._switching.remove(seq)
            elif seq in rows:
                mask: RowMask = seq.params.mask
                n_before = len(seq.tokens) + seq.n_pending - 1 - len(seq.prompt)  # generated when this step samples
                if n_before >= mask.switch_at:
                    changes.append(self._slot_change(seq, mask.mask([0] * n_before)))
                    seq.one_by_one = False
                    self._switching.remove(seq)
        return changes

    def _slot_change(self, seq: Sequence, mask_W: np.ndarray | None) -> tuple[int, np.ndarray]:
        """A slot with all that is kept of it, behind the number of its shard."""
        params: SamplingParams = seq.params.params
        entropy_E = None if params.entropy is None else pack_settings(params.entropy)
        settings = pack_slot(self.vocab_size, mask_W, params.logit_bias, entropy_E)
        return seq.shard, np.concatenate([[seq.slot], settings]).astype(np.int32)

    def _grouped_slots(self, changes: list[tuple[int, np.ndarray]]) -> list[np.ndarray]:
        """Changes of slots as arrays (data * U, X), as few as hold them all."""
        if not changes:
            return []
        most = max(sum(shard == s for s, _ in changes) for shard in range(self.n_shards))
        size = min(SLOT_CHANGES, self.sizes.slots) if most <= SLOT_CHANGES else self.sizes.slots
        return _grouped(changes, self.n_shards, size, self._no_slot)

    def _rows_of(self, chunk: Chunk) -> tuple[int, int]:
        """How many rows of one token and of a block of tokens a chunk takes."""
        n = len(chunk.tokens)
        return (n, 0) if n == 1 or chunk.scored or self.sizes.block == 1 else (0, -(-n // self.sizes.block))

    def _n_logits(self, n_decode: int, chunks: list[Chunk], counts: list[tuple[int, int]]) -> int:
        """How many rows of a shard something is chosen from: those of one token, and the ends of prompts."""
        return n_decode + sum(s + (c.last and b > 0) for c, (s, b) in zip(chunks, counts, strict=True))

    def _fill(
        self, shard: int, plan: Plan, shape: StepShape, rows: np.ndarray, tokens: np.ndarray
    ) -> tuple[np.ndarray, list[ScoredRows]]:
        """Fills one shard's rows (R, X) and tokens. Returns the rows that sample, decoding ones, then chunks', and the
        rows of prompts that are scored.
        """
        decode = plan.decode[shard]
        widths = 1 + np.fromiter(map(len, plan.drafts[shard]), np.int64, len(decode))
        n, first_block = int(widths.sum()), 0
        sampling, scored = list(np.cumsum(widths) - widths), []
        for chunk in plan.chunks[shard]:
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
            rows[at, Column.TOP_K :] = self._params[shard, chunk.seq.slot]
            if chunk.scored:
                following = chunk.seq.prompt[chunk.start + 1 : chunk.start + 1 + len(chunk.tokens)]
                rows[at.start : at.start + len(following), Column.FORCED] = np.array(following, np.int32) + 1
                scored.append(ScoredRows(chunk.seq, chunk.start, np.arange(at.start, at.start + len(following))))
            if chunk.last:
                rows[at.stop - 1, Column.SAMPLES] = 1
                sampling.append(at.stop - 1)
        if decode:
            first = sampling[: len(decode)]
            at = slice(0, int(widths.sum()))
            slots = np.repeat(np.fromiter((s.slot for s in decode), np.int32, len(decode)), widths)
            rows[at, Column.TOKEN] = FROM_SLOT
            rows[at, Column.START] = np.repeat(np.array(plan.decode_starts[shard]) - first, widths) + np.arange(at.stop)
            rows[at, Column.LENGTH] = 1
            rows[at, Column.SLOT] = slots
            rows[first, Column.SAMPLES] = 1
            if plan.n_steps > 1:
                n_pages = np.fromiter((len(s.pages) for s in decode), np.int32, len(decode))
                rows[at, Column.LIMIT] = n_pages * PAGE_SIZE
            rows[at, Column.TOP_K :] = self._params[shard, slots]
            for row, seq, guesses in zip(first, decode, plan.drafts[shard], strict=True):
                if seq.speculates:  # which of its last rows' tokens is the newest only the host knows
                    rows[row : row + 1 + len(guesses), Column.TOKEN] = [seq.tokens[-1], *guesses]
        return np.array(sampling, np.int64), scored

    def _changes(self, plan: Plan, slots: list[tuple], known: list[tuple]) -> list[Work]:
        """Changes of tables, pages, slots and counts, as many calls as they take."""
        tables = [(shard, entry) for shard, *entry in plan.table_updates]
        copies = [(shard, pages) for shard, *pages in plan.copies]
        groups: list[list[Any]] = [
            _grouped(tables, self.n_shards, TABLE_CHANGES, (self.sizes.slots, 0, 0)),
            _grouped(copies, self.n_shards, PAGE_COPIES, (0, self.n_pages)),
            self._grouped_slots(slots),
            _grouped(known, self.n_shards, 1, self._no_counts),
        ]
        n_calls = max(map(len, groups))
        groups = [g + [None] * (n_calls - len(g)) for g in groups]
        return [
            Work(tables_U3=tables, copies_C2=copies, slots_UX=of_slots, known_UX=of_counts)
            for tables, copies, of_slots, of_counts in zip(*groups, strict=True)
        ]


def _choose_from(rows_RX: np.ndarray, sampling: np.ndarray, shape: StepShape) -> np.ndarray:
    """Enters a shard's rows that are chosen from: those of one token, in their order, and others that sample.

    Returns (R,): each such row's place among them.
    """
    place_R = np.arange(shape.n_rows)
    if shape.n_chosen:
        singles = np.flatnonzero(rows_RX[: shape.n_single, Column.LENGTH])
        chosen = np.concatenate([singles, sampling[sampling >= shape.n_single]])
        rows_RX[:, Column.CHOSEN] = shape.n_rows  # none
        rows_RX[: len(chosen), Column.CHOSEN] = chosen
        place_R[chosen] = np.arange(len(chosen))
    return place_R


def _has_dynamic_mask(seq: Sequence) -> bool:
    return seq.params is not None and seq.params.mask is not None and seq.params.mask.is_dynamic


def _grouped(
    changes: list[tuple[int, Seq[int] | np.ndarray]], n_shards: int, size: int, nothing: Seq[int] | np.ndarray
) -> list[np.ndarray]:
    """Rows (X,) behind the number of their shard as arrays (n_shards * size, X), in order, as few as hold them all."""
    by_shard: list[list[Seq[int] | np.ndarray]] = [[] for _ in range(n_shards)]
    for shard, row in changes:
        by_shard[shard].append(row)
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
