"""The scheduler: each rule of its policy, and random workloads whose plans run on simulated pages.

`--fuzz=N`: N random workloads, if more than 500.
"""

import collections
import copy
import hashlib
import random
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from sharded_llama.engine.scheduler import Chunk, Scheduler, SchedulerConfig
from sharded_llama.engine.sequence import Sequence
from sharded_llama.errors import ConfigError, RequestError

VOCAB = 5
SEED = b"seed"
DEFAULTS = {
    "n_shards": 1,
    "slots_per_shard": 4,
    "pages_per_shard": 16,
    "page_size": 4,
    "max_model_len": 32,
    "block": 4,
    "max_blocks": 4,
    "max_batched_tokens": 64,
    "decode_steps": 1,
    "prefix_caching": True,
}


def config_of(**changes):
    return SchedulerConfig(**{**DEFAULTS, **changes})


def scheduler_of(**changes):
    return Scheduler(config_of(**changes), SEED)


def sequence(name, prompt, max_tokens=8, **kwargs):
    return Sequence(request_id=name, prompt=list(prompt), max_tokens=max_tokens, **kwargs)


def next_token(prefix, salt):
    """The fake model: a function of all tokens before, and of what stands for the sequence's sampling parameters."""
    data = np.array([salt, *prefix], np.int32).tobytes()
    return hashlib.blake2b(data, digest_size=1).digest()[0] % VOCAB


def generated(prompt, salt, n):
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(next_token(tokens, salt))
    return tokens


def alone(seq, max_model_len):
    """Tokens and finish reason of a sequence that runs by itself."""
    tokens, limit = list(seq.prompt), min(len(seq.prompt) + seq.max_tokens, max_model_len)
    while True:
        tokens.append(next_token(tokens, seq.params))
        if tokens[-1] in seq.stop_token_ids:
            return tokens, "stop"
        if len(tokens) == limit:
            return tokens, "length"


class Device:
    """Runs plans on simulated pages: every entry is a (token, position), and every one that is visible is looked at."""

    def __init__(self, config):
        self.config = config
        shape = (config.n_shards, config.pages_per_shard, config.page_size, 2)
        self.pages = np.full(shape, -1, np.int64)
        self.width = -(-config.max_model_len // config.page_size)
        self.tables = np.full((config.n_shards, config.slots_per_shard, self.width), config.pages_per_shard)
        self.newest = np.full((config.n_shards, config.slots_per_shard), -1)
        self.expected = {}  # sequence -> its tokens if no stop token ended it

    def run(self, plan):
        """Returns the sampled tokens, (most tokens of a row, rows), and how many of each row's drafts are right: None
        where there are no drafts.
        """
        entries = [entry[:3] for entry in plan.table_updates]
        assert len(set(entries)) == len(entries), "two updates of one entry have no order"
        for shard, slot, index, page in plan.table_updates:
            self.tables[shard, slot, index] = page
        targets = {(shard, target) for shard, _, target in plan.copies}
        assert len(targets) == len(plan.copies)
        assert not targets & {(shard, source) for shard, source, _ in plan.copies}, "copies have no order"
        for shard, source, target in plan.copies:
            self.pages[shard, target] = self.pages[shard, source]

        # Each row: sequence, shard, first position, its tokens or None (the slot's newest), whether it samples.
        rows, drafts = [], {}
        for shard in range(self.config.n_shards):
            of_shard = zip(plan.decode[shard], plan.decode_starts[shard], plan.drafts[shard], strict=True)
            for seq, start, guesses in of_shard:
                given = [seq.tokens[-1], *guesses] if seq.speculates else None
                rows.append((seq, shard, start, given, True))
                drafts[seq] = guesses
            rows += [(c.seq, shard, c.start, c.tokens, c.last) for c in plan.chunks[shard]]
        assert [seq for seq, *_, samples in rows if samples] == plan.rows
        assert len({seq for seq, *_ in rows}) == len(rows), "a sequence is in a step twice"
        counts = dict(zip(plan.rows, plan.n_tokens, strict=True))
        out = np.zeros((max([plan.n_steps, *plan.n_tokens]), len(plan.rows)), np.int64)
        n_right = [0] * len(plan.rows)
        for step in range(plan.n_steps):
            rows_now = []
            for seq, shard, start, tokens, samples in rows:
                given = [int(self.newest[shard, seq.slot])] if tokens is None else tokens
                rows_now.append((seq, shard, start + step, given, samples, step < counts.get(seq, 1)))
            # What was there before the step is all that a row may rely on.
            for seq, shard, start, _, _, counted in rows_now:
                if counted:
                    self.look(seq, shard, start)
            for seq, shard, start, given, _, _ in rows_now:
                self.write(seq, shard, start, given)
            at = 0
            for seq, shard, start, given, samples, counted in rows_now:
                guesses = drafts.get(seq, [])
                known = start + len(given) - len(guesses)
                for n in range(len(guesses) + 1):  # a row for each
                    tokens = self.look(seq, shard, known + n, guesses[:n]) if counted else []
                    if samples:
                        out[step + n, at] = next_token(tokens, seq.params)
                if samples:
                    self.newest[shard, seq.slot] = out[step, at]
                    while n_right[at] < len(guesses) and guesses[n_right[at]] == out[n_right[at], at]:
                        n_right[at] += 1
                    at += 1
        return out, n_right if any(map(any, plan.drafts)) else None

    def write(self, seq, shard, start, tokens):
        for position, token in enumerate(tokens, start):
            index, place = divmod(position, self.config.page_size)
            page = self.tables[shard, seq.slot, index] if index < self.width else self.config.pages_per_shard
            if page < self.config.pages_per_shard:
                self.pages[shard, page, place] = (token, position)

    def look(self, seq, shard, length, guesses=()):
        """The first `length` tokens of a sequence as its table shows them; the last ones are guesses."""
        if length == 0:
            return []
        if seq not in self.expected:
            self.expected[seq] = generated(seq.prompt, seq.params, self.config.max_model_len)
        pages = self.tables[shard, seq.slot, : -(-length // self.config.page_size)]
        assert (pages < self.config.pages_per_shard).all(), "a visible position has no page"
        entries = self.pages[shard, pages].reshape(-1, 2)[:length]
        tokens = entries[:, 0].tolist()
        assert entries[:, 1].tolist() == list(range(length)), "positions are lost or another sequence's"
        right = [*self.expected[seq][: length - len(guesses)], *guesses]
        assert tokens == right, "a position holds the wrong token"
        return tokens


def check_plan(config, plan):
    """What every plan promises about sizes."""
    n_tokens = {}
    for decode, drafts, chunks in zip(plan.decode, plan.drafts, plan.chunks, strict=True):
        n_decode, n_blocks, n_single = len(decode) + sum(map(len, drafts)), 0, 0
        for chunk in chunks:
            assert chunk.tokens
            if config.block > 1 and (chunk.scored or len(chunk.tokens) == 1):
                n_single += len(chunk.tokens)
            else:
                n_blocks += -(-len(chunk.tokens) // config.block)
        assert n_blocks <= config.max_blocks
        assert n_decode + n_single + config.block * n_blocks <= config.max_batched_tokens
        if config.block > 1:
            assert n_decode + n_single <= config.slots_per_shard, "there is a row for each sequence that may run"
        assert plan.n_steps == 1 or not chunks
        for seq, guesses in zip(decode, drafts, strict=True):
            n_tokens[seq] = 1 + len(guesses)
            assert seq.speculates or not guesses
            assert plan.n_steps == 1 or not seq.one_by_one
            if seq.speculates:
                assert len(seq.tokens) + n_tokens[seq] <= seq.limit, "a token more than the last is looked for"
    assert plan.n_steps in (1, config.decode_steps)
    for seq, n in zip(plan.rows, plan.n_tokens, strict=True):
        assert n == n_tokens.get(seq, 1) if plan.n_steps == 1 else 1 <= n <= plan.n_steps
    assert plan.rows or any(plan.chunks), "a plan does something"


class Run(NamedTuple):
    plans: list
    outputs: dict  # sequence -> the tokens that update() returned
    stats: object
    n_evicted: int


def guess(sequences, device, rng):
    """Drafts: right ones, and often a wrong one somewhere; sometimes none, or more than can be of use."""
    for seq in sequences:
        if seq not in device.expected:
            device.expected[seq] = generated(seq.prompt, seq.params, device.config.max_model_len)
        at = len(seq.tokens)
        seq.draft = device.expected[seq][at : at + rng.choice([0, 1, 2, 3, 6, 30])]
        if seq.draft and rng.random() < 0.6:
            wrong = rng.randrange(len(seq.draft))
            seq.draft[wrong] = (seq.draft[wrong] + 1) % VOCAB


def pages_of_guesses(config, shard):
    """Pages that a shard's sequences hold beyond those of known tokens and one more."""
    of_each = (len(s.pages) - len(s.tokens) // config.page_size - 1 for s in shard.decoding if s.speculates)
    return sum(max(0, n) for n in of_each)


def run(config, events, delay=0, seed=SEED, max_plans=10_000, before_plan=lambda scheduler: None):
    """Runs a workload to its end.

    events: (step, what, argument) with what "add" (a sequence), "abort" (a request id) or "end" (a request id and an
    index); delay: how many later plans are scheduled before a plan's tokens are read.
    """
    scheduler, device, rng = Scheduler(config, seed), Device(config), random.Random(0)
    do = {"add": scheduler.add, "abort": scheduler.abort, "end": lambda which: scheduler.end(*which, "error")}
    events = collections.deque(sorted(events, key=lambda event: event[0]))
    in_flight, plans, outputs = collections.deque(), [], collections.defaultdict(list)
    step = 0
    while events or scheduler.has_unfinished:
        while events and events[0][0] <= step:
            _, what, argument = events.popleft()
            do[what](argument)
        scheduler.check()
        guess(scheduler.speculating(), device, rng)
        before_plan(scheduler)
        running = [(list(shard.running), pages_of_guesses(config, shard)) for shard in scheduler._shards]
        plan = scheduler.schedule()
        scheduler.check()
        for sequences, n_guessed in running if delay < 2 else ():
            assert n_guessed == 0 or all(s.slot >= 0 for s in sequences), "a guess took the page that was lacking"
        if plan is not None:
            check_plan(config, plan)
            in_flight.append((plan, *device.run(plan)))
            plans.append(plan)
        assert plan is not None or in_flight or events or not scheduler.has_unfinished, "nothing happens any more"
        assert len(plans) <= max_plans, "a sequence starves"
        if in_flight and (plan is None or len(in_flight) > delay):
            finished = {seq for seq in in_flight[0][0].rows if seq.finish_reason}
            read = scheduler.update(*in_flight.popleft())
            assert not finished & {seq for seq, _ in read}
            for seq, new in read:
                assert new
                outputs[seq] += new
        step += 1
    for left in in_flight:
        assert scheduler.update(*left) == []
    scheduler.check()
    stats = scheduler.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0), "something is left"
    return Run(plans, outputs, stats, sum(shard.pool.n_evicted for shard in scheduler._shards))


def assert_alone(config, outputs, sequences):
    """Every sequence that nobody ended has the tokens of running alone; one that was, their beginning."""
    for seq in sequences:
        tokens, reason = alone(seq, config.max_model_len)
        assert seq.prompt + outputs[seq] == seq.tokens
        if seq.finish_reason in ("abort", "error"):
            assert tokens[: len(seq.tokens)] == seq.tokens
        else:
            assert (seq.tokens, seq.finish_reason) == (tokens, reason)


# Rules one by one


def names(sequences):
    return [seq.request_id for seq in sequences]


def one_token_each(scheduler, plan, token=1):
    return scheduler.update(plan, np.full((plan.n_steps, len(plan.rows)), token))


def test_a_prompt_then_tokens_up_to_the_limit():
    scheduler, seq = scheduler_of(), sequence("a", [1, 2, 3], max_tokens=3)
    scheduler.add(seq)
    plan = scheduler.schedule()
    assert plan.chunks == [[Chunk(seq, 0, [1, 2, 3], True)]]
    assert (plan.decode, plan.rows, plan.n_tokens) == ([[]], [seq], [1])
    assert plan.table_updates == [(0, 0, 0, 0)]
    second, third = scheduler.schedule(), scheduler.schedule()  # before anything is read
    assert (second.decode, second.decode_starts) == ([[seq]], [[3]])
    assert (third.decode, third.decode_starts) == ([[seq]], [[4]])
    assert third.table_updates == [(0, 0, 1, 1)], "position 4 is in another page"
    assert scheduler.schedule() is None, "all that it may generate is pending"
    assert one_token_each(scheduler, plan, 7) == [(seq, [7])]
    assert one_token_each(scheduler, second, 8) == [(seq, [8])]
    assert seq.finish_reason is None
    assert one_token_each(scheduler, third, 9) == [(seq, [9])]
    assert (seq.tokens, seq.finish_reason) == ([1, 2, 3, 7, 8, 9], "length")
    assert not scheduler.has_unfinished
    assert scheduler.stats().pages_used == 0


def test_max_model_len_ends_a_sequence():
    seq = sequence("a", [1] * 30, max_tokens=100, params=0)
    run(config_of(), [(0, "add", seq)])
    assert (len(seq.tokens), seq.finish_reason) == (32, "length")


def test_a_stop_token_is_kept_and_what_comes_after_it_is_dropped():
    scheduler, seq = scheduler_of(), sequence("a", [1], stop_token_ids=frozenset({9}))
    scheduler.add(seq)
    plans = [scheduler.schedule() for _ in range(3)]
    assert one_token_each(scheduler, plans[0], 5) == [(seq, [5])]
    assert one_token_each(scheduler, plans[1], 9) == [(seq, [9])]
    assert (seq.tokens, seq.finish_reason) == ([1, 5, 9], "stop")
    assert one_token_each(scheduler, plans[2], 5) == []
    assert seq.tokens == [1, 5, 9]


def test_a_stop_token_on_the_last_place_counts_as_stop():
    scheduler, seq = scheduler_of(), sequence("a", [1], max_tokens=1, stop_token_ids=frozenset({9}))
    scheduler.add(seq)
    one_token_each(scheduler, scheduler.schedule(), 9)
    assert seq.finish_reason == "stop"


def test_long_prompts_are_computed_in_chunks_beside_decoding():
    scheduler = scheduler_of(max_batched_tokens=9, prefix_caching=False)
    short, long = sequence("short", [1]), sequence("long", range(20), arrival=1)
    scheduler.add(short)
    scheduler.schedule()
    scheduler.add(long)
    plans = [scheduler.schedule() for _ in range(4)]
    assert [names(plan.decode[0]) for plan in plans] == [["short"]] * 3 + [["short", "long"]]
    chunks = [(c.start, len(c.tokens), c.last) for plan in plans for c in plan.chunks[0]]
    assert chunks == [(0, 8, False), (8, 8, False), (16, 4, True)]
    assert [names(plan.rows) for plan in plans] == [["short"], ["short"], ["short", "long"], ["short", "long"]]


@pytest.mark.parametrize(("sizes", "n_blocks"), [((), 4), ((0, 4, 8), 3), ((0, 8), 2)])
def test_decode_rows_count_as_the_shape_has_them(sizes, n_blocks):
    """Three sequences decode: of 19 tokens they would leave room for 4 blocks of 4 if they counted as three."""
    scheduler = scheduler_of(max_batched_tokens=19, max_blocks=8, slots_per_shard=8, decode_row_sizes=sizes)
    for name in "abc":
        scheduler.add(sequence(name, [1]))
    plan = scheduler.schedule()
    scheduler.update(plan, np.ones((1, 3), np.int64))
    scheduler.add(sequence("long", range(30)))
    (chunk,) = scheduler.schedule().chunks[0]
    assert len(chunk.tokens) == 4 * n_blocks


def test_max_blocks_bounds_the_chunk_rows():
    scheduler = scheduler_of(max_blocks=2)
    for name in "abc":
        scheduler.add(sequence(name, [1, 2, 3, 4, 5]))
    chunks = [[(c.seq.request_id, c.start) for c in scheduler.schedule().chunks[0]] for _ in range(3)]
    assert chunks == [[("a", 0)], [("b", 4), ("c", 4)], []]  # b and c find a's first page


def test_order_is_priority_then_arrival_then_adding():
    scheduler = scheduler_of(slots_per_shard=1)
    for name, priority, arrival in [("d", 1, 0), ("b", 0, 5), ("a", 0, 1), ("c", 0, 5)]:
        scheduler.add(sequence(name, [1], 1, priority=priority, arrival=arrival))
    served = []
    while scheduler.has_unfinished:
        plan = scheduler.schedule()
        served += names(plan.rows)
        one_token_each(scheduler, plan)
    assert served == ["a", "b", "c", "d"]


def test_nobody_overtakes_the_first_that_waits():
    scheduler = scheduler_of(pages_per_shard=8, max_blocks=8)
    scheduler.add(sequence("running", range(16)))  # 5 pages
    scheduler.schedule()
    big, small = sequence("big", [4] * 13, arrival=1), sequence("small", [4], arrival=2)
    scheduler.add(big)
    scheduler.add(small)
    plan = scheduler.schedule()
    assert plan.chunks == [[]]
    assert scheduler.stats().waiting == 2
    scheduler.abort("running")
    assert [c.seq for c in scheduler.schedule().chunks[0]] == [big, small]


def test_a_sequence_goes_where_its_prefix_is_then_where_fewest_run():
    scheduler = scheduler_of(n_shards=3, max_blocks=8)
    first = sequence("first", [1, 2, 3, 4, 5])
    scheduler.add(first)
    scheduler.schedule()
    for name, prompt in [("other", [9] * 5), ("same", [1, 2, 3, 4, 6]), ("third", [8] * 5)]:
        scheduler.add(sequence(name, prompt, arrival=1))
    plan = scheduler.schedule()
    assert [names(c.seq for c in chunks) for chunks in plan.chunks] == [["same"], ["other"], ["third"]]
    assert plan.chunks[0][0].start == 4
    assert plan.chunks[0][0].seq.n_cached == 4
    assert plan.chunks[0][0].seq.pages[0] == first.pages[0]
    stats = scheduler.stats()
    assert (stats.prompt_tokens, stats.cached_tokens) == (20, 4)


def test_a_full_shard_sends_a_prefix_elsewhere():
    scheduler = scheduler_of(n_shards=2, slots_per_shard=1)
    scheduler.add(sequence("first", [1, 2, 3, 4, 5]))
    scheduler.schedule()
    scheduler.add(sequence("second", [1, 2, 3, 4, 5]))
    plan = scheduler.schedule()
    assert [c.start for c in plan.chunks[1]] == [0]


def test_pages_of_the_same_step_are_not_shared():
    scheduler = scheduler_of()
    scheduler.add(sequence("a", [1] * 9))
    scheduler.add(sequence("b", [1] * 9))
    assert [(c.start, len(c.tokens)) for c in scheduler.schedule().chunks[0]] == [(0, 9), (0, 4)]


def test_the_last_known_token_is_always_computed():
    scheduler = scheduler_of()
    scheduler.add(sequence("a", [1] * 8, max_tokens=1))
    one_token_each(scheduler, scheduler.schedule())
    again = sequence("b", [1] * 8)
    scheduler.add(again)
    assert scheduler.schedule().chunks == [[Chunk(again, 4, [1] * 4, True)]]
    assert again.n_cached == 4


@pytest.mark.parametrize("caches_answer", [True, False])
def test_generated_tokens_are_found_too(caches_answer):
    scheduler = scheduler_of()
    seq = sequence("a", [1, 2, 3, 4, 5], max_tokens=4, caches_answer=caches_answer)
    scheduler.add(seq)
    while scheduler.has_unfinished:
        one_token_each(scheduler, scheduler.schedule(), 7)
    follow_up = sequence("b", [*seq.tokens, 4, 4])
    scheduler.add(follow_up)
    found = 8 if caches_answer else 4  # the last of 9 tokens was never computed; the prompt has one full page
    assert scheduler.schedule().chunks[0][0].start == found


def preempting():
    """Two sequences of one page each in a pool of two pages that both need another one: the second gives way."""
    scheduler = scheduler_of(pages_per_shard=2, max_model_len=8)
    high, low = sequence("high", [1, 2, 3]), sequence("low", [4, 5, 6], arrival=1)
    scheduler.add(low)
    scheduler.add(high)
    return scheduler, high, low, [scheduler.schedule(), scheduler.schedule(), scheduler.schedule()]


def test_the_last_sequence_is_preempted_when_pages_run_out():
    scheduler, high, low, (prefill, decode, alone_again) = preempting()
    assert prefill.rows == decode.rows == [high, low]
    assert alone_again.rows == [high]
    assert (low.slot, low.pages, low.n_pending) == (-1, [], 2)
    assert scheduler.stats().preemptions == 1
    one_token_each(scheduler, prefill, 7)
    scheduler.abort("high")
    assert scheduler.schedule() is None, "its second token is not known yet"
    assert one_token_each(scheduler, decode, 8) == [(low, [8])]
    assert scheduler.schedule().chunks == [[Chunk(low, 0, [4, 5, 6, 7, 8], True)]]


def test_a_preempted_sequence_finds_its_pages_again():
    scheduler = scheduler_of(pages_per_shard=4, max_model_len=16)
    high, low = sequence("high", [1, 2, 3]), sequence("low", [4, 5, 6, 7, 8, 9], arrival=1)
    scheduler.add(high)
    scheduler.add(low)
    while not scheduler.stats().preemptions:
        one_token_each(scheduler, scheduler.schedule(), 7)
    assert low.tokens == [4, 5, 6, 7, 8, 9, 7, 7, 7], "position 8 has no page"
    scheduler.abort("high")
    assert scheduler.schedule().chunks == [[Chunk(low, 8, [7], True)]], "both full pages are still there"
    assert low.n_cached == 0, "at its first admission nothing was there"


def test_pending_tokens_can_end_a_preempted_sequence():
    scheduler, high, low, (prefill, decode, _) = preempting()
    low.stop_token_ids = frozenset({8})
    one_token_each(scheduler, prefill, 7)
    one_token_each(scheduler, decode, 8)
    assert (low.finish_reason, high.finish_reason) == ("stop", None)
    assert scheduler.stats().waiting == 0


def test_abort_at_any_point():
    scheduler = scheduler_of(slots_per_shard=1)
    running, waiting = sequence("a", [1]), sequence("b", [2])
    scheduler.add(running)
    scheduler.add(waiting)
    plan = scheduler.schedule()
    scheduler.abort("b")
    scheduler.abort("a")
    scheduler.abort("unknown")
    assert (running.finish_reason, waiting.finish_reason) == ("abort", "abort")
    assert scheduler.stats()[:3] == (0, 0, 0)
    assert one_token_each(scheduler, plan) == []
    assert not scheduler.has_unfinished
    assert scheduler.schedule() is None


def fork_of(leader, index, **kwargs):
    return sequence(leader.request_id, leader.prompt, index=index, leader=leader, **kwargs)


def test_forks_share_full_pages_and_copy_the_partial_one():
    scheduler, leader = scheduler_of(prefix_caching=False), sequence("a", [1] * 7)
    forks = [fork_of(leader, 1), fork_of(leader, 2)]
    for seq in [leader, *forks]:
        scheduler.add(seq)
    assert scheduler.schedule().rows == [leader]
    plan = scheduler.schedule()
    assert plan.chunks == [[Chunk(fork, 6, [1], True) for fork in forks]]
    assert plan.rows == [leader, *forks]
    assert leader.pages == [0, 1]
    assert [fork.pages for fork in forks] == [[0, 2], [0, 3]]
    assert plan.copies == [(0, 1, 2), (0, 1, 3)]
    scheduler.abort("a")
    assert scheduler.stats().pages_used == 0


def test_a_fork_at_a_page_boundary_copies_nothing():
    scheduler, leader = scheduler_of(), sequence("a", [1] * 5)
    fork = fork_of(leader, 1)
    scheduler.add(leader)
    scheduler.add(fork)
    scheduler.schedule()
    plan = scheduler.schedule()
    assert plan.chunks == [[Chunk(fork, 4, [1], True)]]
    assert (plan.copies, fork.pages[0]) == ([], leader.pages[0])
    assert fork.pages[1] != leader.pages[1]


def test_a_fork_without_room_waits_like_others():
    scheduler, leader = scheduler_of(slots_per_shard=1), sequence("a", [1] * 5, max_tokens=2)
    fork = fork_of(leader, 1)
    scheduler.add(leader)
    scheduler.add(fork)
    plans = [scheduler.schedule(), scheduler.schedule()]
    assert plans[1].rows == [leader]
    for plan in plans:
        one_token_each(scheduler, plan)
    assert leader.finish_reason == "length"
    assert scheduler.schedule().chunks == [[Chunk(fork, 4, [1], True)]], "its first page is still there"


@pytest.mark.parametrize("when", ["before", "after"])
def test_forks_outlive_their_leader(when):
    """A leader of another request may be aborted before its prompt is computed, or just after."""
    scheduler, leader = scheduler_of(), sequence("a", [1] * 6)
    fork = sequence("b", [1] * 6, leader=leader)
    scheduler.add(leader)
    scheduler.add(fork)
    if when == "after":
        scheduler.schedule()
    scheduler.abort("a")
    start = {"before": 0, "after": 4}[when]
    assert scheduler.schedule().chunks == [[Chunk(fork, start, [1] * (6 - start), True)]]


def test_steps_are_joined_while_there_is_only_decoding():
    scheduler = scheduler_of(decode_steps=4)
    long, short = sequence("long", [1, 2], max_tokens=8), sequence("short", [3, 4], max_tokens=4, arrival=1)
    scheduler.add(long)
    scheduler.add(short)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert (first.n_steps, second.n_steps) == (1, 4)
    assert second.rows == [long, short]
    assert second.n_tokens == [4, 3]
    assert second.table_updates == [(0, 0, 1, 2), (0, 1, 1, 3)]
    one_token_each(scheduler, first, 7)
    read = scheduler.update(second, np.array([[1, 2], [3, 4], [5, 6], [7, 8]]))
    assert read == [(long, [1, 3, 5, 7]), (short, [2, 4, 6])]
    assert short.finish_reason == "length"
    third = scheduler.schedule()
    assert (third.n_steps, third.n_tokens) == (4, [3])


def test_a_row_that_runs_on_has_no_page_there():
    scheduler = scheduler_of(decode_steps=4, max_model_len=16)
    long, short = sequence("long", [1, 2], max_tokens=8), sequence("short", [3, 4], max_tokens=3, arrival=1)
    scheduler.add(long)
    scheduler.add(short)
    scheduler.schedule()
    plan = scheduler.schedule()
    assert plan.n_tokens == [4, 2]
    assert plan.table_updates == [(0, 0, 1, 2), (0, 1, 1, 16)], "16: beyond the pool"


def test_a_stop_within_joined_steps():
    scheduler, seq = scheduler_of(decode_steps=4), sequence("a", [1], stop_token_ids=frozenset({9}))
    scheduler.add(seq)
    first, second = scheduler.schedule(), scheduler.schedule()
    one_token_each(scheduler, first, 5)
    assert scheduler.update(second, np.array([[6], [9], [7], [9]])) == [(seq, [6, 9])]
    assert (seq.tokens, seq.finish_reason) == ([1, 5, 6, 9], "stop")


def test_steps_are_not_joined_when_a_sequence_can_be_admitted_or_pages_lack():
    scheduler = scheduler_of(decode_steps=4, slots_per_shard=1)
    scheduler.add(sequence("a", [1]))
    scheduler.schedule()
    scheduler.add(sequence("b", [1]))
    assert scheduler.schedule().n_steps == 4, "what waits has no slot"

    scheduler = scheduler_of(decode_steps=4)
    scheduler.add(sequence("a", [1]))
    scheduler.schedule()
    scheduler.add(sequence("b", [1]))
    assert scheduler.schedule().n_steps == 1, "what waits is admitted"

    scheduler = scheduler_of(decode_steps=4, pages_per_shard=2, max_model_len=8)
    scheduler.add(sequence("a", [1, 2], max_tokens=6))
    scheduler.add(sequence("b", [1, 2], max_tokens=6))
    scheduler.schedule()
    plan = scheduler.schedule()
    assert (plan.n_steps, len(plan.rows), scheduler.stats().preemptions) == (1, 2, 0), "sooner than preempting one"

    scheduler = scheduler_of(decode_steps=4)
    scheduler.add(sequence("a", [1], max_tokens=2))
    scheduler.schedule()
    assert scheduler.schedule().n_steps == 1, "one token is all that is left"


def speculating(name, prompt, max_tokens=8, **kwargs):
    return sequence(name, prompt, max_tokens, speculates=True, one_by_one=True, **kwargs)


def test_right_drafts_and_one_token_more_count():
    scheduler, seq = scheduler_of(), speculating("a", [1, 2])
    scheduler.add(seq)
    first = scheduler.schedule()
    assert scheduler.speculating() == [], "its first token is pending"
    assert scheduler.schedule() is None
    one_token_each(scheduler, first, 5)
    assert scheduler.speculating() == [seq]
    seq.draft = [6, 7, 8]
    plan = scheduler.schedule()
    assert (plan.decode, plan.decode_starts, plan.drafts) == ([[seq]], [[2]], [[[6, 7, 8]]])
    assert (plan.n_tokens, plan.table_updates) == ([4], [(0, 0, 1, 1)]), "positions 2 to 5"
    assert scheduler.schedule() is None, "nobody knows yet how far it comes"
    assert scheduler.update(plan, np.array([[6], [7], [3], [9]]), [2]) == [(seq, [6, 7, 3])]
    assert (seq.tokens, seq.n_drafted, seq.n_accepted) == ([1, 2, 5, 6, 7, 3], 3, 2)
    assert scheduler.stats()[-2:] == (3, 2)
    plan = scheduler.schedule()  # without drafts, as any other
    assert (plan.decode_starts, plan.drafts, plan.n_tokens) == ([[5]], [[[]]], [1])
    assert plan.table_updates == []
    assert one_token_each(scheduler, plan, 4) == [(seq, [4])]


def test_no_more_is_drafted_than_may_be_generated():
    scheduler, seq = scheduler_of(), speculating("a", [1], max_tokens=4)
    scheduler.add(seq)
    one_token_each(scheduler, scheduler.schedule(), 5)
    seq.draft = [6, 7, 8, 9]
    plan = scheduler.schedule()
    assert plan.drafts == [[[6, 7]]]
    assert scheduler.update(plan, np.array([[6], [7], [8]]), [2]) == [(seq, [6, 7, 8])]
    assert (seq.tokens, seq.finish_reason) == ([1, 5, 6, 7, 8], "length")


def test_a_stop_among_right_drafts():
    scheduler, seq = scheduler_of(), speculating("a", [1, 2, 3], stop_token_ids=frozenset({7}))
    scheduler.add(seq)
    one_token_each(scheduler, scheduler.schedule(), 5)
    seq.draft = [6, 7, 8]
    plan = scheduler.schedule()
    assert scheduler.update(plan, np.array([[6], [7], [8], [9]]), [3]) == [(seq, [6, 7])]
    assert (seq.tokens, seq.finish_reason) == ([1, 2, 3, 5, 6, 7], "stop")
    follow_up = sequence("b", [1, 2, 3, 5, 6, 7, 8, 9, 1])
    scheduler.add(follow_up)
    assert scheduler.schedule().chunks[0][0].start == 4, "what was cut off is not cached, be it right"


def test_wrong_drafts_are_not_cached():
    scheduler, seq = scheduler_of(), speculating("a", [1, 2, 3], max_tokens=3)
    scheduler.add(seq)
    one_token_each(scheduler, scheduler.schedule(), 5)
    seq.draft = [6]
    assert scheduler.update(scheduler.schedule(), np.array([[9], [4]]), [0]) == [(seq, [9])]
    one_token_each(scheduler, scheduler.schedule(), 9)
    again = sequence("b", [1, 2, 3, 5, 6, 6])
    scheduler.add(again)
    assert scheduler.schedule().chunks[0][0].start == 4


def test_drafts_share_the_rows_that_nobody_else_has():
    scheduler = scheduler_of(slots_per_shard=8)
    sequences = [speculating(name, [i]) for i, name in enumerate("abc")]
    for seq in sequences:
        scheduler.add(seq)
    one_token_each(scheduler, scheduler.schedule(), 5)
    for seq, n in zip(sequences, (1, 6, 6), strict=True):
        seq.draft = [5] * n
    scheduler.add(sequence("late", [9]))
    plan = scheduler.schedule()
    assert [len(guesses) for guesses in plan.drafts[0]] == [1, 1, 2], "of four rows; one of eight is the late one's"
    assert names(plan.rows) == ["a", "b", "c", "late"]


def test_drafts_take_rows_that_are_idle_beside_chunks():
    """Three rows decode where the step has eight, and chunks fill the rest: five drafts cost nothing."""
    sizes = {"max_batched_tokens": 24, "max_blocks": 8, "slots_per_shard": 8, "decode_row_sizes": (0, 8)}
    scheduler = scheduler_of(**sizes)
    for name in "abc":
        scheduler.add(sequence(name, [1], speculates=True))
    scheduler.update(scheduler.schedule(), np.ones((1, 3), np.int64))
    scheduler.add(sequence("long", range(30)))
    for seq in scheduler.speculating():
        seq.draft = [1] * 6
    plan = scheduler.schedule()
    assert len(plan.chunks[0][0].tokens) == 16
    assert sum(map(len, plan.drafts[0])) == 4  # the fifth row is that of the sequence whose prompt is computed


def test_what_waits_comes_before_drafts():
    """A sequence, a fork, and a prompt under way: each has its row or block first."""
    for changes in ({}, {"block": 1, "max_blocks": 4, "max_batched_tokens": 4}):
        scheduler = scheduler_of(**changes)
        seq = speculating("a", [1])
        scheduler.add(seq)
        one_token_each(scheduler, scheduler.schedule(), 5)
        leader = sequence("b", [2, 3], arrival=1)
        forks = [fork_of(leader, 1, arrival=1), fork_of(leader, 2, arrival=1)]
        for new in (leader, *forks):
            scheduler.add(new)
        seq.draft = [1] * 9
        plan = scheduler.schedule()
        assert plan.rows == [seq, leader]
        assert [len(guesses) for guesses in plan.drafts[0]] == [2 if not changes else 1]
        scheduler.update(plan, np.zeros((1 + len(plan.drafts[0][0]), 2), int), [0, 0])
        seq.draft = [1] * 6
        plan = scheduler.schedule()
        assert (plan.rows, plan.drafts) == ([seq, leader, *forks], [[[], []]])


def test_drafts_take_only_free_pages():
    scheduler = scheduler_of(pages_per_shard=2, max_model_len=8)
    first, second = speculating("a", [1, 2, 3]), speculating("b", [4, 5, 6], arrival=1)
    scheduler.add(first)
    scheduler.add(second)
    one_token_each(scheduler, scheduler.schedule(), 7)
    first.draft = second.draft = [1, 1]
    plan = scheduler.schedule()
    assert (plan.rows, plan.drafts, scheduler.stats().preemptions) == ([first, second], [[[], []]], 0)


def test_pages_of_wrong_drafts_are_given_back():
    scheduler, seq = scheduler_of(pages_per_shard=9, slots_per_shard=8), speculating("a", [1, 2, 3])
    scheduler.add(seq)
    one_token_each(scheduler, scheduler.schedule(), 7)
    seq.draft = [1] * 6
    plan = scheduler.schedule()
    assert (len(plan.drafts[0][0]), seq.pages) == (6, [0, 1, 2])
    scheduler.update(plan, np.full((7, 1), 7), [1])
    assert (seq.tokens, seq.pages) == ([1, 2, 3, 7, 7, 7], [0, 1])
    assert scheduler.stats().pages_used == 2
    seq.draft = [1] * 6
    plan = scheduler.schedule()
    assert (plan.decode_starts, len(plan.drafts[0][0])) == ([[5]], 4), "five tokens are left"
    assert [update[:3] for update in plan.table_updates] == [(0, 0, 2)]


def test_drafts_leave_a_page_for_everyone():
    scheduler = scheduler_of(pages_per_shard=4, max_model_len=8)
    first, second = speculating("a", [1, 2, 3]), sequence("b", [4, 5, 6], arrival=1)
    scheduler.add(first)
    scheduler.add(second)
    one_token_each(scheduler, scheduler.schedule(), 7)
    first.draft = [1, 1]
    assert scheduler.schedule().drafts == [[[], []]], "two pages are free, two sequences may need them"


def test_a_sequence_that_is_preempted_keeps_what_its_drafts_bring():
    scheduler = scheduler_of(pages_per_shard=2, max_model_len=8, prefix_caching=False)
    low, high = speculating("low", [1], arrival=2), sequence("high", [4, 5, 6], arrival=1)
    scheduler.add(low)
    scheduler.add(high)
    one_token_each(scheduler, scheduler.schedule(), 7)
    low.draft = [7, 7, 7]
    plan = scheduler.schedule()
    assert (plan.rows, plan.drafts) == ([high, low], [[[], [7, 7]]])
    assert scheduler.schedule().rows == [high]
    assert (low.slot, low.n_pending) == (-1, 3), "its page is the other's"
    assert scheduler.update(plan, np.full((3, 2), 7), [0, 1]) == [(high, [7]), (low, [7, 7])]
    scheduler.abort("high")
    assert scheduler.schedule().chunks == [[Chunk(low, 0, [1, 7, 7, 7], True)]]


def test_a_scored_prompt_has_a_row_for_each_token():
    scheduler = scheduler_of()
    scheduler.add(sequence("cached", [1] * 9, max_tokens=1))
    one_token_each(scheduler, scheduler.schedule())
    seq = sequence("a", [1] * 9, scores_prompt=True)
    scheduler.add(seq)
    chunks = [scheduler.schedule().chunks for _ in range(3)]
    assert chunks == [
        [[Chunk(seq, 0, [1] * 4, False, True)]],
        [[Chunk(seq, 4, [1] * 4, False, True)]],
        [[Chunk(seq, 8, [1], True, True)]],
    ], "four rows at a time, from the start though all is cached"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_size": 0}, "page_size=0 must be a whole number from 1 to 2147483647"),
        ({"decode_steps": True}, "decode_steps=True must be a whole number"),
        (
            {"pages_per_shard": 7},
            "hold a sequence of 28 tokens, not one of max_model_len=32: lower max_model_len to 28",
        ),
        ({"max_batched_tokens": 3}, "max_batched_tokens=3 must be at least slots_per_shard=4"),
        ({"max_batched_tokens": 5, "block": 8}, "max_batched_tokens=5 must be at least block=8"),
    ],
)
def test_sizes_that_do_not_go_together(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**changes)


@pytest.mark.parametrize(
    ("seq", "message"),
    [
        (sequence("a", []), "request 'a', sequence 0: a prompt of 0 tokens cannot run; it must have 1 to 31"),
        (sequence("a", [1] * 32), "a prompt of 32 tokens cannot run"),
        (sequence("a", [1, -1]), "prompt tokens must be from 0 to 2147483647"),
        (sequence("a", [2**31]), "prompt tokens must be from 0 to 2147483647"),
        (sequence("a", [1], max_tokens=0), "max_tokens=0 must be at least 1"),
        (sequence("there", [1]), "request 'there', sequence 0 is there already"),
        (sequence("a", [1], leader=sequence("b", [2])), "its prompt must be the same as its leader's"),
    ],
)
def test_sequences_that_can_never_run(seq, message):
    scheduler = scheduler_of()
    scheduler.add(sequence("there", [5]))
    with pytest.raises(RequestError, match=message):
        scheduler.add(seq)
    assert scheduler.stats().waiting == 1


def test_updates_must_fit_their_plan_and_come_in_order():
    scheduler = scheduler_of()
    scheduler.add(sequence("a", [1]))
    first, second = scheduler.schedule(), scheduler.schedule()
    with pytest.raises(ValueError, match=r"tokens have shape \(2, 1\), not \(1, 1\)"):
        scheduler.update(first, np.zeros((2, 1), np.int32))
    one_token_each(scheduler, second)
    with pytest.raises(ValueError, match="plan 1 comes after plan 2"):
        one_token_each(scheduler, first)


# Random workloads

BASES = [generated([start], 100, 40) for start in range(2)]  # prompts are beginnings of these, so they share prefixes


@st.composite
def workloads(draw):
    """(config, delay, arguments of each sequence, aborts): sizes are small, so that everything runs out often."""
    page_size, max_model_len = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(4, 24))
    fitting = -(-max_model_len // page_size)
    slots, block = draw(st.sampled_from([4, 3, 2, 1])), draw(st.integers(1, 5))
    config = config_of(
        n_shards=draw(st.integers(1, 4)) if draw(st.booleans()) else 1,
        slots_per_shard=slots,
        pages_per_shard=fitting + draw(st.sampled_from([0, 0, 1, 2, fitting])),
        page_size=page_size,
        max_model_len=max_model_len,
        block=block,
        max_blocks=draw(st.integers(1, 4)),
        decode_row_sizes=draw(st.sampled_from([(), (0, slots), (0, slots // 2, slots)])),
        max_batched_tokens=max(slots, block) + draw(st.integers(0, 12)),
        decode_steps=draw(st.integers(1, 4)),
        prefix_caching=draw(st.integers(0, 3)) > 0,
    )
    requests = []
    for i in range(draw(st.sampled_from([8, 5, 3, 1]))):
        length = min(draw(st.integers(1, 12)), max_model_len - 1)
        changed = draw(st.integers(0, 2 * length))  # beyond the length: none
        prompt = draw(st.sampled_from(BASES))[:length]
        requests.append(
            {
                "at": draw(st.integers(0, 20)),
                "name": f"r{i}",
                "prompt": [(t + 1) % VOCAB if p == changed else t for p, t in enumerate(prompt)],
                "max_tokens": draw(st.sampled_from([1, 2, 3, 5, 8, 12, 20])),
                "stop_token_ids": frozenset(draw(st.sampled_from([[], [], [0], [1, 2]]))),
                "priority": draw(st.integers(0, 2)),
                "n": draw(st.sampled_from([1, 1, 1, 2, 3])),
                "salt": draw(st.integers(0, 1)),
                "forks_apart": draw(st.booleans()),  # as requests of their own, which outlive the leader's
                "forks_late_by": draw(st.sampled_from([0, 0, 0, 1, 3, 6])),
                "speculates": draw(st.booleans()),
                "scores_prompt": draw(st.sampled_from([False, False, True])),
            }
        )
    step, number = st.integers(0, 25), st.integers(0, 8)
    ends = [(at, "abort", f"r{i}") for at, i in draw(st.lists(st.tuples(step, number), max_size=2))]
    of_one = draw(st.lists(st.tuples(step, number, st.integers(0, 2)), max_size=2))
    ends += [(at, "end", (f"r{i}", index)) for at, i, index in of_one]
    return config, draw(st.integers(0, 2)), requests, ends


def events_of(requests, ends):
    """Fresh sequences, and when what happens."""
    events, sequences = [], []
    for r in requests:
        leader = None
        for index in range(r["n"]):
            same = {k: r[k] for k in ("prompt", "max_tokens", "stop_token_ids", "priority")}
            name = f"{r['name']}.{index}" if index and r["forks_apart"] else r["name"]
            seq = Sequence(
                request_id=name,
                index=index,
                arrival=r["at"],
                params=r["salt"] + 7 * index,
                leader=leader,
                one_by_one=r["speculates"],
                speculates=r["speculates"],
                scores_prompt=r["scores_prompt"] and index == 0,
                **same,
            )
            leader = leader or seq
            sequences.append(seq)
            events.append((r["at"] + (r["forks_late_by"] if index else 0), "add", seq))
    return events + ends, sequences


def most_plans(config, sequences, delay):
    """In every plan the first sequence of all advances, or waits for tokens, or for room that others will give."""
    work = sum(min(len(s.prompt) + s.max_tokens, config.max_model_len) for s in sequences)
    return 20 + (delay + 2) * work


def described(plan):
    """A plan with names in the place of sequences."""

    def name(x):
        if isinstance(x, Sequence):
            return (x.request_id, x.index)
        return [name(y) for y in x] if isinstance(x, (list, tuple)) else x

    return name(plan)


@pytest.fixture(scope="module")
def fuzz_settings(request):
    return settings(
        max_examples=max(500, request.config.getoption("--fuzz")),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def test_every_workload_gives_what_each_sequence_gives_alone(fuzz_settings):
    @fuzz_settings
    @given(workloads())
    def check(workload):
        config, delay, requests, ends = workload
        events, sequences = events_of(requests, ends)
        scored = [seq for seq in sequences if seq.scores_prompt]
        result = run(config, events, delay, max_plans=most_plans(config, sequences, delay))
        assert_alone(config, result.outputs, sequences)
        assert_all_scored(result.plans, scored)
        assert result.stats.cached_tokens <= result.stats.prompt_tokens
        assert result.stats.drafted_tokens == sum(seq.n_drafted for seq in sequences)
        assert result.stats.accepted_tokens == sum(seq.n_accepted for seq in sequences)
        seen["preemptions"] += result.stats.preemptions
        seen["cached tokens"] += result.stats.cached_tokens
        seen["copies"] += sum(len(plan.copies) for plan in result.plans)
        seen["evictions"] += result.n_evicted
        seen["joined steps"] += sum(plan.n_steps > 1 for plan in result.plans)
        seen["rows that run on"] += sum(n < plan.n_steps for plan in result.plans for n in plan.n_tokens)
        seen["tables closed"] += sum(
            page == config.pages_per_shard for plan in result.plans for *_, page in plan.table_updates
        )
        seen["right drafts"] += result.stats.accepted_tokens
        seen["wrong drafts"] += result.stats.drafted_tokens - result.stats.accepted_tokens
        seen["rows of scored prompts"] += sum(
            len(chunk.tokens) for plan in result.plans for of in plan.chunks for chunk in of if chunk.scored
        )
        for seq in sequences:
            seen[seq.finish_reason] += 1

    seen = collections.Counter()
    check()
    print(dict(seen))
    common = ("preemptions", "cached tokens", "copies", "evictions", "joined steps", "rows that run on")
    for what in (*common, "right drafts", "wrong drafts", "rows of scored prompts"):
        assert seen[what] > 50, f"the workloads hardly ever come across {what}"
    assert min(seen[what] for what in ("tables closed", "stop", "length", "abort", "error")) > 15


def assert_all_scored(plans, sequences):
    """What follows every prompt token of these was looked at, by the sequences that nobody ended."""
    looked_at = collections.defaultdict(set)
    for chunk in (chunk for plan in plans for of_shard in plan.chunks for chunk in of_shard if chunk.scored):
        assert chunk.tokens == chunk.seq.prompt[chunk.start : chunk.start + len(chunk.tokens)]
        looked_at[chunk.seq] |= set(range(chunk.start, chunk.start + len(chunk.tokens)))
    for seq in sequences:
        if seq.finish_reason not in ("abort", "error"):
            assert looked_at[seq] == set(range(len(seq.prompt)))


def test_drafts_take_nothing_from_anyone(fuzz_settings):
    """A plan with drafts is the plan without them, and drafts besides: they preempt nobody and keep nobody waiting."""

    def compare(scheduler):
        if not any(seq.draft for seq in scheduler.speculating()):
            return
        plans, stats, running = [], [], []
        for drafts in (True, False):
            twin = copy.deepcopy(scheduler)
            for seq in twin.speculating() if not drafts else ():
                seq.draft = []
            plans.append(twin.schedule())
            stats.append(twin.stats()._replace(pages_used=0))
            running.append([described(shard.running) for shard in twin._shards])
        assert stats[0] == stats[1]
        assert running[0] == running[1]
        if plans[0] is None or plans[1] is None:  # all that speculate were preempted
            assert plans[0] is plans[1]
            return
        seen["drafts"] += sum(len(guesses) for of_shard in plans[0].drafts for guesses in of_shard)
        seen["chunks beside them"] += any(map(any, plans[0].drafts)) and any(plans[0].chunks)
        with_drafts, without = (described(p._replace(drafts=[], n_tokens=[], table_updates=[])) for p in plans)
        assert with_drafts == without

    @settings(fuzz_settings, max_examples=fuzz_settings.max_examples // 2)
    @given(workloads())
    def check(workload):
        config, delay, requests, ends = workload
        run(config, events_of(requests, ends)[0], delay, before_plan=compare)

    seen = collections.Counter()
    check()
    print(dict(seen))
    assert min(seen["drafts"], seen["chunks beside them"]) > 30


def test_plans_do_not_depend_on_the_seed(fuzz_settings):
    @settings(fuzz_settings, max_examples=100)
    @given(workloads())
    def check(workload):
        config, delay, requests, ends = workload
        first, second = (run(config, events_of(requests, ends)[0], delay, seed) for seed in (b"one", b"two"))
        assert [described(p) for p in first.plans] == [described(p) for p in second.plans]

    check()
