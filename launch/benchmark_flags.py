"""The flags that say what the benchmark measures, and which of them go together."""

import math

import jax
from absl import flags

from sharded_llama.benchmark import plot, record
from sharded_llama.benchmark.peers import check_installed
from sharded_llama.benchmark.settings import MODES, PEER_MODES, PEERS, WAYS, Settings
from sharded_llama.benchmark.trace import MAX_LINES, Trace, read_trace
from sharded_llama.benchmark.workload import MAX_ITEMS, check_rate, parse_lengths, parse_rows, parse_sizes
from sharded_llama.errors import ConfigError

from . import common, engine_flags

MODE = flags.DEFINE_enum("mode", None, MODES, "What to measure; see above.")
RANDOM_WEIGHTS = flags.DEFINE_bool("random_weights", False, "Random weights of --config's model: needs no checkpoint.")
NAME = flags.DEFINE_string("name", None, "Name of the result's files. Default: the mode.")
OUT = flags.DEFINE_string("out", "benchmarks_out", "Folder of the result and the picture.")
PICTURE = flags.DEFINE_bool("picture", True, "Draw the result; needs matplotlib.")
SEED = flags.DEFINE_integer("benchmark_seed", 0, "Seed of random weights, prompts and arrivals.", 0, 2**32 - 1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "latency, prefill, load: times that everything is measured.", 1, 1000)
BATCHES = flags.DEFINE_list(
    "batches", None, "latency: sequences that decode together. Default: 1,8,64,256 if they fit."
)
CONTEXT = flags.DEFINE_integer("context", None, "latency: cached tokens of each sequence. Default: 512.", 1, 1 << 24)
STEPS = flags.DEFINE_integer("steps", 32, "latency: decode steps of a round.", 1, 100_000)
INPUT_LEN = flags.DEFINE_integer("input_len", None, "latency: tokens of the prompt of TTFT.", 1, 1 << 24)
REQUESTS = flags.DEFINE_list("requests", None, "throughput: workloads as NxINxOUT tokens, such as 256x1000x1000.")
TRACE = flags.DEFINE_string("trace", None, "throughput: a .jsonl file of requests; see docs/benchmarking.md.")
NUM_REQUESTS = flags.DEFINE_integer("num_requests", None, "throughput: first requests of --trace.", 1, MAX_LINES)
SKIP_LONG = flags.DEFINE_bool("skip_long", False, "throughput: leave out what of --trace max_model_len cannot hold.")
ARRIVAL = flags.DEFINE_enum("arrival", "all", ("all", "trace"), "throughput: all at once, or the trace's own times.")
REQUEST_RATE = flags.DEFINE_float("request_rate", math.inf, "throughput: requests per second on average (Poisson).")
MAX_CONCURRENCY = flags.DEFINE_integer("max_concurrency", None, "throughput: most requests under way.", 1, 1_000_000)
CONCURRENCIES = flags.DEFINE_list("concurrencies", None, "throughput: a run for each --max_concurrency of these.")
THROUGH = flags.DEFINE_enum("through", "async", WAYS, "throughput: AsyncEngine, as servers do, or the bare engine.")
PREFILL = flags.DEFINE_list("prefill", None, "prefill: prompts as ROWSxTOKENS. Default: 1x2048,8x2048 if they fit.")
REST = flags.DEFINE_integer(
    "rest_ms", 0, "prefill: rest before each time; a GPU that has just worked runs at its power limit.", 0, 60_000
)
PEER = flags.DEFINE_enum("peer", None, PEERS, "Run the same through transformers (hf) or vLLM, too.")
PEER_WEIGHTS = flags.DEFINE_string(
    "peer_weights", None, "Write the weights to this new folder for a peer; --peer does so itself where it has to."
)

OF_MODE = {
    "latency": (BATCHES, CONTEXT, STEPS, INPUT_LEN),
    "throughput": (
        *(REQUESTS, TRACE, NUM_REQUESTS, SKIP_LONG, ARRIVAL, REQUEST_RATE),
        *(MAX_CONCURRENCY, CONCURRENCIES, THROUGH),
    ),
    "prefill": (PREFILL, REST),
}
CONTRADICTIONS = (
    (TRACE, REQUESTS, "say one workload"),
    (CONCURRENCIES, MAX_CONCURRENCY, "--concurrencies gives the bounds"),
    (CONCURRENCIES, REQUEST_RATE, "a sweep of bounds sends requests as fast as it may"),
    (CONCURRENCIES, ARRIVAL, "a sweep of bounds sends requests as fast as it may"),
    (ARRIVAL, REQUEST_RATE, "say one way to arrive"),
    (RANDOM_WEIGHTS, common.CHECKPOINT, "say where the weights come from once"),
)
PEER_VERSIONS = {"hf": ("torch", "transformers"), "vllm": ("vllm",)}
NEEDS_TRACE = (NUM_REQUESTS, SKIP_LONG, ARRIVAL)


def read_settings() -> Settings:
    """What the flags ask for, with the trace read. Raises ConfigError or RequestError for flags that cannot be."""
    check_flags()
    lengths = tuple(parse_lengths(text) for text in _listed(REQUESTS))
    prefill = tuple(parse_rows(text) for text in _listed(PREFILL)) or None
    return Settings(
        mode=MODE.value,
        batches=_sizes(BATCHES) or None,
        context=CONTEXT.value,
        input_len=INPUT_LEN.value,
        steps=STEPS.value,
        rounds=ROUNDS.value,
        requests=lengths,
        trace=_trace(),
        own_arrivals=ARRIVAL.value == "trace",
        request_rate=REQUEST_RATE.value,
        max_concurrency=MAX_CONCURRENCY.value,
        concurrencies=_sizes(CONCURRENCIES),
        way=THROUGH.value,
        prefill=prefill,
        rest_ms=REST.value,
        peer=PEER.value,
        seed=SEED.value,
    )


def check_flags() -> None:
    """Raises ConfigError for flags that are wrong by themselves or together, and for packages that are missing."""
    mode = MODE.value
    if mode is None:
        raise ConfigError(f"say what to measure: --mode={'|'.join(MODES)}.")
    for of_mode, its_flags in OF_MODE.items():
        for flag in its_flags:
            if flag.present and of_mode != mode:
                raise ConfigError(f"--{flag.name} belongs to --mode={of_mode}, not to --mode={mode}.")
    for one, other, why in CONTRADICTIONS:
        if one.present and other.present:
            raise ConfigError(f"--{one.name} and --{other.name} cannot be given together: {why}.")
    for flag in NEEDS_TRACE:
        if flag.present and TRACE.value is None:
            raise ConfigError(f"--{flag.name} belongs to --trace=FILE.")
    if mode == "throughput" and TRACE.value is None and not REQUESTS.value:
        raise ConfigError("a throughput needs --requests=NxINxOUT, such as 256x1000x1000, or --trace=FILE.")
    for flag in (common.COORDINATOR, common.NUM_PROCESSES, common.PROCESS_ID):
        if flag.value is not None:
            raise ConfigError(f"the benchmark runs in one process: leave --{flag.name} out.")
    check_rate(REQUEST_RATE.value)
    _check_model(mode)
    if PEER.value is not None:
        _check_peer(PEER.value, mode)
    record.check_place(name(), OUT.value)
    if PICTURE.value:
        plot.check_matplotlib()


def name() -> str:
    return MODE.value if NAME.value is None else NAME.value


def _check_model(mode: str) -> None:
    if RANDOM_WEIGHTS.value and common.CONFIG.value is None:
        raise ConfigError(
            "--random_weights needs a model: give --config=FILE, such as --config=configs/llama3_1_8b.py."
        )
    if mode == "load" and (RANDOM_WEIGHTS.value or not common.CHECKPOINT.value):
        raise ConfigError("--mode=load reads a checkpoint: give --checkpoint=FOLDER, without --random_weights.")


def _check_peer(peer: str, mode: str) -> None:
    if mode not in PEER_MODES:
        raise ConfigError(f"--peer={peer} has no --mode={mode}; it has {', '.join(PEER_MODES)}.")
    for flag in (TRACE, REQUEST_RATE):
        if flag.present:
            raise ConfigError(f"--peer={peer} runs --requests that all come at once: leave --{flag.name} out.")
    if engine_flags.DRAFT_MODEL.value is not None:
        raise ConfigError(f"--peer={peer} does not guess tokens: leave --draft_model out.")
    if peer == "vllm" and CONCURRENCIES.present:
        raise ConfigError("--peer=vllm has one bound of what is under way: give --max_concurrency.")
    check_installed(peer)


def runs_apart(peer: str) -> str | None:
    """The device of a peer that has a process of its own, "cuda" or "cpu"; None: it takes turns with the engine.

    JAX is not asked: it would take the accelerator's memory.
    """
    on_cpu = bool(common.SIMULATE_DEVICES.value) or (jax.config.jax_platforms or "").startswith("cpu")
    if peer == "vllm":
        return "cpu" if on_cpu else "cuda"
    import torch

    return "cuda" if torch.cuda.is_available() and not on_cpu else None


def _trace() -> Trace | None:
    if TRACE.value is None:
        return None
    trace = read_trace(TRACE.value, NUM_REQUESTS.value)
    if ARRIVAL.value == "trace" and not trace.has_arrivals:
        raise ConfigError(f"--arrival=trace: {TRACE.value} has no arrival_time_ns.")
    return trace


def _listed(flag: flags.FlagHolder[list[str] | None]) -> list[str]:
    values = flag.value or []
    if flag.present and not 1 <= len(values) <= MAX_ITEMS:
        raise ConfigError(f"--{flag.name}: give from 1 to {MAX_ITEMS} of them, separated by commas.")
    return values


def _sizes(flag: flags.FlagHolder[list[str] | None]) -> tuple[int, ...]:
    return tuple(parse_sizes(flag.value, f"--{flag.name}")) if flag.value is not None else ()
