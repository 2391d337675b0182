"""What process 0 sends is what the others receive, whatever it is, in messages of one size."""

import types

import numpy as np
import pytest

from sharded_llama.engine import lockstep
from sharded_llama.engine.lockstep import Lockstep
from sharded_llama.engine.options import EngineOptions, sizes_of
from sharded_llama.engine.packing import Packer
from sharded_llama.engine.runner import PAGE_COPIES, TABLE_CHANGES, Work
from sharded_llama.engine.scheduler import Scheduler, SchedulerConfig
from sharded_llama.engine.sequence import Sequence
from sharded_llama.engine.steps import Column
from sharded_llama.sampling import SamplingParams

SHARDS = 2
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


def random_work(rng, shape, n_steps, greedy, tables, copies):
    def ints(rows, width):
        return rng.integers(-(2**31), 2**31, (SHARDS * rows, width)).astype(np.int32)

    return Work(
        shape,
        n_steps,
        greedy,
        ints(shape.n_rows if shape else 0, Column.COUNT),
        ints(shape.n_blocks if shape else 0, shape.block if shape else 0),
        ints(TABLE_CHANGES, 3) if tables else None,
        ints(PAGE_COPIES, 2) if copies else None,
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_every_kind_of_work(wire, options):
    """Each shape, with and without changes of tables and pages; changes alone; and the end."""
    rng = np.random.default_rng(0)
    sizes = sizes_of(OPTIONS[options], MESH)
    here, there = Lockstep(sizes, SHARDS), Lockstep(sizes, SHARDS)
    works = [
        random_work(rng, shape, n_steps, greedy, tables, copies)
        for shape in (*sizes.shapes, None)
        for n_steps, greedy in ((1, True), (4, False))
        for tables in (False, True)
        for copies in (False, True)
    ]
    lengths = set()
    for work in works:
        here.send(work)
        lengths.add(wire[-1].size)
        assert_same(there.receive(), work)
    assert len(lengths) == 1
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
    packer = Packer(sizes, SHARDS, 20)
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
    for i in range(30):
        params = SamplingParams(temperature=i % 2, seed=i)
        prompt = rng.integers(0, 99, rng.integers(1, 60)).tolist()
        leader = Sequence(request_id=str(i), prompt=prompt, max_tokens=20, params=params)
        scheduler.add(leader)
        scheduler.add(Sequence(request_id=str(i), index=1, prompt=prompt, max_tokens=9, params=params, leader=leader))
    kinds = set()
    while (plan := scheduler.schedule()) is not None:
        for work in packer.pack(plan).works:
            here.send(work)
            assert_same(there.receive(), work)
            kinds.add((work.shape, work.tables_U3 is None, work.copies_C2 is None))
        scheduler.update(plan, rng.integers(0, 99, (plan.n_steps, len(plan.rows))))
    assert len(kinds) >= 3
    assert not all(no_copies for _, _, no_copies in kinds)
