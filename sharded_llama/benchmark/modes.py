"""Each measurement on an engine that runs, as rows of results with their limits."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..engine.async_engine import AsyncEngine
from ..engine.engine import Engine
from ..sharding import DATA, MODEL
from . import limits, serving, single, workload
from .limits import Ceilings, Limit, ModelSize
from .peers import Peer, with_peer
from .settings import Settings
from .statistics import Summary, median
from .trace import requests_of
from .workload import Request, Rows, random_prompt

Row = dict[str, Any]
Report = Callable[[Row], None]

WARM_PROMPT = 32  # tokens of a prompt of the warm-up, and at most this many of its answer
SHIFT = 7919  # of a trace's ids from one run to the next


def size_of(engine: Engine) -> ModelSize | None:
    """What limits are computed from; None where guesses make steps that they do not describe."""
    if engine.options.num_speculative_tokens:
        return None
    return ModelSize.of(engine.config, engine.mesh.shape[MODEL], engine.options.kv_cache_dtype)


def warm_up(engine: Engine, rng: np.random.Generator) -> None:
    """A short run that loads the programs onto the devices: as many requests as may run, which end one by one."""
    slots, room = single.slots_of(engine), engine.max_model_len
    n_in = max(1, min(WARM_PROMPT, room // 2))
    requests = [
        Request(random_prompt(engine.config.vocab_size, n_in, rng), 1 + i % max(1, min(WARM_PROMPT, room - n_in)))
        for i in range(slots)
    ]
    serving.through_engine(engine, requests)


def latency(
    engine: Engine, settings: Settings, ceilings: Ceilings, peer: Peer | None, rng: np.random.Generator, report: Report
) -> None:
    """Decode steps at each batch, then the first token of one request on an idle engine."""
    size, data = size_of(engine), engine.mesh.shape[DATA]
    for batch in settings.batches or ():
        plan = single.plan_decode(engine.sizes, data, batch, settings.context, settings.steps, settings.rounds)
        theirs = [] if peer is None else [peer.decode_sampler(batch, settings.context, settings.steps)]
        with single.decode_sampler(engine, plan, rng) as sample:
            samples = single.interleaved(settings.rounds, [sample, *theirs])
        row: Row = {"what": "decode", "batch": batch, "context": float(np.mean(sample.contexts))}
        row |= {"ms": median(samples[0]), "samples": samples[0]}
        row["tokens_per_s"] = 1e3 * batch / row["ms"]
        if size is not None:
            work = limits.decode_work(size, -(-batch // data), row["context"])
            row |= _limited(row["ms"], limits.limit_of(work, ceilings), ceilings)
        report(_compared(row, settings, samples))
    report(_prompts(engine, Rows(1, settings.input_len), settings, ceilings, peer, rng, "ttft"))


def prefill(
    engine: Engine, settings: Settings, ceilings: Ceilings, peer: Peer | None, rng: np.random.Generator, report: Report
) -> None:
    """Prompts that are computed together, each of `settings.prefill`."""
    for rows in settings.prefill or ():
        report(_prompts(engine, rows, settings, ceilings, peer, rng, "prefill"))


def _prompts(
    engine: Engine,
    rows: Rows,
    settings: Settings,
    ceilings: Ceilings,
    peer: Peer | None,
    rng: np.random.Generator,
    what: str,
) -> Row:
    samplers = [lambda: single.prefill_ms(engine, rows, rng)]
    if peer is not None:
        samplers.append(lambda: peer.prefill_ms(*rows))
    for sampler in samplers:
        sampler()  # warms up
    samples = single.interleaved(settings.rounds, samplers, settings.rest_ms)
    row: Row = {"what": what, "rows": rows.rows, "tokens": rows.tokens, "ms": median(samples[0])}
    row |= {"samples": samples[0], "tokens_per_s": 1e3 * rows.rows * rows.tokens / row["ms"]}
    size, data = size_of(engine), engine.mesh.shape[DATA]
    if size is not None:
        steps = single.prefill_steps(engine.sizes, data, rows)
        work = limits.prefill_work(size, [rows.tokens] * -(-rows.rows // data), steps=steps)
        row |= _limited(row["ms"], limits.limit_of(work, ceilings), ceilings)
    return _compared(row, settings, samples)


def throughput(
    engine: Engine, settings: Settings, ceilings: Ceilings, peer: Peer | None, rng: np.random.Generator, report: Report
) -> None:
    """Every workload at every bound of requests under way."""
    through = AsyncEngine(engine) if settings.way == "async" else None
    try:
        for number, bound in enumerate(settings.bounds):
            for name, requests in _workloads(engine, settings, rng, number):
                if through is not None:
                    found = serving.run_async(through, requests, bound)
                else:
                    found = serving.run_engine(engine, requests, bound)
                row = _run_row(engine, name, requests, bound, serving.result_of(*found), ceilings)
                if peer is not None:
                    lengths = (row[field] for field in ("requests", "input_len", "output_len", "at_once"))
                    row = with_peer(row, settings.peer, [peer.generate_s(*lengths)])
                report(row)
    finally:
        if through is not None:
            through.shutdown()


def _workloads(
    engine: Engine, settings: Settings, rng: np.random.Generator, number: int
) -> Iterator[tuple[str, list[Request]]]:
    """Names and requests of run `number`, whose prompts no run before it had; one by one, as they are large."""
    vocab_size = engine.config.vocab_size

    def arriving(requests: list[Request]) -> list[Request]:
        return requests if settings.own_arrivals else workload.poisson(requests, settings.request_rate, rng)

    for lengths in settings.requests:
        yield str(lengths), arriving(workload.fixed(lengths, vocab_size, rng))
    if settings.trace is not None:
        yield "trace", arriving(requests_of(settings.trace, vocab_size, rng, shift=SHIFT * number))


def _run_row(
    engine: Engine,
    name: str,
    requests: Sequence[Request],
    bound: int | None,
    result: serving.RunResult,
    ceilings: Ceilings,
) -> Row:
    at_once = min(bound or len(requests), single.slots_of(engine), len(requests))
    row: Row = {"what": "throughput", "workload": name, "concurrency": bound, "at_once": at_once}
    row |= {"requests": result.requests, "seconds": result.seconds}
    row |= {"input_len": len(requests[0].prompt), "output_len": requests[0].n_out} if name != "trace" else {}
    for which, tokens in (
        ("output", result.output_tokens),
        ("input", result.input_tokens),
        ("total", result.input_tokens + result.output_tokens),
    ):
        row[f"{which}_tokens_per_s"] = tokens / result.seconds
    row["requests_per_s"] = result.requests / result.seconds
    for field in ("ttft", "tpot", "itl", "e2e"):
        summary: Summary | None = getattr(result, field)
        row[f"{field}_ms"] = None if summary is None else {k: 1e3 * v for k, v in summary._asdict().items()}
    row |= {"preemptions": result.preemptions, "cached_tokens": result.cached_tokens}
    size = size_of(engine)
    if size is not None:
        limit = limits.run_limit(
            size,
            [(len(r.prompt), r.n_out) for r in requests],
            ceilings,
            at_once=at_once,
            shards=engine.mesh.shape[DATA],
            cached_tokens=result.cached_tokens,
            last_arrival_s=max(r.arrival_s for r in requests),
        )
        row |= {"limit_s": limit.seconds, "share": limit.seconds / result.seconds}
        row["arithmetic"] = limit.arithmetic(ceilings)
    return row


def _limited(ms: float, limit: Limit, ceilings: Ceilings) -> Row:
    row: Row = {"limit_ms": 1e3 * limit.seconds, "share": 1e3 * limit.seconds / ms}
    row |= {"matmul_bound": limit.matmul_bound, "attention_bound": limit.attention_bound}
    return row | {"work": limit.work._asdict(), "arithmetic": limit.arithmetic(ceilings)}


def _compared(row: Row, settings: Settings, samples: Sequence[Sequence[float]]) -> Row:
    return row if len(samples) < 2 else with_peer(row, settings.peer, samples[1])
