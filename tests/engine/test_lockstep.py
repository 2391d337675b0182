"""What process 0 sends is what the others receive, whatever it is, in messages of one size."""

import types

import numpy as np
import pytest

from sharded_llama.constraints import row_mask
from sharded_llama.engine import lockstep
from sharded_llama.engine.lockstep import Lockstep
from sharded_llama.engine.options import EngineOptions, sizes_of
from sharded_llama.engine.packing import Packer, SequenceSampling
from sharded_llama.engine.runner import PAGE_COPIES, TABLE_CHANGES, Work
from sharded_llama.engine.scheduler import Scheduler, SchedulerConfig
from sharded_llama.engine.sequence import Sequence
from sharded_llama.engine.steps import Column
from sharded_llama.sampling import Mode, SamplingParams
from sharded_llama.sampling.entropy_settings import EntropySettings

SHARDS, VOCAB = 2, 131
MESH = types.SimpleNamespace(shape={"data": SHARDS}, devices=np.array([types.SimpleNamespace(platform="cpu")]))
OPTIONS = {
    "several rows": EngineOptions(max_num_seqs=16, max_num_batched_tokens=100),
    "deterministic": EngineOptions(max_num_seqs=16, max_num_batched_tokens=100, deterministic=True),
}


@pytest.fixture
def wire(monkeypatch):
    """The messages in the order in which they were sent; receiving takes the oldest."""
    sent = []

    def broadcast(message):
        assert message.dtype == np.int32
        if message.any():  # the receivers' part is empty
            sent.append(message.copy())
            return message
        return sent.pop(0)

    monkeypatch.setattr(lockstep.multihost_utils, "broadcast_one_to_all", broadcast)
    return sent


def assert_same(received, sent):
    for field, ours, theirs in zip(Work._fields, received, sent, strict=True):
        if isinstance(theirs, np.ndarray):
            assert ours.dtype == np.int32, field
            assert ours.size == theirs.size == 0 or ours.shape == theirs.shape, field
            np.testing.assert_array_equal(ours.reshape(-1), theirs.reshape(-1), field)
        else:
            assert (type(ours), ours) == (type(theirs), theirs), field


def random_work(rng, shape, n_steps, mode, tables, copies, slots=0, known=0, **kwargs):
    def ints(rows, width):
        return rng.integers(-(2**31), 2**31, (SHARDS * rows, width)).astype(np.int32)

    return Work(
        shape,
        n_steps,
        mode,
        ints(shape.n_rows, Column.COUNT) if shape else None,
        ints(shape.n_blocks, shape.block) if shape else None,
        ints(TABLE_CHANGES, 3) if tables else None,
        ints(PAGE_COPIES, 2) if copies else None,
        ints(slots, 77) if slots else None,
        ints(known, 99) if known else None,
        **kwargs,
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_every_kind_of_work(wire, options):
    """Each shape, with and without changes of tables and pages; changes alone; and the end."""
    rng = np.random.default_rng(0)
    sizes = sizes_of(OPTIONS[options], MESH)
    here, there = Lockstep(sizes, SHARDS), Lockstep(sizes, SHARDS)
    works = [
        random_work(rng, shape, n_steps, mode, tables, copies)
        for shape in (*sizes.shapes, None)
        for n_steps, mode in zip((1, 4, 1, 4), Mode, strict=True)
        for tables in (False, True)
        for copies in (False, True)
    ]
    lengths = set()
    for work in works:
        here.send(work)
        assert len(wire) == 1
        lengths.add(wire[-1].size)
        assert_same(there.receive(), work)
    assert len(lengths) == 1
    assert not wire


@pytest.mark.parametrize("flags", [{"chooses": True}, {"for_draft": True}, {}], ids=str)
def test_changes_of_slots_and_counts_follow(wire, flags):
    """In messages of their own; what comes next is received from its beginning."""
    rng = np.random.default_rng(1)
    sizes = sizes_of(OPTIONS["several rows"], MESH)
    here, there = Lockstep(sizes, SHARDS), Lockstep(sizes, SHARDS)
    works = [
        random_work(rng, shape, 1, Mode.SAMPLE, True, False, slots, known, **flags)
        for shape in (sizes.shapes[-1], None)
        for slots in (0, 3, 8)
        for known in (0, 1)
    ]
    for work in works:
        here.send(work)
    assert len(wire) == 2 * ((1 + 2 + 2) + (2 + 3 + 3))
    for work in works:
        assert_same(there.receive(), work)
    assert not wire


def test_the_end(monkeypatch):
    lock = Lockstep(sizes_of(OPTIONS["several rows"], MESH), SHARDS)
    sent = []
    monkeypatch.setattr(
        lockstep.multihost_utils, "broadcast_one_to_all", lambda message: sent.append(message) or message
    )
    lock.send(None)
    assert lock.receive() is None
    assert sent[0].shape == sent[1].shape, "a collective needs the same shape in every process"


@pytest.mark.parametrize("options", OPTIONS)
def test_the_works_of_real_plans(wire, options):
    sizes = sizes_of(OPTIONS[options], MESH)
    here, there = Lockstep(sizes, SHARDS), Lockstep(sizes, SHARDS)
    packer = Packer(sizes, SHARDS, 20, VOCAB)
    scheduler = Scheduler(
        SchedulerConfig(
            n_shards=SHARDS,
            slots_per_shard=sizes.slots,
            pages_per_shard=20,
            page_size=16,
            max_model_len=100,
            block=sizes.block,
            max_blocks=sizes.max_blocks,
            max_batched_tokens=sizes.max_tokens,
            decode_steps=sizes.decode_steps,
            prefix_caching=True,
        )
    )
    rng = np.random.default_rng(0)
    asked = (
        {},
        {"temperature": 0.0},
        {"presence_penalty": 1.0},
        {"logit_bias": {5: 1.0}},
        {"min_tokens": 4},
        {"allowed_token_ids": [1, 2]},
        {"prompt_logprobs": 2},
        {"entropy": EntropySettings()},
    )
    for i in range(32):
        given = SamplingParams(seed=i, **asked[i % 8])
        mask = row_mask(given, vocab_size=VOCAB, stop_ids=frozenset([3]), tokenizer=None, grammar=None)
        params = SequenceSampling(given, given.seed or 0, mask)
        prompt = rng.integers(0, 99, rng.integers(1, 60)).tolist()
        leader = Sequence(request_id=str(i), prompt=prompt, max_tokens=20, params=params)
        scheduler.add(leader)
        scheduler.add(Sequence(request_id=str(i), index=1, prompt=prompt, max_tokens=9, params=params, leader=leader))
    kinds = set()
    while (plan := scheduler.schedule()) is not None:
        for work in packer.pack(plan).works:
            here.send(work)
            assert_same(there.receive(), work)
            kinds.add((*(x is None for x in work[5:9]), work.shape, work.mode))
        scheduler.update(plan, rng.integers(0, 99, (plan.n_steps, len(plan.rows))))
    assert len(kinds) >= 3
    assert all(any(not kind[i] for kind in kinds) for i in range(4)), "every change was there"
    assert {kind[-1] for kind in kinds} >= {Mode.LOGPROBS, Mode.ENTROPY}
