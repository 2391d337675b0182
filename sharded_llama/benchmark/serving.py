"""A run of requests through the engine, and when each token came.

Two ways in: `through_async`, a client of `AsyncEngine` with a task for every request, as a server has them; and
`through_engine`, which steps the engine itself and so has nothing between it and the tokens. Latencies count from when
a request is sent: when it arrives, or later where `max_concurrency` others are under way.
"""

import asyncio
import collections
import contextlib
import itertools
import time
from collections.abc import Sequence
from typing import NamedTuple

from ..engine.async_engine import AsyncEngine
from ..engine.engine import Engine, EngineStats
from ..errors import EngineError
from .statistics import Summary, summarise
from .steady import greedy
from .workload import Request

LONGEST_NAP = 0.05  # seconds that an idle engine waits before it looks for arrivals again


class Served(NamedTuple):
    """When one request was sent, and its tokens came, in seconds after the start of the run."""

    sent: float
    arrivals: list[tuple[float, int]]  # (when, how many tokens), as they were delivered
    n_in: int
    n_out: int  # asked for

    @property
    def first_token_s(self) -> float:
        return self.arrivals[0][0] - self.sent

    @property
    def end_to_end_s(self) -> float:
        return self.arrivals[-1][0] - self.sent

    @property
    def per_token_s(self) -> float | None:
        """Seconds of each token after the first; None of answers of one token."""
        if self.n_out < 2:
            return None
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / (self.n_out - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between one delivery and the next."""
        times = [at for at, _ in self.arrivals]
        return [b - a for a, b in itertools.pairwise(times)]


class RunResult(NamedTuple):
    """What came of a run. Times in seconds, rates per second."""

    seconds: float  # from the start to the last token
    requests: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int  # of the prompts, found in the prefix cache
    preemptions: int
    ttft: Summary | None
    tpot: Summary | None
    itl: Summary | None
    e2e: Summary | None


async def through_async(
    engine: AsyncEngine, requests: Sequence[Request], max_concurrency: int | None = None
) -> list[Served]:
    """Sends the requests as they arrive. Raises EngineError when an answer ends otherwise than at its full length."""
    free = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
    start = time.perf_counter()

    async def one(number: int, request: Request) -> Served:
        await asyncio.sleep(max(0.0, start + request.arrival_s - time.perf_counter()))
        async with free:
            sent, arrivals = time.perf_counter() - start, []
            stream = engine.generate(f"run-{number}", request.prompt, greedy(request.n_out))
            async with contextlib.aclosing(stream) as deltas:
                async for delta in deltas:
                    if delta.error:
                        raise EngineError(delta.error)
                    if delta.token_ids:
                        arrivals.append((time.perf_counter() - start, len(delta.token_ids)))
        return _checked(Served(sent, arrivals, len(request.prompt), request.n_out), number)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(number, request)) for number, request in enumerate(requests)]
    return [task.result() for task in tasks]


def run_async(
    engine: AsyncEngine, requests: Sequence[Request], max_concurrency: int | None = None
) -> tuple[list[Served], EngineStats, EngineStats]:
    """`through_async` in an event loop of its own, with the engine's statistics before and after."""

    async def run() -> tuple[list[Served], EngineStats, EngineStats]:
        before = await engine.stats()
        served = await through_async(engine, requests, max_concurrency)
        return served, before, await engine.stats()

    try:
        return asyncio.run(run())
    except* EngineError as errors:
        raise _first(errors) from None


def through_engine(engine: Engine, requests: Sequence[Request], max_concurrency: int | None = None) -> list[Served]:
    """Steps the engine until all requests have ended. Raises EngineError when one ends otherwise than in full."""
    waiting = collections.deque(sorted(enumerate(requests), key=lambda item: item[1].arrival_s))
    sent: dict[str, tuple[int, float, list[tuple[float, int]]]] = {}
    served: dict[int, Served] = {}
    free = collections.deque([0.0] * min(max_concurrency or len(requests), len(requests)))  # since when, of each place
    start = time.perf_counter()
    while waiting or sent:
        while waiting and free and waiting[0][1].arrival_s <= time.perf_counter() - start:
            number, request = waiting.popleft()
            # What came, or could have gone on, during a step is counted from then.
            at = max(request.arrival_s, free.popleft())
            engine.add_request(f"run-{number}", request.prompt, greedy(request.n_out))
            sent[f"run-{number}"] = number, at, []
        if not sent:
            time.sleep(min(LONGEST_NAP, max(0.0, waiting[0][1].arrival_s - (time.perf_counter() - start))))
            continue
        for delta in engine.step():
            if delta.error:
                raise EngineError(delta.error)
            number, at, arrivals = sent[delta.request_id]
            if delta.token_ids:
                arrivals.append((time.perf_counter() - start, len(delta.token_ids)))
            if delta.finish_reason is not None:
                request = requests[number]
                served[number] = _checked(Served(at, arrivals, len(request.prompt), request.n_out), number)
                del sent[delta.request_id]
                free.append(time.perf_counter() - start)
    while engine.has_unfinished:  # a step that was queued ahead
        engine.step()
    return [served[number] for number in range(len(requests))]


def run_engine(
    engine: Engine, requests: Sequence[Request], max_concurrency: int | None = None
) -> tuple[list[Served], EngineStats, EngineStats]:
    """`through_engine`, with the engine's statistics before and after."""
    before = engine.stats()
    served = through_engine(engine, requests, max_concurrency)
    return served, before, engine.stats()


def result_of(served: Sequence[Served], before: EngineStats, after: EngineStats) -> RunResult:
    """What users ask of a run. TTFT: to the first token. TPOT: of each token after it, a mean for each request.

    ITL: from one delivery of a request to its next, of all requests together. E2E: to the last token.
    """
    return RunResult(
        seconds=max(s.arrivals[-1][0] for s in served),
        requests=len(served),
        input_tokens=sum(s.n_in for s in served),
        output_tokens=sum(s.n_out for s in served),
        cached_tokens=after.scheduler.cached_tokens - before.scheduler.cached_tokens,
        preemptions=after.scheduler.preemptions - before.scheduler.preemptions,
        ttft=summarise([s.first_token_s for s in served]),
        tpot=summarise([s.per_token_s for s in served if s.per_token_s is not None]),
        itl=summarise([gap for s in served for gap in s.gaps_s]),
        e2e=summarise([s.end_to_end_s for s in served]),
    )


def _checked(served: Served, number: int) -> Served:
    found = sum(n for _, n in served.arrivals)
    if found != served.n_out:
        raise EngineError(f"request {number} was to have {served.n_out} tokens and has {found}.")
    return served


def _first(errors: BaseExceptionGroup) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
