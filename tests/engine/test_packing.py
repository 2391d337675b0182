"""From plans to arrays: every row says what its sequence needs, and what is not used changes nothing."""

import types

import numpy as np
import pytest

from sharded_llama.engine.options import BLOCK, EngineOptions, sizes_of
from sharded_llama.engine.packing import Packer
from sharded_llama.engine.runner import PAGE_COPIES, TABLE_CHANGES
from sharded_llama.engine.scheduler import Chunk, Plan
from sharded_llama.engine.sequence import Sequence
from sharded_llama.engine.steps import FROM_SLOT, Column
from sharded_llama.kv_cache import PAGE_SIZE
from sharded_llama.sampling import SamplingParams

SLOTS, N_PAGES, SHARDS = 8, 30, 2
GREEDY = SamplingParams(temperature=0.0, seed=0)
SAMPLED = SamplingParams(temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, seed=(3 << 32) + 4)


def mesh():
    """As much of a mesh as sizes are made from."""
    return types.SimpleNamespace(shape={"data": SHARDS}, devices=np.array([types.SimpleNamespace(platform="cpu")]))


def sizes(**options):
    given = {"max_num_seqs": SHARDS * SLOTS, "max_num_batched_tokens": SHARDS * (SLOTS + 4 * BLOCK)}
    return sizes_of(EngineOptions(**{**given, **options}), mesh())


@pytest.fixture
def packer():
    return Packer(sizes(), SHARDS, N_PAGES)


def sequence(slot, params=GREEDY, n_pages=3):
    made = Sequence(request_id=f"s{slot}", prompt=[1], max_tokens=9, params=params)
    made.slot, made.pages = slot, list(range(n_pages))
    return made


def plan_of(decode=((), ()), chunks=((), ()), starts=((), ()), n_steps=1, table_updates=(), copies=()):
    rows = []
    for decoding, of_shard in zip(decode, chunks, strict=True):
        rows += [*decoding, *(chunk.seq for chunk in of_shard if chunk.last)]
    lists = [list(map(list, of_shards)) for of_shards in (decode, starts, chunks)]
    return Plan(1, n_steps, *lists, rows, [n_steps] * len(rows), list(table_updates), list(copies))


def floats(row):
    return row[[Column.TEMPERATURE, Column.TOP_P, Column.MIN_P]].view(np.float32).tolist()


def used(work):
    """The work's rows that are used, with their indices."""
    return {i: row for i, row in enumerate(work.rows_RX) if row[Column.LENGTH]}


def admitted(packer, *sequences):
    """A packer that has seen the sequences' first chunks, on shard 0."""
    packer.pack(plan_of(chunks=([Chunk(s, 0, [5], True) for s in sequences], ())))


def test_decode_rows(packer):
    first, second, third = sequence(3), sequence(0, SAMPLED), sequence(5)
    for shard, of_shard in enumerate(([first, second], [third])):
        chunks = [(), ()]
        chunks[shard] = [Chunk(s, 0, [5], True) for s in of_shard]
        packer.pack(plan_of(chunks=chunks))
    works, columns = packer.pack(plan_of(decode=([first, second], [third]), starts=([20, 7], [33])))
    (work,) = works
    assert (work.n_steps, work.tables_U3, work.copies_C2) == (1, None, None)
    assert work.rows_RX.shape == (SHARDS * SLOTS, Column.COUNT)
    assert work.tokens_CQ.size == 0
    rows = used(work)
    assert list(rows) == columns.tolist() == [0, 1, SLOTS]
    names = [Column.TOKEN, Column.START, Column.LENGTH, Column.SLOT, Column.SAMPLES]
    assert [row[names].tolist() for row in rows.values()] == [
        [FROM_SLOT, 20, 1, 3, 1],
        [FROM_SLOT, 7, 1, 0, 1],
        [FROM_SLOT, 33, 1, 5, 1],
    ]
    assert floats(rows[0]) == [0.0, 1.0, 0.0]
    assert floats(rows[1]) == [0.5, 0.25, 0.125]
    assert rows[1][Column.TOP_K] == 7
    assert rows[1][Column.SEED :].view(np.uint32).tolist() == [3, 4]


def test_rows_that_are_not_used_touch_nothing(packer):
    only = sequence(2)
    admitted(packer, only, sequence(1))
    (work,), _ = packer.pack(
        plan_of(decode=([only], []), starts=([9], []), chunks=([Chunk(sequence(4), 0, [5] * 3, True)], []))
    )
    idle = np.array([row for row in work.rows_RX if not row[Column.LENGTH]])
    assert len(idle) == len(work.rows_RX) - 2
    assert (idle[:, Column.SLOT] == SLOTS).all()
    assert not idle[:, Column.SAMPLES].any()
    assert not work.tokens_CQ[1:].any()


@pytest.mark.parametrize(("n_tokens", "pieces"), [(2, [2]), (16, [16]), (17, [16, 1]), (40, [16, 16, 8])])
def test_a_chunk_is_split_into_rows(packer, n_tokens, pieces):
    tokens = list(range(100, 100 + n_tokens))
    chunk = Chunk(sequence(6, SAMPLED), 9, tokens, True)
    (work,), columns = packer.pack(plan_of(chunks=([], [chunk])))
    n_single, n_blocks, block = work.shape
    first = n_single + n_blocks + n_single  # of the second shard's rows of several tokens
    rows = used(work)
    assert list(rows) == list(range(first, first + len(pieces)))
    assert [row[Column.LENGTH] for row in rows.values()] == pieces
    assert [row[Column.START] for row in rows.values()] == [9 + i * BLOCK for i in range(len(pieces))]
    assert [row[Column.SAMPLES] for row in rows.values()] == [0] * (len(pieces) - 1) + [1]
    assert {row[Column.SLOT] for row in rows.values()} == {6}
    assert all(floats(row) == [0.5, 0.25, 0.125] for row in rows.values())
    assert columns.tolist() == [first + len(pieces) - 1]
    assert work.tokens_CQ.shape == (SHARDS * n_blocks, block)
    of_shard = work.tokens_CQ[n_blocks:]
    assert [token for i, n in enumerate(pieces) for token in of_shard[i, :n]] == tokens
    assert of_shard.sum() == sum(tokens)


def test_a_chunk_that_is_not_the_last_samples_nothing(packer):
    (work,), columns = packer.pack(plan_of(chunks=([Chunk(sequence(0), 0, [5] * 20, False)], [])))
    assert not work.rows_RX[:, Column.SAMPLES].any()
    assert columns.tolist() == []


def test_a_chunk_of_one_token_is_a_row_of_one(packer):
    """It stands behind the decode rows, and its token is given."""
    decoding, single, longer = sequence(0), sequence(1), sequence(2)
    admitted(packer, decoding)
    chunks = ([Chunk(longer, 0, [7] * 5, True), Chunk(single, 30, [8], True)], [])
    (work,), columns = packer.pack(plan_of(decode=([decoding], []), starts=([4], []), chunks=chunks))
    row = work.rows_RX[1]
    assert row[: Column.SAMPLES + 1].tolist() == [8, 30, 1, 1, 1]
    # In the order of plan.rows: those that decode, then the chunks as they stand in the plan.
    assert columns.tolist() == [0, work.shape.n_single, 1]


def test_columns_are_in_the_order_of_the_plans_rows(packer):
    a, b, c, d = (sequence(slot) for slot in (5, 1, 4, 0))
    admitted(packer, a)
    chunks = ([Chunk(b, 0, [7] * 20, True), Chunk(c, 0, [9] * 3, False)], [Chunk(d, 0, [6], True)])
    plan = plan_of(decode=([a], []), starts=([4], []), chunks=chunks)
    (work,), columns = packer.pack(plan)
    assert [s.slot for s in plan.rows] == work.rows_RX[columns, Column.SLOT].tolist() == [5, 1, 0]
    assert work.rows_RX[columns, Column.SAMPLES].tolist() == [1, 1, 1]


def test_several_steps_have_the_room_of_their_pages(packer):
    short, long = sequence(0, n_pages=1), sequence(1, n_pages=5)
    admitted(packer, short, long)
    (work,), _ = packer.pack(plan_of(decode=([short, long], []), starts=([3, 70], []), n_steps=4))
    assert work.n_steps == 4
    assert work.rows_RX[:2, Column.LIMIT].tolist() == [PAGE_SIZE, 5 * PAGE_SIZE]


@pytest.mark.parametrize(
    ("params", "greedy"),
    [
        (GREEDY, True),
        (SamplingParams(temperature=0.0, seed=0, logprobs=0), True),
        (SamplingParams(temperature=0.0, seed=0, logprobs=1), False),
        (SAMPLED, False),
    ],
)
def test_greedy_only_when_every_row_is(packer, params, greedy):
    """A slot's parameters are those of the sequence that has it now."""
    assert packer.pack(plan_of(chunks=([Chunk(sequence(1), 0, [5], True)], []))).works[0].greedy
    plan = plan_of(chunks=([Chunk(sequence(2), 0, [5], True)], [Chunk(sequence(1, params), 0, [5], True)]))
    assert packer.pack(plan).works[0].greedy == greedy
    decoding = plan_of(decode=([], [sequence(1, params)]), starts=([], [1]))
    assert packer.pack(decoding).works[0].greedy == greedy
    packer.pack(plan_of(chunks=([], [Chunk(sequence(1), 0, [5], True)])))
    assert packer.pack(decoding).works[0].greedy


def test_a_row_that_does_not_sample_does_not_matter(packer):
    plan = plan_of(chunks=([Chunk(sequence(2), 0, [5], True)], [Chunk(sequence(1, SAMPLED), 0, [5] * 3, False)]))
    assert packer.pack(plan).works[0].greedy


def test_tables_and_copies_that_fit_go_with_the_rows(packer):
    updates = [(1, 3, 0, 17), (0, 2, 1, 9), (1, 3, 1, N_PAGES)]
    plan = plan_of(chunks=([Chunk(sequence(2), 0, [5], True)], []), table_updates=updates, copies=[(1, 4, 8)])
    (work,), _ = packer.pack(plan)
    tables, copies = work.tables_U3.reshape(SHARDS, TABLE_CHANGES, 3), work.copies_C2.reshape(SHARDS, PAGE_COPIES, 2)
    assert tables[0, 0].tolist() == [2, 1, 9]
    assert tables[1, :2].tolist() == [[3, 0, 17], [3, 1, N_PAGES]]
    assert copies[1, 0].tolist() == [4, 8]
    # What fills the arrays up names a slot or a page that is not there.
    assert (tables[0, 1:, 0] == SLOTS).all()
    assert (tables[1, 2:, 0] == SLOTS).all()
    assert (copies[0, :, 1] == N_PAGES).all()
    assert (copies[1, 1:, 1] == N_PAGES).all()


@pytest.mark.parametrize("n_tables", [0, 1, TABLE_CHANGES, TABLE_CHANGES + 1, 3 * TABLE_CHANGES])
@pytest.mark.parametrize("n_copies", [0, PAGE_COPIES, 2 * PAGE_COPIES + 1])
def test_more_changes_than_fit_one_call(packer, n_tables, n_copies):
    """All of them, each once and in order, the last ones with the rows."""
    updates = [(i % 2, i % SLOTS, i // SLOTS, i % N_PAGES) for i in range(2 * n_tables)]
    copies = [(1, i % N_PAGES, (i + 1) % N_PAGES) for i in range(n_copies)]
    plan = plan_of(chunks=([Chunk(sequence(2), 0, [5], True)], []), table_updates=updates, copies=copies)
    works, _ = packer.pack(plan)
    assert len(works) == max(1, -(-n_tables // TABLE_CHANGES), -(-n_copies // PAGE_COPIES))
    assert all(work.shape is None and not work.rows_RX.size for work in works[:-1])
    assert works[-1].shape is not None
    found_updates, found_copies = [[], []], [[], []]
    for work in works:
        for shard in range(SHARDS):
            if work.tables_U3 is not None:
                of_shard = work.tables_U3.reshape(SHARDS, TABLE_CHANGES, 3)[shard].tolist()
                found_updates[shard] += [(shard, *change) for change in of_shard if change[0] < SLOTS]
            if work.copies_C2 is not None:
                of_shard = work.copies_C2.reshape(SHARDS, PAGE_COPIES, 2)[shard].tolist()
                found_copies[shard] += [(shard, *copy) for copy in of_shard if copy[1] < N_PAGES]
    assert found_updates == [updates[0::2], updates[1::2]]
    assert found_copies == [[], copies]


def test_deterministic_rows_have_one_token_each():
    packer = Packer(sizes(deterministic=True), SHARDS, N_PAGES)
    decoding, long = sequence(1), sequence(2)
    admitted(packer, decoding)
    chunks = ([Chunk(long, 3, [50, 51, 52], True)], [])
    (work,), columns = packer.pack(plan_of(decode=([decoding], []), starts=([8], []), chunks=chunks))
    assert work.shape == packer.sizes.shapes[0]
    names = [Column.TOKEN, Column.START, Column.LENGTH, Column.SLOT, Column.SAMPLES]
    assert [row[names].tolist() for row in used(work).values()] == [
        [FROM_SLOT, 8, 1, 1, 1],
        [50, 3, 1, 2, 0],
        [51, 4, 1, 2, 0],
        [52, 5, 1, 2, 1],
    ]
    assert columns.tolist() == [0, 3]


def test_consecutive_rows_of_a_chunk_are_numbered_in_runs():
    """Each run begins with a 0; a decode row is a run of its own."""
    packer = Packer(sizes_of(EngineOptions(deterministic=True), mesh(), run_length=4), SHARDS, N_PAGES)
    decoding = sequence(1)
    admitted(packer, decoding)
    chunks = ([Chunk(sequence(2), 7, [5] * 6, True), Chunk(sequence(3), 0, [5] * 2, True)], [])
    (work,), _ = packer.pack(plan_of(decode=([decoding], []), starts=([8], []), chunks=chunks))
    assert work.rows_RX[:9, Column.RUN_PLACE].tolist() == [0, 0, 1, 2, 3, 0, 1, 0, 1]
