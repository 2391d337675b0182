"""Times the engine on random weights: what it adds to its compiled steps, and what determinism and a full pool cost.

    python -m benchmarks.engine --config=configs/llama3_1_8b.py --mesh=data:1,model:1 --max_model_len=4096

The engine's options are the launchers' flags. `--parts` chooses among:

- overhead: milliseconds per decode step of the engine while `--batches` sequences decode, against the very work that
  it queued in the middle of that time, queued again and again; and where the engine's time went.
- pool: milliseconds per decode step of `--pool_batch` sequences while the prefix cache holds `--pool_tokens` tokens of
  earlier prompts, in a pool that has just the pages for them.
- deterministic: tokens per second of `--workload` with deterministic=True against without, and for both a needle: one
  prompt in changing company, whose tokens and log-probabilities are compared bit for bit with those it gets alone.

Throughput, latency and the time of a start are what `launch.benchmark` measures. With every engine goes the number of
compilations after its start, which should be 0.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from absl import flags

from launch import common, engine_flags
from sharded_llama.benchmark import record, steady, workload
from sharded_llama.benchmark.serving import result_of, run_engine, through_engine
from sharded_llama.benchmark.workload import bounded, fixed, parse_lengths, parse_sizes
from sharded_llama.config import LlamaConfig
from sharded_llama.engine.compilation import CompileCounter
from sharded_llama.engine.engine import Engine
from sharded_llama.engine.llm import LLM
from sharded_llama.engine.options import EngineOptions, Sizes, pages_per_sequence, sizes_of
from sharded_llama.engine.runner import Runner, Work
from sharded_llama.engine.steps import Column
from sharded_llama.errors import ConfigError
from sharded_llama.kv_cache import PAGE_SIZE
from sharded_llama.sampling import SamplingParams
from sharded_llama.sharding import DATA

ALL_PARTS = ("overhead", "pool", "deterministic")
PARTS = flags.DEFINE_list("parts", list(ALL_PARTS), f"What to measure, among {', '.join(ALL_PARTS)}.")
BATCHES = flags.DEFINE_list("batches", ["64", "256"], "overhead: sequences that decode, over all data shards.")
PROMPT = flags.DEFINE_integer("prompt", 480, "overhead, pool: tokens of a prompt, give or take one half page.", 17)
STEPS = flags.DEFINE_integer("steps", 40, "overhead, pool: timed steps of the engine, twice.", 1)
POOL_BATCH = flags.DEFINE_integer("pool_batch", 64, "pool: sequences that decode, over all data shards.", 1)
POOL_TOKENS = flags.DEFINE_list("pool_tokens", ["10000", "100000"], "pool: cached tokens, one engine for each.")
WORKLOAD = flags.DEFINE_string("workload", "256x1000x200", "deterministic: requests, as NxINxOUT tokens.")
TRIALS = flags.DEFINE_integer("trials", 100, "deterministic: companies that the needle is put into.", 1, 100_000)
NAME = flags.DEFINE_string("name", "engine", "Name of the result.")
OUT = flags.DEFINE_string("out", "benchmarks/results", "Folder of the result.")
flags.mark_flag_as_required("config")

NEEDLE = {"prompt": 40, "answer": 16}  # tokens
COMPANY = {"requests": 128, "prompt": 48, "answer": 8}  # at most

Row = dict[str, Any]


@contextlib.contextmanager
def serving(model: LLM, results: list[Row], part: str, **options: Any) -> Iterator[LLM]:
    """An engine of its own for `model` with all its steps compiled; afterwards reports what was compiled after all."""
    llm = model.resized(**engine_flags.engine_options() | options)
    llm.start()
    counter = CompileCounter()
    try:
        yield llm
        report(results, {"what": "compilations after start", "of": part, **options, "count": counter.count})
    finally:
        llm.shutdown()


def report(results: list[Row], row: Row) -> None:
    print(json.dumps(row), flush=True)
    results.append(row)


# Steady decoding


def decoding(
    engine: Engine, batch: int, rng: np.random.Generator, params: Sequence[SamplingParams] | None = None
) -> AbstractContextManager[list[Work]]:
    """`steady.decoding` behind --prompt: gives the last work that was executed, in a list of one."""
    return _last(steady.decoding(engine, batch, PROMPT.value, rng, params))


@contextlib.contextmanager
def _last(decoding: AbstractContextManager[steady.Decoding]) -> Iterator[list[Work]]:
    with decoding as found:
        yield found.last


def bare_seconds(runner: Runner, work: Work) -> float:
    """`steady.bare_seconds` of --steps."""
    return steady.bare_seconds(runner, work, STEPS.value)


def overhead(llm: LLM, batch: int, rng: np.random.Generator) -> Row:
    """The engine's decode steps before and after a moment, and the work of that moment repeated. Times per token."""
    engine = llm.engine
    with decoding(engine, batch, rng) as last:
        n_steps = last[0].n_steps
        n_tokens = STEPS.value * batch * n_steps
        before = steady.timed_steps(engine, STEPS.value, n_tokens)
        for _ in range(steady.GUARD):
            steady.step(engine)
        middle = last[0]
        bare = bare_seconds(engine.runner, middle)
        for _ in range(steady.GUARD):
            steady.step(engine)
        after = steady.timed_steps(engine, STEPS.value, n_tokens)
    per_token = 1e3 / (2 * STEPS.value * n_steps)
    row = {"what": "overhead", "batch": batch, "steps_per_dispatch": n_steps}
    row["context"] = float(middle.rows_RX[steady.live(middle), Column.START].mean() + 1 + (n_steps - 1) / 2)
    row["bare_ms"] = 1e3 * bare / n_steps
    row["engine_ms"] = per_token * (before[0] + after[0])
    row["engine_over_bare"] = row["engine_ms"] / row["bare_ms"]
    for name in ("plan_s", "dispatch_s", "wait_s"):
        row[name.replace("_s", "_ms")] = per_token * (getattr(before[1], name) + getattr(after[1], name))
    return row


# A full pool


def pool(model: LLM, results: list[Row], rng: np.random.Generator) -> None:
    """The same decoding beside few and beside many cached tokens, each in an engine whose pool is made for it."""
    data, batch = model.mesh.shape[DATA], POOL_BATCH.value
    options = EngineOptions.make(**engine_flags.engine_options() | {"max_num_seqs": batch})
    longest = PROMPT.value + PAGE_SIZE // 2 + room_to_decode(sizes_of(options, model.mesh), -(-batch // data))
    longest = min(longest, options.max_model_len or model.config.max_seq_len)
    of_prompt = PROMPT.value // PAGE_SIZE  # full pages
    rows: list[Row] = []
    for wanted in map(int, POOL_TOKENS.value):
        n_prompts = -(-bounded(wanted, "--pool_tokens") // (of_prompt * PAGE_SIZE))
        # A running prompt takes one page beyond its full ones.
        n_pages = -(-n_prompts // data) * (of_prompt + 1) + -(-batch // data) * pages_per_sequence(longest)
        sizes = {"num_pages": n_pages, "max_model_len": longest, "max_num_seqs": batch}
        with serving(model, results, "pool", **sizes, enable_prefix_caching=True) as llm:
            prompts = [random_prompt(model.config, of_prompt * PAGE_SIZE + 1, rng) for _ in range(n_prompts)]
            llm.generate(prompts, temperature=0.0, max_tokens=1)
            with decoding(llm.engine, batch, rng) as last:
                n_steps = last[0].n_steps
                seconds, _ = steady.timed_steps(llm.engine, 2 * STEPS.value, 2 * STEPS.value * batch * n_steps)
            known = llm.engine.stats().scheduler.cached_tokens
            llm.generate(prompts, temperature=0.0, max_tokens=1)
            # What the earlier prompts find now is what was cached while the steps were timed.
            cached = llm.engine.stats().scheduler.cached_tokens - known
            ms = 1e3 * seconds / (2 * STEPS.value * n_steps)
            rows.append({"what": "pool", "batch": batch, "pages": n_pages, "cached_tokens": cached, "engine_ms": ms})
            report(results, rows[-1])
    if len(rows) > 1:
        report(results, {"what": "pool", "last_over_first": rows[-1]["engine_ms"] / rows[0]["engine_ms"]})


def room_to_decode(sizes: Sizes, batch: int) -> int:
    """Tokens that a sequence generates at most before `batch` of a shard decode and have been timed."""
    _, most = steady.steps_before(sizes, batch, PROMPT.value)
    return most + sizes.decode_steps * (2 * STEPS.value + 2 * steady.GUARD)


# Determinism, throughput


def deterministic(model: LLM, results: list[Row], rng: np.random.Generator) -> None:
    """Without prefix caching: the needle's prompt is to be computed anew in every company."""
    rows = []
    for mode in (False, True):
        options = {"deterministic": mode, "enable_prefix_caching": False}
        options |= {"decode_steps": None} if mode else {}
        with serving(model, results, "deterministic", **options) as llm:
            row = {"what": "deterministic", "deterministic": mode}
            rows.append(row | throughput(llm, WORKLOAD.value, rng) | needle(llm, rng))
            report(results, rows[-1])
    slower, faster = rows[1]["output_tokens_per_s"], rows[0]["output_tokens_per_s"]
    report(results, {"what": "deterministic", "cost_percent": 100 * (1 - slower / faster)})


def needle(llm: LLM, rng: np.random.Generator) -> Row:
    """One greedy prompt among others at a random place, TRIALS times: how often its answer is not what it is alone."""
    prompt = random_prompt(llm.config, NEEDLE["prompt"], rng)
    params = SamplingParams(temperature=0.0, max_tokens=NEEDLE["answer"], ignore_eos=True, logprobs=0)
    tokens, logprobs = answer(llm, [prompt], [params], 0)
    differing = differing_tokens = 0
    for _ in range(TRIALS.value):
        n = int(rng.integers(1, COMPANY["requests"] + 1))
        prompts = [random_prompt(llm.config, rng.integers(1, COMPANY["prompt"] + 1), rng) for _ in range(n)]
        others = [
            SamplingParams(
                # Sampled ones too: with them a step runs another program than with greedy ones alone.
                temperature=float(rng.integers(0, 2)),
                max_tokens=int(rng.integers(1, COMPANY["answer"] + 1)),
                ignore_eos=True,
            )
            for _ in range(n)
        ]
        at = int(rng.integers(0, n + 1))
        found = answer(llm, [*prompts[:at], prompt, *prompts[at:]], [*others[:at], params, *others[at:]], at)
        differing += found != (tokens, logprobs)
        differing_tokens += found[0] != tokens
    return {"trials": TRIALS.value, "differing": differing, "differing_tokens": differing_tokens}


def answer(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams], at: int
) -> tuple[tuple[int, ...], list[float]]:
    """Tokens of one of the prompts' answers, and their log-probabilities with all their bits."""
    output = llm.generate(prompts, params)[at].outputs[0]
    return output.token_ids, [of[token].logprob for token, of in zip(output.token_ids, output.logprobs, strict=True)]


def throughput(llm: LLM, requests: str, rng: np.random.Generator) -> Row:
    """Tokens per second from NxINxOUT: prompts in at the start to the last answer out. Greedy; no two prompts alike."""
    lengths = parse_lengths(requests, "--workload")
    if lengths.n_in + lengths.n_out > llm.engine.max_model_len:
        raise ConfigError(
            f"{requests}: {lengths.n_in} + {lengths.n_out} tokens are beyond max_model_len={llm.engine.max_model_len}."
        )
    vocab_size = llm.config.vocab_size
    through_engine(llm.engine, fixed(lengths._replace(n=1, n_out=2), vocab_size, rng))  # loads programs
    served, before, after = run_engine(llm.engine, fixed(lengths, vocab_size, rng))
    result = result_of(served, before, after)
    row = {"requests": requests, "seconds": result.seconds}
    row |= {"output_tokens_per_s": result.output_tokens / result.seconds}
    row |= {"input_tokens_per_s": result.input_tokens / result.seconds}
    for name in ("steps", "plan_s", "dispatch_s", "wait_s"):
        row[name] = getattr(after.seconds, name) - getattr(before.seconds, name)
    return row | {"preemptions": result.preemptions}


# What the flags say


def random_prompt(config: LlamaConfig, length: int, rng: np.random.Generator) -> list[int]:
    return workload.random_prompt(config.vocab_size, length, rng)


def check_flags() -> None:
    """Raises ConfigError for a wrong flag before anything is measured."""
    unknown = sorted(set(PARTS.value) - set(ALL_PARTS))
    if unknown or not PARTS.value:
        raise ConfigError(f"--parts={','.join(unknown)}: choose among {', '.join(ALL_PARTS)}.")
    parse_lengths(WORKLOAD.value, "--workload")
    parse_sizes(BATCHES.value, "--batches")
    parse_sizes(POOL_TOKENS.value, "--pool_tokens")


def random_model(**changes: Any) -> LLM:
    """The model that the flags say, with random weights; `changes` are to its config."""
    config = LlamaConfig.from_dict(common.CONFIG.value.model)
    config = config.replace(dtype=common.DTYPE.value or config.dtype, **changes)
    return LLM.random(config, common.choose_mesh(config), attention=common.ATTENTION.value, progress=False)


def save(model: LLM, results: list[Row]) -> None:
    """Writes the result and prints where."""
    asked = {
        "config": dataclasses.asdict(model.config),
        "mesh": dict(model.mesh.shape),
        "backend": model.backend,
        "engine": engine_flags.engine_options(),
        "prompt": PROMPT.value,
    }
    print(record.save(NAME.value, record.device_of(model.mesh), asked, results, OUT.value))


def main() -> None:
    check_flags()
    results: list[Row] = []
    parts = set(PARTS.value)
    model = random_model(eos_ids=())  # nothing ends an answer early
    rng = np.random.default_rng(0)
    if "overhead" in parts:
        with serving(model, results, "overhead") as llm:
            for batch in map(int, BATCHES.value):
                report(results, overhead(llm, batch, rng))
    if "pool" in parts:
        pool(model, results, rng)
    if "deterministic" in parts:
        deterministic(model, results, rng)
    save(model, results)


if __name__ == "__main__":
    common.run(main)
