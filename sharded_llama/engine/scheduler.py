"""What the device does in each step: which sequences decode, which prompts are computed, and where pages go.

The device runs steps in the order in which they are scheduled, and `schedule` runs ahead of it: it counts on the tokens
of steps that have not been read. Pages and slots are given to others at once when a sequence ends, since whatever
writes to them next is in a later step. Nothing here waits, and no array is on a device.
"""

import bisect
import dataclasses
import heapq
import operator
import secrets
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError, RequestError
from .page_pool import MAX_SEED_BYTES, PagePool, page_digests
from .sequence import Sequence

LARGEST = 2**31 - 1  # of any count: what int32 holds
SEED_BYTES = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Sizes, all at least 1. Raises ConfigError where they do not go together."""

    n_shards: int
    slots_per_shard: int  # running sequences
    pages_per_shard: int
    page_size: int  # positions
    max_model_len: int  # tokens of a sequence, the prompt's included
    block: int  # tokens of one chunk row
    max_blocks: int  # chunk rows of a shard in one step
    max_batched_tokens: int  # of a shard in one step: a decode row counts 1, a chunk row `block`
    decode_steps: int  # steps of one dispatch while there is only decoding to do
    prefix_caching: bool
    # What the number of decode rows counts as beside chunks: the smallest of these that holds it, from 0 to
    # slots_per_shard. Without any: as it is.
    decode_row_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or not 1 <= value <= LARGEST):
                raise ConfigError(f"{field.name}={value!r} must be a whole number from 1 to {LARGEST}.")
        fitting = self.pages_per_shard * self.page_size
        if fitting < self.max_model_len:
            raise ConfigError(
                f"pages_per_shard={self.pages_per_shard} pages of {self.page_size} tokens hold a sequence of {fitting} "
                f"tokens, not one of max_model_len={self.max_model_len}: lower max_model_len to {fitting} or less, or "
                f"give the cache {-(-self.max_model_len // self.page_size)} pages on each shard."
            )
        for name in ("slots_per_shard", "block"):
            if self.max_batched_tokens < getattr(self, name):
                raise ConfigError(
                    f"max_batched_tokens={self.max_batched_tokens} must be at least {name}={getattr(self, name)}."
                )


class Chunk(NamedTuple):
    """Positions `start`.. of a sequence whose tokens are known; if `last`, the token after them is sampled."""

    seq: Sequence
    start: int
    tokens: list[int]  # at most max_blocks * block
    last: bool
    scored: bool = False  # a row for each token, and what follows each is looked at


class Plan(NamedTuple):
    """One dispatch, in the order in which things happen: table updates, copies, then `n_steps` steps.

    A page number of `pages_per_shard` in a table update means that there is no page: what is written there is dropped.
    """

    number: int
    n_steps: int  # more than 1 only without chunks
    decode: list[list[Sequence]]  # per shard; the token of each one's row is the newest of its slot
    decode_starts: list[list[int]]  # per shard: that token's position
    drafts: list[list[list[int]]]  # per shard and sequence of `decode`: guesses that follow that token, mostly none
    chunks: list[list[Chunk]]  # per shard, at most one of a sequence; no sequence decodes and has a chunk
    rows: list[Sequence]  # those that sample: of each shard its decode rows, then its last chunks
    n_tokens: list[int]  # of each row: sampled tokens that count, at most n_steps, or one more than its drafts
    table_updates: list[tuple[int, int, int, int]]  # shard, slot, index, page: no two for the same entry
    copies: list[tuple[int, int, int]]  # shard, source page, target page
    placed: list[Sequence]  # those that got a slot

    @property
    def most_tokens(self) -> int:
        """Sampled tokens of the row that has most."""
        return max([self.n_steps, *self.n_tokens])


class SchedulerStats(NamedTuple):
    """Sums over the shards; from prompt_tokens on since the start."""

    running: int
    waiting: int  # forks that wait for their leader included
    pages_used: int
    pages_total: int
    prompt_tokens: int  # that were looked up in the prefix cache, at each sequence's first admission
    cached_tokens: int  # of these, found there
    preemptions: int
    drafted_tokens: int  # guesses that were looked at
    accepted_tokens: int  # of these, right ones


_order = operator.attrgetter("order")


def _ready(decoding: list[Sequence]) -> list[Sequence]:
    """Those of decoding sequences that can go on before more tokens are read."""
    return [seq for seq in decoding if not seq.speculates or not seq.n_pending]


def _insert(ordered: list[Sequence], seq: Sequence) -> None:
    bisect.insort(ordered, seq, key=_order)


def _remove(ordered: list[Sequence], seq: Sequence) -> bool:
    """Whether `seq` was there. Orders are unique."""
    at = bisect.bisect_left(ordered, seq.order, key=_order)
    found = at < len(ordered) and ordered[at] is seq
    if found:
        del ordered[at]
    return found


class _Shard:
    """What is on one data shard. The lists of sequences are in order."""

    def __init__(self, number: int, config: SchedulerConfig, seed: bytes) -> None:
        self.number = number
        self.pool = PagePool(config.pages_per_shard, config.page_size, config.prefix_caching, seed)
        self.free_slots = list(range(config.slots_per_shard))  # a heap: the lowest is given out first
        self.running: list[Sequence] = []  # all that hold a slot
        self.prefilling: list[Sequence] = []  # those with known tokens to compute
        self.decoding: list[Sequence] = []  # those whose next token comes from a decode row
        # Running but neither prefilling nor decoding: all that it may generate is scheduled, and is waited for.
        self.idle_rows = 0  # of the step being scheduled, beside its decode rows: they cost nothing more
        self.tokens_left = 0  # that it has room for
        self.blocks_left = 0  # chunk rows that it has room for
        self.extra_rows = 0  # rows of one token in it beyond one for each running sequence


class Scheduler:
    """Deals sequences out to slots and pages, step by step.

    Args:
      seed: key of the prefix cache's digests; random if None. Plans do not depend on it.

    Bounding how many sequences wait is up to the caller. Raises ConfigError if the seed is too long.
    """

    def __init__(self, config: SchedulerConfig, seed: bytes | None = None) -> None:
        self.config = config
        self._seed = secrets.token_bytes(SEED_BYTES) if seed is None else seed
        if len(self._seed) > MAX_SEED_BYTES:
            raise ConfigError(f"a seed of {len(self._seed)} bytes is too long; at most {MAX_SEED_BYTES} are used.")
        self._shards = [_Shard(i, config, self._seed) for i in range(config.n_shards)]
        self._requests: dict[str, dict[int, Sequence]] = {}  # unfinished sequences by request and index
        self._waiting: list[Sequence] = []  # in order
        self._forks: dict[Sequence, list[Sequence]] = {}  # leader -> those that wait for its prompt
        self._led: list[Sequence] = []  # leaders whose prompt is computed by now
        self._computed: list[Sequence] = []  # those with a chunk in the last plan
        self._table_updates: list[tuple[int, int, int, int]] = []  # of the plan in the making
        self._copies: list[tuple[int, int, int]] = []
        self._placed: list[Sequence] = []
        self._n_added = self._n_plans = self._n_updated = 0
        self._prompt_tokens = self._cached_tokens = self._preemptions = 0
        self._drafted_tokens = self._accepted_tokens = 0

    # What the engine asks for

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence that was added is not finished."""
        return bool(self._requests)

    def stats(self) -> SchedulerStats:
        """Counts of now and since the start."""
        return SchedulerStats(
            running=sum(len(shard.running) for shard in self._shards),
            waiting=len(self._waiting) + sum(map(len, self._forks.values())),
            pages_used=sum(shard.pool.n_used for shard in self._shards),
            pages_total=self.config.n_shards * self.config.pages_per_shard,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            preemptions=self._preemptions,
            drafted_tokens=self._drafted_tokens,
            accepted_tokens=self._accepted_tokens,
        )

    def check(self) -> None:
        """Raises AssertionError if the books contradict each other. Slow: for tests."""
        for shard in self._shards:
            shard.pool.check()
            held: dict[int, int] = {}
            for seq in shard.running:
                for page in seq.pages:
                    held[page] = held.get(page, 0) + 1
            references = {page: n for page, n in enumerate(shard.pool.references) if n}
            assert held == references, "references are not what the running sequences hold"
            slots = [*shard.free_slots, *(seq.slot for seq in shard.running)]
            assert sorted(slots) == list(range(self.config.slots_per_shard)), "a slot is lost or held twice"
            assert all(seq.finish_reason is None for seq in shard.running), "a finished sequence holds a slot"
            for ordered in (shard.running, shard.prefilling, shard.decoding):
                assert ordered == sorted(ordered, key=_order), "sequences are out of order"

    def add(self, seq: Sequence) -> None:
        """Takes a new sequence in.

        Raises RequestError if it can never run: an empty or too long prompt, tokens that are no int32, no token to
        generate, the same request and index as an unfinished one, or a prompt that is not its leader's.
        """
        where = f"request {seq.request_id!r}, sequence {seq.index}"
        longest = self.config.max_model_len - 1
        if not 1 <= len(seq.prompt) <= longest:
            raise RequestError(
                f"{where}: a prompt of {len(seq.prompt)} tokens cannot run; it must have 1 to {longest} "
                f"(max_model_len={self.config.max_model_len} includes at least one new token)."
            )
        if not (min(seq.prompt) >= 0 and max(seq.prompt) <= LARGEST):
            raise RequestError(f"{where}: prompt tokens must be from 0 to {LARGEST}.")
        if seq.max_tokens < 1:
            raise RequestError(f"{where}: max_tokens={seq.max_tokens} must be at least 1.")
        if seq.index in self._requests.get(seq.request_id, ()):
            raise RequestError(f"{where} is there already; give each sequence of a request its own index.")
        leader = seq.leader
        if leader is not None and leader.prompt != seq.prompt:
            raise RequestError(f"{where}: its prompt must be the same as its leader's.")
        self._requests.setdefault(seq.request_id, {})[seq.index] = seq
        seq.limit = min(len(seq.prompt) + seq.max_tokens, self.config.max_model_len)
        seq.order = (seq.priority, seq.arrival, self._n_added)
        self._n_added += 1
        if leader is not None and self._is_unfinished(leader):
            self._forks.setdefault(leader, []).append(seq)
            if leader.n_computed >= len(leader.prompt):
                self._led.append(leader)
        else:
            _insert(self._waiting, seq)

    def abort(self, request_id: str) -> None:
        """Ends all unfinished sequences of a request; unknown ids are ignored."""
        for seq in list(self._requests.get(request_id, {}).values()):
            self._finish(seq, "abort")

    def speculating(self) -> list[Sequence]:
        """Those whose next rows can carry drafts: running sequences of which no token is pending."""
        return [s for shard in self._shards for s in shard.decoding if s.speculates and not s.n_pending]

    def end(self, request_id: str, index: int, reason: str) -> None:
        """Ends one unfinished sequence for a reason of the caller's; unknown ones are ignored."""
        seq = self._requests.get(request_id, {}).get(index)
        if seq is not None:
            self._finish(seq, reason)

    def schedule(self) -> Plan | None:
        """The next dispatch, or None if nothing can be done before tokens are read or sequences added."""
        # What the last plan computes is in its pages before the next one runs: from now on it can be shared.
        for seq in self._computed:
            if seq.slot >= 0:
                self._register(seq)
        self._computed = []

        for shard in self._shards:
            n_decode = len(shard.decoding)
            counted = next((n for n in self.config.decode_row_sizes if n >= n_decode), n_decode)
            shard.idle_rows = counted - n_decode
            shard.tokens_left = self.config.max_batched_tokens - counted
            shard.blocks_left = min(self.config.max_blocks, shard.tokens_left // self.config.block)
            shard.extra_rows = 0
        n_steps = self._choose_steps()
        for shard in self._shards:
            self._reserve(shard, n_steps)
        decode = [_ready(shard.decoding) for shard in self._shards]
        chunks: list[list[Chunk]] = [[] for _ in self._shards]
        if n_steps == 1:
            self._place_forks()
            for shard, of_shard in zip(self._shards, chunks, strict=True):
                for seq in list(shard.prefilling):
                    if shard.blocks_left:
                        of_shard.append(self._next_chunk(shard, seq))
            self._admit(chunks)
        if not any(decode) and not any(chunks):
            return None
        drafts = [self._drafts(*of_shard) for of_shard in zip(self._shards, decode, strict=True)]
        return self._plan(n_steps, decode, drafts, chunks)

    def update(
        self, plan: Plan, tokens: np.ndarray, n_right: Seq[int] | None = None
    ) -> list[tuple[Sequence, list[int]]]:
        """Takes in the tokens of a plan, integers (most tokens of a row, len(plan.rows)).

        n_right: how many of each row's drafts are what was sampled, from the first on; needed where there are any.

        Returns the new tokens of each row whose sequence was not finished before, in the order of the rows; a stop
        token is the last one. Raises ValueError if the shape is wrong or a later plan has been updated already.
        """
        n_most = plan.most_tokens
        if tokens.shape != (n_most, len(plan.rows)):
            raise ValueError(f"tokens have shape {tokens.shape}, not {(n_most, len(plan.rows))}.")
        if plan.number <= self._n_updated:
            raise ValueError(f"plan {plan.number} comes after plan {self._n_updated}; update them in order.")
        self._n_updated = plan.number
        read = []
        for row, (seq, new, count) in enumerate(zip(plan.rows, tokens.T.tolist(), plan.n_tokens, strict=True)):
            if seq.finish_reason is not None:
                continue
            seq.n_pending -= count
            if n_right is not None and count > 1:
                count = self._accept(seq, count, n_right[row])
            if count < n_most:
                del new[count:]
            tokens_of_seq = seq.tokens
            tokens_of_seq += new
            if len(tokens_of_seq) >= seq.limit or not seq.stop_token_ids.isdisjoint(new):
                self._end(seq, new)
            read.append((seq, new))
        return read

    def _accept(self, seq: Sequence, count: int, n_right: int) -> int:
        """How many of a sequence's sampled tokens count: those of right drafts and one more."""
        seq.n_drafted += count - 1
        seq.n_accepted += n_right
        self._drafted_tokens += count - 1
        self._accepted_tokens += n_right
        if seq.slot >= 0:  # else it was preempted
            seq.n_computed -= count - 1 - n_right
            needed = seq.n_computed // self.config.page_size + 1
            self._shards[seq.shard].pool.free(seq.pages[needed:])
            del seq.pages[needed:]
            seq.n_reserved = len(seq.pages) * self.config.page_size
        return n_right + 1

    # The parts of a step

    def _choose_steps(self) -> int:
        """decode_steps if nothing but decoding can be done, and pages are there for it; else 1."""
        n_steps, page_size = self.config.decode_steps, self.config.page_size
        if n_steps == 1 or self._led or any(shard.prefilling for shard in self._shards):
            return 1
        decoding = [seq for shard in self._shards for seq in shard.decoding]
        if not any(seq.n_computed + 2 < seq.limit for seq in decoding) or any(seq.one_by_one for seq in decoding):
            return 1
        if self._waiting and self._find_place(self._waiting[0]) is not None:
            return 1
        for shard in self._shards:
            needed = 0
            for seq in shard.decoding:
                end = min(seq.n_computed + n_steps, seq.limit - 1)
                needed += max(0, -(-(end - seq.n_reserved) // page_size))
            if needed > shard.pool.n_free:
                return 1  # rather fewer steps than a preemption
        return n_steps

    def _reserve(self, shard: _Shard, n_steps: int) -> None:
        """Gives every decoding sequence pages for its next positions, first to last; preempts the last ones."""
        growing = [seq for seq in _ready(shard.decoding) if seq.n_computed + n_steps > seq.n_reserved]
        for seq in growing:
            # The last token of all is never computed: it needs no position.
            end = min(seq.n_computed + n_steps, seq.limit - 1)
            while seq.slot >= 0 and seq.n_reserved < end:
                page = shard.pool.allocate()
                if page is None:
                    self._preempt(shard.running[-1])
                else:
                    self._append_page(seq, page)
            if seq.slot >= 0:
                self._close_table(seq, seq.n_computed + n_steps)

    def _drafts(self, shard: _Shard, decode: list[Sequence]) -> list[list[int]]:
        """The drafts of decoding sequences as far as rows and pages are left when everything else has its own.

        A page for each running sequence stays free: it may need it before the drafts are read.
        """
        drafts: list[list[int]] = []
        room = shard.tokens_left + shard.idle_rows
        if self.config.block > 1:
            room = min(room, len(shard.free_slots) - shard.extra_rows)
        n_waiting = sum(bool(seq.draft) for seq in decode)
        for seq in decode:
            if not seq.draft:
                drafts.append([])
                continue
            n = min(len(seq.draft), room // n_waiting, seq.limit - len(seq.tokens) - 1)
            n_waiting -= 1
            while seq.n_reserved < seq.n_computed + 1 + n:
                page = shard.pool.allocate() if shard.pool.n_free > len(shard.running) else None
                if page is None:
                    n = seq.n_reserved - seq.n_computed - 1
                else:
                    self._append_page(seq, page)
            room -= n
            drafts.append(seq.draft[:n])
            seq.draft = []
        return drafts

    def _append_page(self, seq: Sequence, page: int) -> None:
        self._table_updates.append((seq.shard, seq.slot, len(seq.pages), page))
        seq.pages.append(page)
        seq.n_reserved += self.config.page_size

    def _close_table(self, seq: Sequence, end: int) -> None:
        """The row runs on to position `end` after its last token that counts: not into pages that are not its own."""
        in_table = -(-min(end, self.config.max_model_len) // self.config.page_size)
        for index in range(len(seq.pages), in_table):
            self._table_updates.append((seq.shard, seq.slot, index, self.config.pages_per_shard))

    def _place_forks(self) -> None:
        """Puts the forks of each leader whose prompt is computed beside it, or into the queue if there is no room."""
        for leader in self._led:
            n_shared, rest = divmod(len(leader.prompt) - 1, self.config.page_size)
            shard, shared = self._shards[leader.shard], leader.pages[:n_shared]
            for seq in self._forks.pop(leader, ()):  # none if the leader does not run any more
                if not shard.free_slots or self._n_pages(seq) - n_shared > shard.pool.n_free:
                    _insert(self._waiting, seq)
                    continue
                self._place(seq, shard, shared, len(seq.prompt) - 1)
                seq.admitted = True
                if rest:
                    # The fork computes its prompt's last position anew, into a copy of the page that holds it.
                    self._copies.append((shard.number, leader.pages[n_shared], seq.pages[n_shared]))
        self._led = []

    def _admit(self, chunks: list[list[Chunk]]) -> None:
        """Places waiting sequences, strictly in order, as long as there is room for the first one."""
        n_admitted = 0
        for seq in self._waiting:
            place = self._find_place(seq)
            if place is None:
                break
            shard, cached = place
            n_computed = len(cached) * self.config.page_size
            self._place(seq, shard, cached, n_computed)
            if not seq.admitted and self.config.prefix_caching:
                seq.n_cached = n_computed
                self._prompt_tokens += len(seq.prompt)
                self._cached_tokens += n_computed
            seq.admitted = True
            chunks[shard.number].append(self._next_chunk(shard, seq))
            n_admitted += 1
        del self._waiting[:n_admitted]

    def _find_place(self, seq: Sequence) -> tuple[_Shard, list[int]] | None:
        """The shard for a waiting sequence and its cached pages there; None if it cannot run now."""
        open_shards = [s for s in self._shards if len(s.free_slots) > s.extra_rows and s.blocks_left > 0]
        if seq.n_pending or not open_shards:
            return None
        # At least the last known token is computed, for its logits.
        n_pages = 0 if seq.scores_prompt else (len(seq.tokens) - 1) // self.config.page_size
        digests = self._digests(seq, n_pages)
        cached = [(shard, shard.pool.match_digests(digests)) for shard in open_shards]
        # A cached prefix saves work once, a crowded shard costs in every step: not beyond a few sequences more.
        few = max(2, self.config.slots_per_shard // 8)
        crowded = min(len(shard.running) for shard in open_shards) + few
        cached.sort(
            key=lambda place: (
                len(place[0].running) >= crowded,
                -len(place[1]),
                len(place[0].running),
                place[0].number,
            )
        )
        for shard, pages in cached:
            if self._n_pages(seq) - len(pages) <= shard.pool.n_free - shard.pool.n_evictable_of(pages):
                return shard, pages
        return None

    def _n_pages(self, seq: Sequence) -> int:
        """Pages for all known tokens and one more: with them, no chunk ever lacks a page."""
        return len(seq.tokens) // self.config.page_size + 1

    def _place(self, seq: Sequence, shard: _Shard, shared: list[int], n_computed: int) -> None:
        """Gives `seq` a slot and pages, the first of which are `shared` and hold `n_computed` positions or more."""
        n_pages = self._n_pages(seq)
        shard.pool.take(shared)
        seq.shard, seq.slot = shard.number, heapq.heappop(shard.free_slots)
        seq.pages = shared + [shard.pool.allocate() for _ in range(n_pages - len(shared))]
        seq.n_reserved = n_pages * self.config.page_size
        seq.n_computed, seq.n_registered = n_computed, len(shared)
        self._table_updates += [(seq.shard, seq.slot, index, page) for index, page in enumerate(seq.pages)]
        _insert(shard.running, seq)
        _insert(shard.prefilling, seq)
        self._placed.append(seq)

    def _next_chunk(self, shard: _Shard, seq: Sequence) -> Chunk:
        """As much of the sequence's known tokens as the step has room for, at least one row."""
        block, start = self.config.block, seq.n_computed
        scored = seq.scores_prompt
        end = min(start + shard.blocks_left * block, len(seq.tokens))
        if scored and block > 1:
            end = min(end, start + 1 + len(shard.free_slots) - shard.extra_rows)
            shard.extra_rows += end - start - 1
        n_blocks = -(-(end - start) // block)
        shard.blocks_left -= n_blocks
        shard.tokens_left -= n_blocks * block
        seq.n_computed = end
        last = end == len(seq.tokens)
        if last:
            seq.n_pending, seq.scores_prompt = 1, False
            _remove(shard.prefilling, seq)
            if end + 1 < seq.limit:
                _insert(shard.decoding, seq)
            if seq in self._forks:
                self._led.append(seq)
        self._computed.append(seq)
        return Chunk(seq, start, seq.tokens[start:end], last, scored)

    def _plan(
        self,
        n_steps: int,
        decode: list[list[Sequence]],
        drafts: list[list[list[int]]],
        chunks: list[list[Chunk]],
    ) -> Plan:
        """The plan of what has been chosen; the decode rows' tokens are pending from here on."""
        starts, rows, n_tokens = [], [], []
        for shard, decoding, guesses, of_shard in zip(self._shards, decode, drafts, chunks, strict=True):
            starts.append([seq.n_computed for seq in decoding])
            rows += decoding
            n_tokens += self._advance(shard, decoding, guesses, n_steps)
            sampling = [chunk.seq for chunk in of_shard if chunk.last]
            rows += sampling
            n_tokens += [1] * len(sampling)
        self._n_plans += 1
        plan = Plan(
            number=self._n_plans,
            n_steps=n_steps,
            decode=decode,
            decode_starts=starts,
            drafts=drafts,
            chunks=chunks,
            rows=rows,
            n_tokens=n_tokens,
            table_updates=self._table_updates,
            copies=self._copies,
            placed=self._placed,
        )
        self._table_updates, self._copies, self._placed = [], [], []
        return plan

    def _advance(self, shard: _Shard, decoding: list[Sequence], drafts: list[list[int]], n_steps: int) -> list[int]:
        """Counts the decode rows' tokens as pending. Returns how many count, of each row."""
        n_tokens = [n_steps] * len(decoding)
        for row, seq in enumerate(decoding):
            if seq.speculates:  # how far it comes is not known yet
                n_tokens[row] = 1 + len(drafts[row])
                seq.n_computed += n_tokens[row]
                seq.n_pending = n_tokens[row]
                continue
            seq.n_computed = end = seq.n_computed + n_steps
            seq.n_pending += n_steps
            if end + 1 >= seq.limit:  # nothing is left to schedule
                beyond = end + 1 - seq.limit
                seq.n_computed -= beyond
                seq.n_pending -= beyond
                n_tokens[row] -= beyond
                _remove(shard.decoding, seq)
        return n_tokens

    # What happens to single sequences

    def _end(self, seq: Sequence, new: list[int]) -> None:
        """Finishes a sequence that stops or is full; `new`, its last tokens, are cut after a stop token."""
        for at, token in enumerate(new, 1):
            if token in seq.stop_token_ids:
                if at < len(new):
                    del seq.tokens[at - len(new) :], new[at:]
                self._finish(seq, "stop")
                return
        self._finish(seq, "length")

    def _finish(self, seq: Sequence, reason: str) -> None:
        if seq.slot >= 0:
            self._release(seq)
        elif not _remove(self._waiting, seq):
            forks = self._forks[seq.leader]
            forks.remove(seq)
            if not forks:
                del self._forks[seq.leader]
        self._disband(seq)
        seq.finish_reason = reason
        of_request = self._requests[seq.request_id]
        del of_request[seq.index]
        if not of_request:
            del self._requests[seq.request_id]

    def _preempt(self, seq: Sequence) -> None:
        """Takes everything from a running sequence; it waits to be computed again from its known tokens."""
        self._release(seq)
        self._disband(seq)
        seq.draft = []
        _insert(self._waiting, seq)
        self._preemptions += 1

    def _release(self, seq: Sequence) -> None:
        """Slot and pages become free; the pages' content can be found until they are used for something else."""
        shard = self._shards[seq.shard]
        self._register(seq)
        shard.pool.free(seq.pages)
        heapq.heappush(shard.free_slots, seq.slot)
        for ordered in (shard.running, shard.prefilling, shard.decoding):
            _remove(ordered, seq)
        seq.shard = seq.slot = -1
        seq.pages, seq.n_computed, seq.n_reserved = [], 0, 0

    def _disband(self, leader: Sequence) -> None:
        """Forks that were to share the prompt of `leader` wait like all others."""
        for fork in self._forks.pop(leader, ()):
            _insert(self._waiting, fork)

    def _register(self, seq: Sequence) -> None:
        """Enters the pages that are full of known and computed tokens into the prefix cache.

        This is done after every chunk, and for generated tokens when the sequence gives its pages back: only then is
        there anyone who could ask for them, and a step does not have to look for pages that became full.
        """
        if not self.config.prefix_caching:
            return
        known = len(seq.tokens if seq.caches_answer else seq.prompt)
        full = min(known, seq.n_computed) // self.config.page_size
        if full > seq.n_registered:
            pool, digests = self._shards[seq.shard].pool, self._digests(seq, full)
            for index in range(seq.n_registered, full):
                pool.register_digest(seq.pages[index], digests[index])
            seq.n_registered = full

    def _digests(self, seq: Sequence, n_pages: int) -> list[bytes]:
        """Digests of the first `n_pages` full pages of known tokens, each computed once."""
        if not self.config.prefix_caching:
            return []
        known, page_size = len(seq.digests), self.config.page_size
        if known < n_pages:
            parent = seq.digests[-1] if known else b""
            new = seq.tokens[known * page_size : n_pages * page_size]
            seq.digests += page_digests(new, page_size, self._seed, parent)
        return seq.digests[:n_pages]

    def _is_unfinished(self, seq: Sequence) -> bool:
        return self._requests.get(seq.request_id, {}).get(seq.index) is seq
