"""From plans to arrays: every row says what its sequence needs, and what is not used changes nothing."""

import types

import numpy as np
import pytest

from sharded_llama.constraints import bits, row_mask
from sharded_llama.engine.options import BLOCK, FEW_ENDS, EngineOptions, sizes_of
from sharded_llama.engine.packing import Packer, SequenceSampling
from sharded_llama.engine.runner import PAGE_COPIES, SLOT_CHANGES, TABLE_CHANGES
from sharded_llama.engine.scheduler import Chunk, Plan
from sharded_llama.engine.sequence import Sequence
from sharded_llama.engine.steps import FROM_SLOT, Column
from sharded_llama.kv_cache import PAGE_SIZE
from sharded_llama.sampling import Mode, SamplingParams
from sharded_llama.sampling.entropy_settings import EntropySettings, pack_settings
from sharded_llama.sampling.slots import KNOWN_TOKENS, pack_known, pack_slot

SLOTS, N_PAGES, SHARDS, VOCAB = 8, 30, 2, 131
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
    return Packer(sizes(), SHARDS, N_PAGES, VOCAB)


def sequence(slot, params=GREEDY, n_pages=3, prompt=(1,), generated=(), shard=0):
    """A running sequence, which the scheduler has just placed."""
    mask = row_mask(params, vocab_size=VOCAB, stop_ids=frozenset([2, 3]), tokenizer=None, grammar=None)
    sampling = SequenceSampling(params, params.seed or 0, mask)
    made = Sequence(request_id=f"s{slot}", prompt=list(prompt), max_tokens=9, params=sampling)
    made.slot, made.shard, made.pages = slot, shard, list(range(n_pages))
    made.tokens += generated
    return made


def plan_of(
    decode=((), ()), chunks=((), ()), starts=((), ()), n_steps=1, table_updates=(), copies=(), placed=None, drafts=None
):
    """Sequences with a chunk have just been placed, unless others are said to be."""
    rows, with_chunk = [], []
    for shard, of_shard in enumerate(chunks):
        for chunk in of_shard:
            chunk.seq.shard = shard
            with_chunk.append(chunk.seq)
    for decoding, of_shard in zip(decode, chunks, strict=True):
        rows += [*decoding, *(chunk.seq for chunk in of_shard if chunk.last)]
    return Plan(
        number=1,
        n_steps=n_steps,
        decode=list(map(list, decode)),
        decode_starts=list(map(list, starts)),
        drafts=drafts or [[[] for _ in of_shard] for of_shard in decode],
        chunks=list(map(list, chunks)),
        rows=rows,
        n_tokens=[n_steps] * len(rows),
        table_updates=list(table_updates),
        copies=list(copies),
        placed=list(with_chunk if placed is None else placed),
    )


def floats(row):
    return row[[Column.TEMPERATURE, Column.TOP_P, Column.MIN_P]].view(np.float32).tolist()


def used(work):
    """The work's rows that are used, with their indices."""
    return {i: row for i, row in enumerate(work.rows_RX) if row[Column.LENGTH]}


def chosen(work):
    """Of each shard the rows that are chosen from."""
    named = work.rows_RX[:, Column.CHOSEN].reshape(SHARDS, work.shape.n_rows)[:, : work.shape.n_chosen]
    return [[row for row in rows if row < work.shape.n_rows] for rows in named.tolist()]


def admitted(packer, *sequences):
    """A packer that has seen the sequences' first chunks, on shard 0."""
    packer.pack(plan_of(chunks=([Chunk(s, 0, [5], True) for s in sequences], ())))


def test_decode_rows(packer):
    first, second, third = sequence(3), sequence(0, SAMPLED), sequence(5)
    for shard, of_shard in enumerate(([first, second], [third])):
        chunks = [(), ()]
        chunks[shard] = [Chunk(s, 0, [5], True) for s in of_shard]
        packer.pack(plan_of(chunks=chunks))
    works, columns, *_ = packer.pack(plan_of(decode=([first, second], [third]), starts=([20, 7], [33])))
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
    (work,), *_ = packer.pack(
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
    (work,), columns, *_ = packer.pack(plan_of(chunks=([], [chunk])))
    n_single, n_blocks, block, _ = work.shape
    first = n_single + n_blocks + n_single  # of the second shard's rows of several tokens
    rows = used(work)
    assert list(rows) == list(range(first, first + len(pieces)))
    assert [row[Column.LENGTH] for row in rows.values()] == pieces
    assert [row[Column.START] for row in rows.values()] == [9 + i * BLOCK for i in range(len(pieces))]
    assert [row[Column.SAMPLES] for row in rows.values()] == [0] * (len(pieces) - 1) + [1]
    assert {row[Column.SLOT] for row in rows.values()} == {6}
    assert all(floats(row) == [0.5, 0.25, 0.125] for row in rows.values())
    assert columns.tolist() == [work.shape.n_logits]  # the first of the second shard's rows that are chosen from
    assert chosen(work) == [[], [n_single + len(pieces) - 1]]
    assert work.tokens_CQ.shape == (SHARDS * n_blocks, block)
    of_shard = work.tokens_CQ[n_blocks:]
    assert [token for i, n in enumerate(pieces) for token in of_shard[i, :n]] == tokens
    assert of_shard.sum() == sum(tokens)


def test_a_chunk_that_is_not_the_last_samples_nothing(packer):
    (work,), columns, *_ = packer.pack(plan_of(chunks=([Chunk(sequence(0), 0, [5] * 20, False)], [])))
    assert not work.rows_RX[:, Column.SAMPLES].any()
    assert columns.tolist() == []


def test_a_chunk_of_one_token_is_a_row_of_one(packer):
    """It stands behind the decode rows, and its token is given."""
    decoding, single, longer = sequence(0), sequence(1), sequence(2)
    admitted(packer, decoding)
    chunks = ([Chunk(longer, 0, [7] * 5, True), Chunk(single, 30, [8], True)], [])
    (work,), columns, *_ = packer.pack(plan_of(decode=([decoding], []), starts=([4], []), chunks=chunks))
    row = work.rows_RX[1]
    assert row[: Column.SAMPLES + 1].tolist() == [8, 30, 1, 1, 1]
    # In the order of plan.rows: those that decode, then the chunks as they stand in the plan.
    assert columns.tolist() == [0, 2, 1]
    assert chosen(work) == [[0, 1, work.shape.n_single], []]


def test_columns_are_in_the_order_of_the_plans_rows(packer):
    a, b, c, d = (sequence(slot) for slot in (5, 1, 4, 0))
    admitted(packer, a)
    chunks = ([Chunk(b, 0, [7] * 20, True), Chunk(c, 0, [9] * 3, False)], [Chunk(d, 0, [6], True)])
    plan = plan_of(decode=([a], []), starts=([4], []), chunks=chunks)
    (work,), columns, *_ = packer.pack(plan)
    n_logits, n_rows = work.shape.n_logits, work.shape.n_rows
    at = [column // n_logits * n_rows + chosen(work)[column // n_logits][column % n_logits] for column in columns]
    assert [s.slot for s in plan.rows] == work.rows_RX[at, Column.SLOT].tolist() == [5, 1, 0]
    assert work.rows_RX[at, Column.SAMPLES].tolist() == [1, 1, 1]


def test_where_many_prompts_end_there_is_room_for_all_of_them():
    """More than a step beside few answers chooses for: it is one that has rows for all."""
    slots = FEW_ENDS + 10
    few_rows = 2 * FEW_ENDS * BLOCK
    packer = Packer(
        sizes(max_num_seqs=SHARDS * slots, max_num_batched_tokens=SHARDS * few_rows), SHARDS, N_PAGES, VOCAB
    )
    for n_ends in (1, FEW_ENDS, FEW_ENDS + 1, slots):
        chunks = [Chunk(sequence(slot), 0, [5] * (2 + slot % 3), True) for slot in range(n_ends)]
        (*_, work), columns, *_ = packer.pack(plan_of(chunks=([], chunks)))
        assert work.shape.n_logits >= n_ends
        assert (work.shape.n_logits == slots) == (n_ends > FEW_ENDS)
        assert columns.tolist() == list(range(work.shape.n_logits, work.shape.n_logits + n_ends))
        assert len(chosen(work)[1]) == n_ends


def test_several_steps_have_the_room_of_their_pages(packer):
    short, long = sequence(0, n_pages=1), sequence(1, n_pages=5)
    admitted(packer, short, long)
    (work,), *_ = packer.pack(plan_of(decode=([short, long], []), starts=([3, 70], []), n_steps=4))
    assert work.n_steps == 4
    assert work.rows_RX[:2, Column.LIMIT].tolist() == [PAGE_SIZE, 5 * PAGE_SIZE]


def test_guesses_are_rows_behind_the_newest_token(packer):
    """Of a sequence that is guessed at, whose newest token is given; the first of its rows is the one that counts."""
    guessed, plain, waiting = sequence(3, generated=[40, 41]), sequence(5), sequence(0, generated=[60])
    guessed.speculates = waiting.speculates = True
    admitted(packer, guessed, plain, waiting)
    drafts = [[[70, 71, 72], [], []], []]
    plan = plan_of(decode=([guessed, plain, waiting], []), starts=([2, 8, 1], []), drafts=drafts)
    (work,), columns, *_ = packer.pack(plan)
    names = [Column.TOKEN, Column.START, Column.LENGTH, Column.SLOT, Column.SAMPLES]
    assert [row[names].tolist() for row in used(work).values()] == [
        [41, 2, 1, 3, 1],
        [70, 3, 1, 3, 0],
        [71, 4, 1, 3, 0],
        [72, 5, 1, 3, 0],
        [FROM_SLOT, 8, 1, 5, 1],
        [60, 1, 1, 0, 1],
    ]
    assert columns.tolist() == [0, 4, 5]


@pytest.mark.parametrize(
    ("params", "mode"),
    [
        (GREEDY, Mode.GREEDY),
        (SamplingParams(temperature=0.0, seed=0, logprobs=0), Mode.GREEDY),
        (SamplingParams(temperature=0.0, seed=0, logprobs=1), Mode.LOGPROBS),
        (SamplingParams(temperature=0.0, seed=0, frequency_penalty=1), Mode.SAMPLE),
        (SamplingParams(temperature=0.0, seed=0, entropy=EntropySettings()), Mode.ENTROPY),
        (SAMPLED, Mode.SAMPLE),
    ],
)
def test_the_mode_is_that_of_the_most_demanding_row(packer, params, mode):
    """A slot's parameters are those of the sequence that has it now."""
    assert packer.pack(plan_of(chunks=([Chunk(sequence(1), 0, [5], True)], []))).works[0].mode == Mode.GREEDY
    plan = plan_of(chunks=([Chunk(sequence(2), 0, [5], True)], [Chunk(sequence(1, params), 0, [5], True)]))
    assert packer.pack(plan).works[-1].mode == mode
    decoding = plan_of(decode=([], [sequence(1, params)]), starts=([], [1]))
    assert packer.pack(decoding).works[-1].mode == mode
    packer.pack(plan_of(chunks=([], [Chunk(sequence(1), 0, [5], True)])))
    assert packer.pack(decoding).works[-1].mode == Mode.GREEDY


def test_a_row_that_does_not_sample_does_not_matter(packer):
    plan = plan_of(chunks=([Chunk(sequence(2), 0, [5], True)], [Chunk(sequence(1, SAMPLED), 0, [5] * 3, False)]))
    assert packer.pack(plan).works[0].mode == Mode.GREEDY


def test_tables_and_copies_that_fit_go_with_the_rows(packer):
    updates = [(1, 3, 0, 17), (0, 2, 1, 9), (1, 3, 1, N_PAGES)]
    plan = plan_of(chunks=([Chunk(sequence(2), 0, [5], True)], []), table_updates=updates, copies=[(1, 4, 8)])
    (work,), *_ = packer.pack(plan)
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
    works, *_ = packer.pack(plan)
    assert len(works) == max(1, -(-n_tables // TABLE_CHANGES), -(-n_copies // PAGE_COPIES))
    assert all(work.shape is None and work.rows_RX is None for work in works[:-1])
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
    packer = Packer(sizes(deterministic=True), SHARDS, N_PAGES, VOCAB)
    decoding, long = sequence(1), sequence(2)
    admitted(packer, decoding)
    chunks = ([Chunk(long, 3, [50, 51, 52], True)], [])
    (work,), columns, *_ = packer.pack(plan_of(decode=([decoding], []), starts=([8], []), chunks=chunks))
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
    packer = Packer(sizes_of(EngineOptions(deterministic=True), mesh(), run_length=4), SHARDS, N_PAGES, VOCAB)
    decoding = sequence(1)
    admitted(packer, decoding)
    chunks = ([Chunk(sequence(2), 7, [5] * 6, True), Chunk(sequence(3), 0, [5] * 2, True)], [])
    (work,), *_ = packer.pack(plan_of(decode=([decoding], []), starts=([8], []), chunks=chunks))
    assert work.rows_RX[:9, Column.RUN_PLACE].tolist() == [0, 0, 1, 2, 3, 0, 1, 0, 1]


def slot_changes(work, n_shards=SHARDS):
    """What a work sets: (shard, slot) -> settings, as `pack_slot` gives them. What fills the array up is left out."""
    if work.slots_UX is None:
        return {}
    assert work.slots_UX.dtype == np.int32
    of_shards = work.slots_UX.reshape(n_shards, -1, work.slots_UX.shape[1])
    return {(s, int(x[0])): x[1:] for s, of in enumerate(of_shards) for x in of if x[0] < 1000 and x[0] != FILLER}


FILLER = SLOTS  # a slot that is not there


def placing(*sequences, **kwargs):
    """A plan in which sequences were placed and their prompts' last chunks are computed."""
    chunks = [[], []]
    for seq in sequences:
        chunks[seq.shard].append(Chunk(seq, 0, [5], True))
    return plan_of(chunks=chunks, **kwargs)


class TestSlots:
    """What is kept of slots is set for those that ask for it, made neutral after them, and left alone else."""

    BIASED = SamplingParams(temperature=0.0, seed=0, logit_bias={7: 1.5, 130: -100.0})
    ALLOWED = SamplingParams(temperature=0.0, seed=0, allowed_token_ids=[3, 40, 130])
    ENTROPY = SamplingParams(seed=0, entropy=EntropySettings(top_k=9, pause_token=5))

    def test_plain_requests_set_nothing(self, packer):
        (work,), *_ = packer.pack(placing(sequence(1), sequence(2, SAMPLED, shard=1)))
        assert (work.slots_UX, work.known_UX) == (None, None)

    @pytest.mark.parametrize("params", [BIASED, ALLOWED, ENTROPY], ids=["bias", "allowed", "entropy"])
    def test_what_a_request_asks_for(self, packer, params):
        (work,), *_, masked = packer.pack(placing(sequence(1), sequence(6, params, shard=1)))
        allowed_W = None if params.allowed_token_ids is None else bits.of_ids(params.allowed_token_ids, VOCAB)
        entropy_E = None if params.entropy is None else pack_settings(params.entropy)
        ((at, settings),) = slot_changes(work).items()
        assert at == (1, 6)
        np.testing.assert_array_equal(settings, pack_slot(VOCAB, allowed_W, params.logit_bias, entropy_E))
        assert work.chooses
        assert not masked

    def test_who_comes_after_gets_a_neutral_slot_once(self, packer):
        packer.pack(placing(sequence(6, self.BIASED)))
        (other,), *_ = packer.pack(placing(sequence(5), sequence(6, shard=1)))
        assert other.slots_UX is None, "another slot, and the same of another shard"
        (work,), *_ = packer.pack(placing(sequence(6)))
        ((at, settings),) = slot_changes(work).items()
        assert at == (0, 6)
        np.testing.assert_array_equal(settings, pack_slot(VOCAB))
        (again,), *_ = packer.pack(placing(sequence(6)))
        assert again.slots_UX is None

    def test_a_sequence_that_lost_its_slot_again_is_left_out(self, packer):
        lost = sequence(-1, self.BIASED)
        lost.shard = -1
        (work,), *_ = packer.pack(plan_of(chunks=([Chunk(sequence(1), 0, [5], True)], []), placed=[lost]))
        assert work.slots_UX is None

    def test_more_changes_than_a_small_array_takes(self):
        """Up to SLOT_CHANGES of a shard go in a small array, more in one with all slots."""
        n = SLOT_CHANGES + 3
        made = sizes(max_num_seqs=SHARDS * 2 * SLOT_CHANGES, max_num_batched_tokens=None)
        packer = Packer(made, SHARDS, N_PAGES, VOCAB)
        for count, size in ((2, SLOT_CHANGES), (SLOT_CHANGES, SLOT_CHANGES), (n, 2 * SLOT_CHANGES)):
            given = [sequence(slot, self.BIASED, shard=1) for slot in range(count)]
            (work,), *_ = packer.pack(placing(*given))
            assert len(work.slots_UX) == SHARDS * size
            slots = work.slots_UX.reshape(SHARDS, size, -1)[:, :, 0]
            assert slots[1].tolist() == [*range(count), *[made.slots] * (size - count)]
            assert (slots[0] == made.slots).all()

    def test_the_least_length_switches_the_mask(self, packer):
        """Until min_tokens are generated stop tokens are masked; the step that samples the next one changes that."""
        params = SamplingParams(seed=0, min_tokens=3)
        seq = sequence(4, params)
        seq.one_by_one = True
        no_stop = pack_slot(VOCAB, bits.all_of(VOCAB) & ~bits.of_ids([2, 3], VOCAB))
        seq.n_pending = 1
        (work,), *_ = packer.pack(placing(seq))
        np.testing.assert_array_equal(slot_changes(work)[0, 4], no_stop)
        changes = []
        for n_pending, n_known in ((2, 0), (2, 1), (2, 2), (1, 4)):  # this step's token is pending, and one in flight
            seq.n_pending, seq.tokens = n_pending, [1, *[9] * n_known]
            (work,), *_ = packer.pack(plan_of(decode=([seq], []), starts=([1], [])))
            changes.append(slot_changes(work).get((0, 4)))
        # The fourth generated token, after three, is the first that may end the answer.
        assert [c is None for c in changes] == [True, True, False, True]
        np.testing.assert_array_equal(changes[2], pack_slot(VOCAB, bits.all_of(VOCAB)))
        assert not seq.one_by_one

    def test_a_preempted_one_gets_the_mask_of_its_length(self, packer):
        params = SamplingParams(seed=0, min_tokens=3)
        for n_generated in (2, 3):
            (work,), *_ = packer.pack(placing(sequence(4, params, generated=[9] * n_generated)))
            usual = bits.all_of(VOCAB) if n_generated == 3 else bits.all_of(VOCAB) & ~bits.of_ids([2, 3], VOCAB)
            np.testing.assert_array_equal(slot_changes(work)[0, 4], pack_slot(VOCAB, usual))


class TestCounts:
    PENALISED = SamplingParams(temperature=0.0, seed=0, presence_penalty=0.5)

    @pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
    def test_every_penalty_counts_the_tokens_that_are_there(self, packer, name):
        params = SamplingParams(temperature=0.0, seed=0, **{name: 1.25})
        seq = sequence(3, params, prompt=[8, 5, 8], generated=[9, 9], shard=1)
        (work,), *_ = packer.pack(placing(seq))
        known = work.known_UX.reshape(SHARDS, -1)
        prompt = [8, 5, 8] if name == "repetition_penalty" else []  # the others do not look at it
        np.testing.assert_array_equal(known[1], pack_known(3, prompt, [9, 9])[0])
        assert known[0, 0] == SLOTS, "nothing for the other shard"
        assert work.slots_UX is None
        row = work.rows_RX[work.rows_RX[:, Column.LENGTH] > 0][0]
        columns = {"presence_penalty": Column.PRESENCE, "frequency_penalty": Column.FREQUENCY}
        column = columns.get(name, Column.REPETITION)
        assert row[[column]].view(np.float32).tolist() == [1.25]

    def test_several_of_a_shard_take_several_calls(self, packer):
        """One sequence of each shard in a call, a long one in several, in order; the rows come with the last."""
        long = sequence(2, self.PENALISED, prompt=[1], generated=[5] * (KNOWN_TOKENS + 10))
        other, third = sequence(1, self.PENALISED, shard=1), sequence(7, self.PENALISED)
        works, *_ = packer.pack(placing(long, third, other))
        assert [work.shape is None for work in works] == [True, True, False]
        known = np.stack([work.known_UX.reshape(SHARDS, -1) for work in works])
        assert known[:, 0, 0].tolist() == [2, 2, 7]
        assert known[:, 0, 1].tolist() == [1, 0, 1], "the counts begin anew with the first part alone"
        assert known[:, 1, 0].tolist() == [1, SLOTS, SLOTS]


class TestDynamicMasks:
    """Rows whose mask their last token decides: the choice waits for it."""

    def test_the_choice_comes_apart(self, packer):
        free, waiting = sequence(1), sequence(2, shard=1)
        waiting.params.mask = types.SimpleNamespace(is_dynamic=True)
        (work,), *_, masked = packer.pack(placing(free, waiting))
        assert (work.chooses, masked) == (False, [waiting])
        np.testing.assert_array_equal(slot_changes(work)[1, 2], pack_slot(VOCAB))
        allowed_W = bits.of_ids([4, 100], VOCAB)
        (end,) = packer.masks([(waiting, allowed_W)])
        assert (end.shape, end.rows_RX, end.chooses) == (None, None, True)
        ((at, settings),) = slot_changes(end).items()
        assert at == (1, 2)
        np.testing.assert_array_equal(settings, pack_slot(VOCAB, allowed_W))

    def test_a_row_that_does_not_sample_waits_for_nothing(self, packer):
        waiting = sequence(2)
        waiting.params.mask = types.SimpleNamespace(is_dynamic=True)
        (work,), *_, masked = packer.pack(plan_of(chunks=([Chunk(waiting, 0, [5] * 3, False)], [])))
        assert (work.chooses, masked) == (True, [])

    def test_without_any_mask_left_the_choice_is_still_made(self, packer):
        (end,) = packer.masks([])
        assert (end.slots_UX, end.chooses) == (None, True)


class TestScoredPrompts:
    """Each token is a row of its own and is told which one follows it."""

    PARAMS = SamplingParams(temperature=0.0, seed=0, prompt_logprobs=2)

    def scored(self, packer, start, count, last):
        prompt = [50, 51, 52, 0, 54, 55]
        seq = sequence(6, self.PARAMS, prompt=prompt)
        decoding = sequence(1)
        admitted(packer, decoding)
        chunk = Chunk(seq, start, prompt[start : start + count], last, scored=True)
        plan = plan_of(decode=([], [decoding]), starts=([], [4]), chunks=([], [chunk]))
        return seq, packer.pack(plan)

    def test_the_first_part(self, packer):
        seq, ((work,), columns, scored, *_) = self.scored(packer, 0, 4, False)
        first = work.shape.n_single + 1  # behind the second shard's decode row
        rows = [work.rows_RX[first + i] for i in range(4)]
        names = [Column.TOKEN, Column.START, Column.LENGTH, Column.SLOT, Column.SAMPLES, Column.FORCED]
        assert [row[names].tolist() for row in rows] == [
            [50, 0, 1, 6, 0, 52],
            [51, 1, 1, 6, 0, 53],
            [52, 2, 1, 6, 0, 1],  # token 0
            [0, 3, 1, 6, 0, 55],
        ]
        assert len(scored) == 1
        assert (scored[0].seq, scored[0].start) == (seq, 0)
        assert scored[0].columns.tolist() == [first, first + 1, first + 2, first + 3]
        assert columns.tolist() == [first - 1]
        assert work.mode == Mode.LOGPROBS

    def test_the_last_part_samples_its_end(self, packer):
        _, ((work,), columns, scored, *_) = self.scored(packer, 4, 2, True)
        first = work.shape.n_single + 1
        assert work.rows_RX[first : first + 2, Column.FORCED].tolist() == [56, 0]
        assert work.rows_RX[first : first + 2, Column.SAMPLES].tolist() == [0, 1]
        assert scored[0].columns.tolist() == [first]
        assert columns.tolist() == [first - 1, first + 1]
