"""Generating for one batch of prompts: how it is laid out over the mesh, and the loop of steps over it."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from ..kv_cache import KVCache
from ..sampling import RowParams, SamplingParams, pack_rows
from ..sharding import DATA
from ..weights import XfmrWeights
from .steps import Steps

PREFILL_TOKENS = 16384  # of one data shard in one prefill step: bounds its temporary memory
MIN_PROMPT_BUCKET, MIN_CACHE_BUCKET = 16, 64
STEPS_IN_FLIGHT = 2  # tokens of a step are read when this many later ones are at work or queued


class NewToken(NamedTuple):
    """One token of one request. `finish_reason` is None, 'stop' (an end-of-sequence token) or 'length'."""

    request: int
    token: int
    finish_reason: str | None


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Where each request goes.

    Requests are taken in order of length, so that those prefilled together need little padding, and dealt out
    to the data shards in turn. Row `i` of shard `d` is row `d * rows_per_shard + i` of the batch.
    """

    rows: tuple[int | None, ...]  # request of every row of the batch; None where there are fewer requests
    cache_length: int
    group_rows: int  # rows of each shard that are prefilled together
    group_lengths: tuple[int, ...]  # padded prompt length of every group that holds a request

    @property
    def batch(self) -> int:
        return len(self.rows)


def bucket(n: int, minimum: int) -> int:
    """`n` rounded up to one of four sizes per octave, so that few shapes are compiled and little is padded."""
    step = max(minimum, 2 ** max(0, (n - 1).bit_length() - 1) // 4)
    return -(-n // step) * step


def plan_batch(prompt_lengths: Sequence[int], max_new: Sequence[int], data: int) -> BatchPlan:
    """Layout of requests with these prompt lengths and most new tokens on `data` shards."""
    n = len(prompt_lengths)
    per_shard = 1 << (-(-n // data) - 1).bit_length()
    order = sorted(range(n), key=lambda i: -prompt_lengths[i])
    rows: list[int | None] = [None] * (data * per_shard)
    for place, request in enumerate(order):
        shard, slot = place % data, place // data
        rows[shard * per_shard + slot] = request

    longest = bucket(max(prompt_lengths), MIN_PROMPT_BUCKET)
    group_rows = min(per_shard, 1 << max(0, (PREFILL_TOKENS // longest).bit_length() - 1))
    longest_of_group = [
        prompt_lengths[order[first * data]] for first in range(0, per_shard, group_rows) if first * data < n
    ]
    group_lengths = tuple(bucket(length, MIN_PROMPT_BUCKET) for length in longest_of_group)
    # The last new token is returned, never cached.
    needed = max(p + m - 1 for p, m in zip(prompt_lengths, max_new, strict=True))
    cache_length = bucket(max(needed, *group_lengths), MIN_CACHE_BUCKET)
    return BatchPlan(tuple(rows), cache_length, group_rows, group_lengths)


def compile_batch(steps: Steps, plan: BatchPlan, *, greedy: bool) -> None:
    """Compiles what `run_batch` will call."""
    KVCache.new(steps.config, steps.mesh, plan.batch, plan.cache_length)  # compiled on its first call
    data = steps.mesh.shape[DATA]
    for length in set(plan.group_lengths):
        steps.prefill(data * plan.group_rows, length, plan.batch, plan.cache_length, greedy=greedy)
    steps.decode(plan.batch, plan.cache_length, greedy=greedy)


def run_batch(
    steps: Steps,
    weights: XfmrWeights,
    plan: BatchPlan,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    max_new: Sequence[int],
) -> Iterator[list[NewToken]]:
    """Yields the new tokens of every step, for the requests that are not finished.

    `max_new` bounds each request's tokens (its max_tokens, or less at the end of the context). The device is kept
    ahead of the host: a step's tokens are read while later steps run, and what those make of finished rows is dropped.
    """
    greedy = all(p.temperature == 0 for p in params)
    unused = SamplingParams(temperature=0, seed=0)
    rows = pack_rows([unused if r is None else params[r] for r in plan.rows])
    n_new = [0] * len(prompts)
    unfinished = set(range(len(prompts)))

    def deliver(tokens_B: np.ndarray) -> list[NewToken]:
        new = []
        for row, request in enumerate(plan.rows):
            if request not in unfinished:
                continue
            token = int(tokens_B[row])
            n_new[request] += 1
            reason = None
            if token in steps.config.eos_ids and not params[request].ignore_eos:
                reason = "stop"
            elif n_new[request] == max_new[request]:
                reason = "length"
            if reason:
                unfinished.discard(request)
            new.append(NewToken(request, token, reason))
        return new

    first_tokens_B, caches = _prefill_all(steps, weights, plan, prompts, None if greedy else rows)
    yield deliver(first_tokens_B)

    tokens = steps.put("replicated", first_tokens_B)
    positions = steps.put("tokens", np.array([0 if r is None else len(prompts[r]) for r in plan.rows], np.int32))
    row_params = None if greedy else steps.put_rows(rows)
    step = steps.decode(plan.batch, plan.cache_length, greedy=greedy)
    in_flight: collections.deque[jax.Array] = collections.deque()
    n_dispatched = 1
    while unfinished:
        while len(in_flight) < STEPS_IN_FLIGHT and n_dispatched < max(max_new[r] for r in unfinished):
            tokens, positions, caches = step(weights, caches, tokens, positions, row_params)
            tokens.copy_to_host_async()
            in_flight.append(tokens)
            n_dispatched += 1
        yield deliver(np.asarray(in_flight.popleft()))


def _prefill_all(
    steps: Steps,
    weights: XfmrWeights,
    plan: BatchPlan,
    prompts: Sequence[Sequence[int]],
    rows: RowParams | None,
) -> tuple[np.ndarray, tuple[KVCache, ...]]:
    """Prefills group after group. Returns every row's first new token and the caches."""
    data = steps.mesh.shape[DATA]
    per_shard = plan.batch // data
    caches = KVCache.new(steps.config, steps.mesh, plan.batch, plan.cache_length)
    outputs = []
    for group, length in enumerate(plan.group_lengths):
        first = group * plan.group_rows
        members = [shard * per_shard + first + i for shard in range(data) for i in range(plan.group_rows)]
        tokens = np.zeros((len(members), length), np.int32)
        lengths = np.ones(len(members), np.int32)
        for i, row in enumerate(members):
            if plan.rows[row] is not None:
                prompt = prompts[plan.rows[row]]
                tokens[i, : len(prompt)] = prompt
                lengths[i] = len(prompt)
        step = steps.prefill(len(members), length, plan.batch, plan.cache_length, greedy=rows is None)
        out, caches = step(
            weights,
            caches,
            steps.put("tokens", tokens),
            steps.put("tokens", lengths),
            steps.put("replicated", np.int32(first)),
            None if rows is None else steps.put_rows(RowParams(*(x[members] for x in rows))),
        )
        outputs.append((members, out))
    first_tokens_B = np.zeros(plan.batch, np.int32)
    for members, out in outputs:
        first_tokens_B[members] = np.asarray(out)
    return first_tokens_B, caches
