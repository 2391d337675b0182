"""What the device runs, as pure functions: the forward pass of a step's rows, the sampler, and their bookkeeping.

A step's rows come as one small array, so that the host uploads little and every process can be sent the same. What must
survive from step to step without the host seeing it stays on the device: the pages, the block tables of all slots,
and the newest token of every slot. A row names its slot; its token is either given or the slot's newest one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..config import LlamaConfig
from ..kv_cache import KVPages
from ..model import StepRows, last_tokens, xfmr_step
from ..sampling import Mode, RowParams, Sampled, log_normalizer, sample
from ..sampling.slots import SLOT_SPECS, SlotSampling, count_tokens, set_counts, set_slots
from ..sharding import DATA, SPECS
from ..weights import XfmrWeights


class Column:
    """Columns of a step's rows (R, X), int32; the sampling parameters stand there bit for bit."""

    TOKEN = 0  # of a row of one token; FROM_SLOT: the newest token of its slot
    START = 1  # position of its first token
    LENGTH = 2  # real tokens; 0: the row is not used
    SLOT = 3  # whose block table it has; unused rows: beyond the slots
    SAMPLES = 4  # 1: the token that follows is sampled and becomes the slot's newest
    LIMIT = 5  # positions that the sequence's pages have room for
    FORCED = 6  # one more than a token that is taken in place of a choice; 0: none
    TOP_K = 7
    TEMPERATURE = 8  # float32, as are the next five
    TOP_P = 9
    MIN_P = 10
    PRESENCE = 11
    FREQUENCY = 12
    REPETITION = 13
    SEED = 14  # two columns, uint32: high and low word
    COUNT = 16
    # LIMIT matters where several steps are run, RUN_PLACE in runs of rows, CHOSEN beside chunks: never two of them.
    RUN_PLACE = LIMIT  # the row's number within its run (see `model.StepRows`)
    CHOSEN = LIMIT  # of the first `StepShape.n_chosen` rows: a row that is chosen from; beyond the rows: none


FROM_SLOT = -1
NO_SLOT = 2**31 - 1  # beyond all slots: what is written there is dropped


class StepShape(NamedTuple):
    """The static shape of a step, per data shard: rows of one token, then rows of `block` tokens.

    No more rows than sequences can run are followed by a token. With chunks a step has more, and names those.
    """

    n_single: int
    n_blocks: int
    block: int
    n_chosen: int = 0  # rows of which Column.CHOSEN says which they are; 0: all of them

    @property
    def n_rows(self) -> int:
        return self.n_single + self.n_blocks

    @property
    def n_tokens(self) -> int:
        return self.n_single + self.n_blocks * self.block

    @property
    def n_logits(self) -> int:
        """Rows that have logits."""
        return self.n_chosen or self.n_rows


class DeviceState(NamedTuple):
    """What stays on the device between steps."""

    pages: tuple[KVPages, ...]
    tables_SW: jax.Array  # int32, pages of every slot, P('data'): (data * slots, W)
    tokens_S: jax.Array  # int32, newest token of every slot, P('data')
    slots: SlotSampling | None = None  # what sampling keeps of every slot; greedy steps do without


class Forwarded(NamedTuple):
    """What the sampler needs of the rows that are chosen from."""

    logits_RV: jax.Array
    normalizer_R: jax.Array  # logarithm of what normalises them
    # For the entropy sampler alone: of the last layer's attention, and the token that each row ends with.
    attention_R4: jax.Array | None = None
    last_R: jax.Array | None = None


def forward(
    weights: XfmrWeights,
    state: DeviceState,
    rows_RX: jax.Array,
    tokens_CQ: jax.Array | None,
    *,
    config: LlamaConfig,
    mesh: Mesh,
    backend: str,
    run_length: int = 1,
    n_chosen: int = 0,
    with_metrics: bool = False,
) -> tuple[Forwarded, tuple[KVPages, ...], jax.Array]:
    """What follows the rows that are chosen from, the pages with the tokens of all rows, and the former rows (E, X).

    Rows and tokens are global, split over `data`. tokens_CQ: of the rows of several tokens; None if there are no such
    rows, because XLA's compiler for several GPUs crashes on empty arrays. n_chosen: see `StepShape`.
    """
    data = mesh.shape[DATA]
    n_single = (rows_RX.shape[0] - (0 if tokens_CQ is None else tokens_CQ.shape[0])) // data
    specs = SPECS["tokens"]
    given = (True, True, True, True, run_length > 1, n_chosen > 0)
    row_specs = StepRows(*(specs if is_given else None for is_given in given))
    expand = jax.shard_map(
        functools.partial(_step_rows, n_single=n_single, in_runs=run_length > 1, n_chosen=n_chosen),
        mesh=mesh,
        in_specs=(specs, specs, specs, None if tokens_CQ is None else specs),
        out_specs=row_specs,
    )
    rows = expand(state.tables_SW, state.tokens_S, rows_RX, tokens_CQ)
    logits_RV, pages, *metrics = xfmr_step(
        weights,
        config,
        rows,
        state.pages,
        mesh=mesh,
        n_single=n_single,
        run_length=run_length,
        backend=backend,
        with_metrics=with_metrics,
    )
    if with_metrics:
        pick = jax.shard_map(
            lambda rows: rows.tokens_T[last_tokens(rows, n_single)], mesh=mesh, in_specs=(row_specs,), out_specs=specs
        )
        metrics.append(pick(rows))
    if n_chosen:
        # What is beyond the rows is a row that is not used: zeros.
        choose_from = jax.shard_map(
            lambda rows_RX, chosen_E: rows_RX.at[chosen_E].get(mode="fill", fill_value=0),
            mesh=mesh,
            in_specs=(specs, specs),
            out_specs=specs,
        )
        rows_RX = choose_from(rows_RX, rows.chosen_E)
    return Forwarded(logits_RV, log_normalizer(logits_RV, mesh=mesh), *metrics), pages, rows_RX


def _step_rows(
    tables_SW: jax.Array,
    tokens_S: jax.Array,
    rows_RX: jax.Array,
    tokens_CQ: jax.Array | None,
    *,
    n_single: int,
    in_runs: bool,
    n_chosen: int,
) -> StepRows:
    """One device's rows, with the tables and tokens of their slots."""
    slot_R = rows_RX[:, Column.SLOT]
    tokens = [] if tokens_CQ is None else [tokens_CQ.reshape(-1)]
    if n_single:
        given_B = rows_RX[:n_single, Column.TOKEN]
        newest_B = tokens_S.at[slot_R[:n_single]].get(mode="fill", fill_value=0)
        tokens = [jnp.where(given_B == FROM_SLOT, newest_B, given_B), *tokens]
    return StepRows(
        tokens_T=jnp.concatenate(tokens) if len(tokens) > 1 else tokens[0],
        start_R=rows_RX[:, Column.START],
        length_R=rows_RX[:, Column.LENGTH],
        tables_RW=tables_SW.at[slot_R].get(mode="clip"),
        run_place_R=rows_RX[:, Column.RUN_PLACE] if in_runs else None,
        chosen_E=_chosen(rows_RX, n_chosen) if n_chosen else None,
    )


def _chosen(rows_RX: jax.Array, n_chosen: int) -> jax.Array:
    """The rows that are chosen from; where there are more of these than rows at all, the others are none."""
    chosen_E = rows_RX[:n_chosen, Column.CHOSEN]
    return jnp.pad(chosen_E, (0, n_chosen - len(chosen_E)), constant_values=len(rows_RX))


def choose(
    forwarded: Forwarded,
    tokens_S: jax.Array,
    slots: SlotSampling | None,
    rows_RX: jax.Array,
    *,
    config: LlamaConfig,
    mesh: Mesh,
    mode: Mode,
) -> tuple[Sampled, jax.Array, SlotSampling | None]:
    """The next token of every row with its logarithmic probability, and the slots' tokens and counts with them."""
    length_R = rows_RX[:, Column.LENGTH]
    positions_R = rows_RX[:, Column.START] + length_R
    sampled = sample(
        *forwarded,
        row_params(rows_RX),
        slots,
        rows_RX[:, Column.SLOT],
        positions_R,
        rows_RX[:, Column.FORCED] - 1,
        mode=mode,
        vocab_size=config.vocab_size,
        mesh=mesh,
    )

    specs = SPECS["tokens"]
    slot_R = jnp.where(rows_RX[:, Column.SAMPLES] > 0, rows_RX[:, Column.SLOT], NO_SLOT)

    def store(tokens_S: jax.Array, slot_R: jax.Array, new_R: jax.Array) -> jax.Array:
        return tokens_S.at[slot_R].set(new_R, mode="drop")

    stored = jax.shard_map(store, mesh=mesh, in_specs=(specs,) * 3, out_specs=specs)
    tokens_S = stored(tokens_S, slot_R, sampled.tokens_R)
    if mode != Mode.GREEDY:
        by_vocab = SPECS["last_logits"]
        count = jax.shard_map(count_tokens, mesh=mesh, in_specs=(by_vocab, specs, specs), out_specs=by_vocab)
        slots = slots._replace(counts_SV=count(slots.counts_SV, slot_R, sampled.tokens_R))
    return sampled, tokens_S, slots


def decode_several(
    weights: XfmrWeights,
    state: DeviceState,
    rows_RX: jax.Array,
    *,
    n_steps: int,
    config: LlamaConfig,
    mesh: Mesh,
    backend: str,
    mode: Mode,
) -> tuple[Sampled, DeviceState]:
    """`n_steps` steps of rows of one token each, one after the other. Returns what was sampled, (n_steps, R) each.

    Where a sequence has no more room in its pages its rows run on without being written.
    """

    def step(carry: tuple[DeviceState, jax.Array], _: None) -> tuple[tuple[DeviceState, jax.Array], Sampled]:
        state, rows_RX = carry
        forwarded, pages, _ = forward(
            weights, state, rows_RX, None, config=config, mesh=mesh, backend=backend, with_metrics=mode == Mode.ENTROPY
        )
        sampled, tokens, slots = choose(
            forwarded, state.tokens_S, state.slots, rows_RX, config=config, mesh=mesh, mode=mode
        )
        start_R = rows_RX[:, Column.START] + (rows_RX[:, Column.LENGTH] > 0)
        has_room_R = (rows_RX[:, Column.LENGTH] > 0) & (start_R < rows_RX[:, Column.LIMIT])
        rows_RX = rows_RX.at[:, Column.TOKEN].set(FROM_SLOT).at[:, Column.START].set(start_R)
        rows_RX = rows_RX.at[:, Column.LENGTH].set(has_room_R.astype(jnp.int32))
        return (DeviceState(pages, state.tables_SW, tokens, slots), rows_RX), sampled

    (state, _), sampled = jax.lax.scan(step, (state, rows_RX), length=n_steps)
    return sampled, state


def set_tables(tables_SW: jax.Array, changes_U3: jax.Array, *, mesh: Mesh) -> jax.Array:
    """Writes page numbers into block tables. Changes, split over `data`: slot, index, page; slots beyond: nothing."""

    def local(tables_SW: jax.Array, changes_U3: jax.Array) -> jax.Array:
        slot_U, index_U, page_U = changes_U3.T
        return tables_SW.at[slot_U, index_U].set(page_U, mode="drop")

    specs = SPECS["tokens"]
    return jax.shard_map(local, mesh=mesh, in_specs=(specs, specs), out_specs=specs)(tables_SW, changes_U3)


def change_slots(slots: SlotSampling, changes_UX: jax.Array, *, mesh: Mesh) -> SlotSampling:
    """Sets what slots allow and favour. Changes, split over `data`, are of `pack_slot`; slots beyond: nothing."""
    return jax.shard_map(
        set_slots, mesh=mesh, in_specs=(SLOT_SPECS, SPECS["tokens"]), out_specs=SLOT_SPECS, check_vma=False
    )(slots, changes_UX)


def count_known(counts_SV: jax.Array, changes_UX: jax.Array, *, mesh: Mesh) -> jax.Array:
    """Counts tokens that slots begin with. Changes, split over `data`, are of `pack_known`."""
    return jax.shard_map(
        set_counts,
        mesh=mesh,
        in_specs=(SPECS["last_logits"], SPECS["tokens"]),
        out_specs=SPECS["last_logits"],
        check_vma=False,
    )(counts_SV, changes_UX)


def copy_pages(pages: tuple[KVPages, ...], copies_C2: jax.Array, *, mesh: Mesh) -> tuple[KVPages, ...]:
    """Copies pages within each data shard's pool: from, to; a target beyond the pool: nothing."""

    def local(pages: tuple[KVPages, ...], copies_C2: jax.Array) -> tuple[KVPages, ...]:
        return tuple(layer.copy(copies_C2[:, 0], copies_C2[:, 1]) for layer in pages)

    specs = SPECS["kv_pages"]
    return jax.shard_map(local, mesh=mesh, in_specs=(specs, SPECS["tokens"]), out_specs=specs)(pages, copies_C2)


def row_params(rows_RX: jax.Array) -> RowParams:
    def floats(column: int) -> jax.Array:
        return jax.lax.bitcast_convert_type(rows_RX[:, column], jnp.float32)

    seeds = rows_RX[:, Column.SEED : Column.SEED + 2]
    return RowParams(
        temperature_R=floats(Column.TEMPERATURE),
        top_k_R=rows_RX[:, Column.TOP_K],
        top_p_R=floats(Column.TOP_P),
        min_p_R=floats(Column.MIN_P),
        presence_R=floats(Column.PRESENCE),
        frequency_R=floats(Column.FREQUENCY),
        repetition_R=floats(Column.REPETITION),
        seed_R2=jax.lax.bitcast_convert_type(seeds, jnp.uint32),
    )


def pack_params(params: RowParams) -> np.ndarray:
    """Host arrays of rows' parameters as the columns (R, X) from TOP_K on."""
    floats = [params.temperature_R, params.top_p_R, params.min_p_R]
    floats += [params.presence_R, params.frequency_R, params.repetition_R]
    columns = [params.top_k_R, *(c.view(np.int32) for c in floats)]
    return np.concatenate([np.stack(columns, 1), params.seed_R2.view(np.int32)], axis=1)
