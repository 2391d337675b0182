"""Times the engine on random weights: what it adds to its compiled steps, and what determinism and a full pool cost.

    python -m benchmarks.engine --config=configs/llama3_1_8b.py --mesh=data:1,model:1 --max_model_len=4096

The engine's options are the launchers' flags. `--parts` chooses among:

- overhead: milliseconds per decode step of the engine while `--batches` sequences decode, against the very work that
  it queued in the middle of that time, queued again and again; and where the engine's time went.
- pool: milliseconds per decode step of `--pool_batch` sequences while the prefix cache holds `--pool_tokens` tokens of
  earlier prompts, in a pool that has just the pages for them.
- deterministic: tokens per second of `--workload` with deterministic=True against without, and for both a needle: one
  prompt in changing company, whose tokens and log-probabilities are compared bit for bit with those it gets alone.
- throughput: tokens per second of `--requests`, through `LLM.generate`.
- startup: seconds of memory plan and compilation in two new processes, the first with an empty cache of executables.
- start: the same in this process, with the cache that is there.

With every engine goes the number of compilations after its start, which should be 0.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks import record
from launch import common, engine_flags
from sharded_llama.config import LlamaConfig
from sharded_llama.engine.compilation import CompileCounter
from sharded_llama.engine.engine import Engine, StepSeconds
from sharded_llama.engine.llm import LLM
from sharded_llama.engine.options import EngineOptions, Sizes, pages_per_sequence, sizes_of
from sharded_llama.engine.runner import Runner, Work
from sharded_llama.engine.steps import FROM_SLOT, Column
from sharded_llama.errors import ConfigError, EngineError
from sharded_llama.kv_cache import PAGE_SIZE
from sharded_llama.sampling import SamplingParams
from sharded_llama.sharding import DATA

ALL_PARTS = ("overhead", "pool", "deterministic", "throughput", "startup", "start")
PARTS = flags.DEFINE_list("parts", list(ALL_PARTS[:-1]), f"What to measure, among {', '.join(ALL_PARTS)}.")
BATCHES = flags.DEFINE_list("batches", ["64", "256"], "overhead: sequences that decode, over all data shards.")
PROMPT = flags.DEFINE_integer("prompt", 480, "overhead, pool: tokens of a prompt, give or take one half page.", 17)
STEPS = flags.DEFINE_integer("steps", 40, "overhead, pool: timed steps of the engine, twice.", 1)
POOL_BATCH = flags.DEFINE_integer("pool_batch", 64, "pool: sequences that decode, over all data shards.", 1)
POOL_TOKENS = flags.DEFINE_list("pool_tokens", ["10000", "100000"], "pool: cached tokens, one engine for each.")
WORKLOAD = flags.DEFINE_string("workload", "256x1000x200", "deterministic: requests, as NxINxOUT tokens.")
TRIALS = flags.DEFINE_integer("trials", 100, "deterministic: companies that the needle is put into.", 1, 100_000)
REQUESTS = flags.DEFINE_list("requests", ["256x1000x200"], "throughput: lists of requests, as NxINxOUT tokens each.")
NAME = flags.DEFINE_string("name", "engine", "Name of the result.")
OUT = flags.DEFINE_string("out", None, "Folder of the result; default: benchmarks/results.")
flags.mark_flag_as_required("config")

GUARD = 4  # steps before and after something is timed that are not
LARGEST = 1 << 24  # of any size that a flag gives
NEEDLE = {"prompt": 40, "answer": 16}  # tokens
COMPANY = {"requests": 128, "prompt": 48, "answer": 8}  # at most
STARTUP_SECONDS = 1800  # after which a process that starts is given up

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


@contextlib.contextmanager
def recorded(runner: Runner) -> Iterator[list[Work]]:
    """The last work with rows that the runner has executed, in a list of one."""
    last: list[Work] = []
    execute = runner.execute

    def keep(work: Work) -> Any:
        if work.shape is not None:
            last[:] = [work]
        return execute(work)

    runner.execute = keep
    try:
        yield last
    finally:
        del runner.execute  # the method is there again


@contextlib.contextmanager
def decoding(
    engine: Engine, batch: int, rng: np.random.Generator, params: Sequence[SamplingParams] | None = None
) -> Iterator[list[Work]]:
    """`batch` sequences after random prompts, all of them decoding; gives what `recorded` gives, and ends them after.

    params: of each sequence; default: greedy.

    Lengths of prompts differ by up to a page, so that the sequences need new pages at different steps, as they do in
    service. Raises ConfigError if the engine has fewer slots, EngineError if they never all decode together.
    """
    slots = engine.sizes.slots * engine.mesh.shape[DATA]
    if not 1 <= batch <= slots:
        raise ConfigError(f"a batch of {batch} does not fit the engine's {slots} slots: raise --max_num_seqs.")
    lengths = rng.integers(PROMPT.value - PAGE_SIZE // 2, PROMPT.value + PAGE_SIZE // 2, batch)
    params = params or [SamplingParams(temperature=0.0, max_tokens=engine.max_model_len, ignore_eos=True)] * batch
    for i, (length, of_sequence) in enumerate(zip(lengths, params, strict=True)):
        engine.add_request(f"decoding-{i}", random_prompt(engine.config, length, rng), of_sequence)
    with recorded(engine.runner) as last:
        while not last or int(live(last[0]).sum()) < batch or last[0].shape.n_blocks:
            step(engine)
            if not engine.has_unfinished:
                raise EngineError(f"{batch} sequences never decoded together: pages or --max_model_len are too few.")
        for _ in range(GUARD):
            step(engine)
        yield last
    for i in range(batch):
        engine.abort(f"decoding-{i}")
    while engine.has_unfinished:
        step(engine)


def live(work: Work) -> np.ndarray:
    """Which rows decode."""
    return (work.rows_RX[:, Column.LENGTH] == 1) & (work.rows_RX[:, Column.TOKEN] == FROM_SLOT)


def step(engine: Engine) -> None:
    for delta in engine.step():
        if delta.error:
            raise EngineError(delta.error)


def timed_steps(engine: Engine, n: int, n_tokens: int) -> tuple[float, StepSeconds]:
    """Seconds of `n` steps, and the engine's own account of them. Raises EngineError unless they bring `n_tokens`."""
    before, start = dataclasses.asdict(engine.seconds), time.perf_counter()
    for _ in range(n):
        step(engine)
    seconds = time.perf_counter() - start
    spent = StepSeconds(**{k: v - before[k] for k, v in dataclasses.asdict(engine.seconds).items()})
    if spent.new_tokens != n_tokens:
        raise EngineError(
            f"{n} timed steps brought {spent.new_tokens} tokens, not {n_tokens}: a sequence ended or was preempted; "
            "raise --max_model_len or lower the batch."
        )
    return seconds, spent


def overhead(llm: LLM, batch: int, rng: np.random.Generator) -> Row:
    """The engine's decode steps before and after a moment, and the work of that moment repeated. Times per token."""
    engine = llm.engine
    with decoding(engine, batch, rng) as last:
        n_steps = last[0].n_steps
        n_tokens = STEPS.value * batch * n_steps
        before = timed_steps(engine, STEPS.value, n_tokens)
        for _ in range(GUARD):
            step(engine)
        middle = last[0]
        bare = bare_seconds(engine.runner, middle)
        for _ in range(GUARD):
            step(engine)
        after = timed_steps(engine, STEPS.value, n_tokens)
    per_token = 1e3 / (2 * STEPS.value * n_steps)
    row = {"what": "overhead", "batch": batch, "steps_per_dispatch": n_steps}
    row["context"] = float(middle.rows_RX[live(middle), Column.START].mean() + 1 + (n_steps - 1) / 2)
    row["bare_ms"] = 1e3 * bare / n_steps
    row["engine_ms"] = per_token * (before[0] + after[0])
    row["engine_over_bare"] = row["engine_ms"] / row["bare_ms"]
    for name in ("plan_s", "dispatch_s", "wait_s"):
        row[name.replace("_s", "_ms")] = per_token * (getattr(before[1], name) + getattr(after[1], name))
    return row


def bare_seconds(runner: Runner, work: Work) -> float:
    """Seconds of one execution of a work's rows, the median over three rounds of STEPS queued ones."""
    work = work._replace(tables_U3=None, copies_C2=None)
    rounds = []
    for _ in range(4):  # the first round warms up
        jax.block_until_ready(runner.state)
        start = time.perf_counter()
        for _ in range(STEPS.value):
            runner.execute(work)
        jax.block_until_ready(runner.state)
        rounds.append((time.perf_counter() - start) / STEPS.value)
    return float(np.median(rounds[1:]))


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
                seconds, _ = timed_steps(llm.engine, 2 * STEPS.value, 2 * STEPS.value * batch * n_steps)
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
    blocks = batch * -(-(PROMPT.value + PAGE_SIZE) // sizes.block)
    blocks_per_step = max(1, min(sizes.max_blocks, (sizes.max_tokens - batch) // sizes.block))
    # Every chunk may leave a part of a block unused, and the engine is one dispatch ahead.
    prefill_steps = -(-blocks // blocks_per_step) + batch
    return prefill_steps + sizes.decode_steps * (2 * STEPS.value + 2 * GUARD)


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
    n, n_in, n_out = parse_requests(requests)
    if n_in + n_out > llm.engine.max_model_len:
        raise ConfigError(f"{requests}: {n_in} + {n_out} tokens are beyond max_model_len={llm.engine.max_model_len}.")
    llm.generate([random_prompt(llm.config, n_in, rng)], temperature=0.0, max_tokens=2)  # the first run loads programs
    prompts = [random_prompt(llm.config, n_in, rng) for _ in range(n)]
    before = llm.engine.stats()
    start = time.perf_counter()
    outputs = llm.generate(prompts, temperature=0.0, max_tokens=n_out)
    seconds = time.perf_counter() - start
    if any(len(o.outputs[0].token_ids) != n_out for o in outputs):
        raise EngineError(f"{requests}: an answer does not have {n_out} tokens.")
    after = llm.engine.stats()
    row = {"requests": requests, "seconds": seconds}
    row |= {"output_tokens_per_s": n * n_out / seconds, "input_tokens_per_s": n * n_in / seconds}
    for name in ("steps", "plan_s", "dispatch_s", "wait_s"):
        row[name] = getattr(after.seconds, name) - getattr(before.seconds, name)
    row["preemptions"] = after.scheduler.preemptions - before.scheduler.preemptions
    return row


# Starting


def start_engine(model: LLM) -> Row:
    """Seconds until everything is compiled; the weights are there already."""
    llm = model.resized(**engine_flags.engine_options())
    jax.block_until_ready(model.weights)
    start = time.perf_counter()
    engine = llm.engine
    made = time.perf_counter()
    engine.compile(progress=False)
    compiled = time.perf_counter()
    row = {"what": "start", "plan_and_cache_s": made - start, "compile_s": compiled - made, "total_s": compiled - start}
    row["executables"] = engine.stats().n_compiled
    llm.shutdown()
    return row


def start_new_processes() -> list[Row]:
    """`start_engine` with a fresh cache of executables, and with what that left. This process must not hold devices."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"XDG_CACHE_HOME": folder}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # it would win
        for name in ("cold", "warm"):
            command = [sys.executable, "-m", "benchmarks.engine", *sys.argv[1:]]
            command += ["--parts=start", f"--out={folder}", f"--name={name}"]
            status = subprocess.run(command, env=environment, check=False, timeout=STARTUP_SECONDS).returncode
            if status:
                raise EngineError(f"the {name} start ended with status {status}; its messages are above.")
            (row,) = json.loads((Path(folder) / f"{name}.json").read_text())["results"]
            rows.append(row | {"what": "startup", "cache": name})
    return rows


# What the flags say


def random_prompt(config: LlamaConfig, length: int, rng: np.random.Generator) -> list[int]:
    return rng.integers(0, config.vocab_size, int(length)).tolist()


def bounded(size: int, what: str) -> int:
    if not 1 <= size <= LARGEST:
        raise ConfigError(f"{what}: {size} must be from 1 to {LARGEST}.")
    return size


def parse_requests(text: str) -> tuple[int, int, int]:
    """NxINxOUT. Raises ConfigError for anything else."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and len(part) < 9 for part in parts):
        raise ConfigError(f"{text!r} is not NxINxOUT, such as 256x1000x200.")
    n, n_in, n_out = (bounded(int(part), text) for part in parts)
    return n, n_in, n_out


def check_flags() -> None:
    """Raises ConfigError for a wrong flag before anything is measured."""
    unknown = sorted(set(PARTS.value) - set(ALL_PARTS))
    if unknown or not PARTS.value:
        raise ConfigError(f"--parts={','.join(unknown)}: choose among {', '.join(ALL_PARTS)}.")
    for requests in (WORKLOAD.value, *REQUESTS.value):
        parse_requests(requests)
    for name, sizes in (("--batches", BATCHES.value), ("--pool_tokens", POOL_TOKENS.value)):
        if not all(size.isdigit() and len(size) < 9 and int(size) for size in sizes):
            raise ConfigError(f"{name}={','.join(sizes)}: expected whole numbers above 0, such as 64,256.")


def random_model(**changes: Any) -> LLM:
    """The model that the flags say, with random weights; `changes` are to its config."""
    config = LlamaConfig.from_dict(common.CONFIG.value.model)
    config = config.replace(dtype=common.DTYPE.value or config.dtype, **changes)
    return LLM.random(config, common.choose_mesh(config), attention=common.ATTENTION.value, progress=False)


def save(model: LLM, results: list[Row]) -> None:
    """Writes the result and prints where."""
    workload = {
        "config": dataclasses.asdict(model.config),
        "mesh": dict(model.mesh.shape),
        "backend": model.backend,
        "engine": engine_flags.engine_options(),
        "prompt": PROMPT.value,
    }
    print(record.save(NAME.value, model.mesh, workload, results, OUT.value))


def main() -> None:
    check_flags()
    results: list[Row] = []
    parts = set(PARTS.value)
    if "startup" in parts:
        for row in start_new_processes():
            report(results, row)
    model = random_model(eos_ids=())  # nothing ends an answer early
    rng = np.random.default_rng(0)
    if "start" in parts:
        report(results, start_engine(model))
    if parts & {"overhead", "throughput"}:
        with serving(model, results, "overhead and throughput") as llm:
            for batch in map(int, BATCHES.value if "overhead" in parts else ()):
                report(results, overhead(llm, batch, rng))
            for requests in REQUESTS.value if "throughput" in parts else ():
                report(results, {"what": "throughput"} | throughput(llm, requests, rng))
    if "pool" in parts:
        pool(model, results, rng)
    if "deterministic" in parts:
        deterministic(model, results, rng)
    save(model, results)


if __name__ == "__main__":
    common.run(main)
