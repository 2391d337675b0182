r"""Measures the engine: latency, throughput, prompts, loading and starting, against what the devices could do.

    python -m launch.benchmark --mode=latency --random_weights --config=configs/llama3_1_8b.py --batches=1,8,64,256
    python -m launch.benchmark --mode=throughput --checkpoint=FOLDER --requests=256x1000x1000
    python -m launch.benchmark --mode=throughput --checkpoint=FOLDER --trace=FILE.jsonl --request_rate=10
    python -m launch.benchmark --mode=throughput --checkpoint=FOLDER --requests=256x512x128 --concurrencies=1,4,16,64
    python -m launch.benchmark --mode=prefill --checkpoint=FOLDER --prefill=1x2048,8x2048 --peer=hf

Modes:

- latency: milliseconds of a decode step while `--batches` sequences decode behind `--context` tokens, and the time to
  the first token of one request of `--input_len` tokens on an idle engine (TTFT).
- throughput: tokens per second of whole requests, with TTFT, time per output token, time between tokens and whole
  time of the requests. `--concurrencies` shows throughput against latency.
- prefill: milliseconds from prompts to their first tokens.
- load: seconds and GB/s of reading --checkpoint into the mesh.
- startup: seconds of the phases of a start, in two new processes: without compiled programs, and with them.
- start: the same in this process.

A table is printed, and everything written to a JSON file and drawn in a picture, in the folder --out. Limits are
computed from a copy bandwidth, a matmul rate and an all-reduce latency that are measured in the same run.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags, logging
from jax.sharding import Mesh

from sharded_llama.benchmark import checks, columns, fit, plot, record, run, single, startup
from sharded_llama.benchmark.settings import Settings
from sharded_llama.benchmark.statistics import median
from sharded_llama.benchmark.trace import tokens_beyond
from sharded_llama.checkpoint import CheckpointSource
from sharded_llama.config import LlamaConfig
from sharded_llama.engine.llm import LLM
from sharded_llama.engine.options import EngineOptions, check_options
from sharded_llama.errors import ConfigError
from sharded_llama.mesh import check_mesh

from . import benchmark_flags as given, common, engine_flags

flags.adopt_module_key_flags(common)
flags.adopt_module_key_flags(engine_flags)
flags.adopt_module_key_flags(given)

Row = dict[str, Any]


class Opened(NamedTuple):
    """A model that is known, with its weights yet to come."""

    config: LlamaConfig
    mesh: Mesh
    source: CheckpointSource | None  # None: random weights

    def make(self) -> LLM:
        options = engine_flags.engine_options() | {"draft_model": engine_flags.DRAFT_MODEL.value, "progress": False}
        if self.source is not None:
            return common.load_model(self.source, skip_tokenizer=True, **options)
        options |= {"attention": common.ATTENTION.value, "weights_seed": given.SEED.value}
        return LLM.random(self.config, self.mesh, **options)


def open_model() -> Opened:
    """Raises ConfigError, CheckpointError or MeshError for a model that cannot be run on this mesh."""
    if given.RANDOM_WEIGHTS.value:
        source, config = None, LlamaConfig.from_dict(common.CONFIG.value.model)
    else:
        source = common.open_source()
        config = source.read_config()
    config = config.replace(dtype=common.DTYPE.value or config.dtype)
    mesh = common.choose_mesh(config)
    check_mesh(config, mesh)
    return Opened(config, mesh, source)


def checked(settings: Settings, opened: Opened) -> Settings:
    """The settings filled in. Raises ConfigError for what does not fit, before anything is loaded or compiled."""
    options = EngineOptions.make(**engine_flags.engine_options())
    if engine_flags.DRAFT_MODEL.value is None:
        check_options(options, opened.config)
    room = fit.room_of(opened.config, opened.mesh, options)
    trace = settings.trace
    if trace is not None and given.SKIP_LONG.value:
        kept = checks.without_long(trace, room.max_model_len)
        if not kept.lines:
            raise ConfigError(f"--skip_long: no request of the trace fits max_model_len={room.max_model_len}.")
        logging.info("%d of %d requests of the trace fit.", len(kept.lines), len(trace.lines))
        settings = dataclasses.replace(settings, trace=kept)
    if trace is not None and (beyond := tokens_beyond(trace, opened.config.vocab_size)):
        logging.info("%d token ids of the trace are taken modulo the vocabulary's size.", beyond)
    return checks.resolve(settings, opened.config, opened.mesh, room)


def run_engine(settings: Settings) -> tuple[run.Measured, Row]:
    """Latency, throughput or prefill: what was measured, and the workload for the record."""
    if settings.peer is not None and given.PEER_WEIGHTS.value is None:
        apart = given.runs_apart(settings.peer)
        if apart is not None:
            return run.measure_apart(settings, this_launcher(), apart)
    else:
        settings = dataclasses.replace(settings, peer=None)
    opened = open_model()
    if settings.peer is not None and opened.mesh.devices.flat[0].platform != "cpu":
        raise ConfigError(f"--peer={settings.peer}: torch has no CUDA here, and the CPU is no match: install it with.")
    settings = checked(settings, opened)
    folder = Path(given.PEER_WEIGHTS.value) if given.PEER_WEIGHTS.value else None
    measured = run.measure(settings, opened.config, opened.mesh, opened.make, folder)
    return measured, workload_of(settings, opened) | {"sizes": measured.engine}


def run_load(settings: Settings) -> tuple[run.Measured, Row]:
    """Reading the checkpoint, several times: the files are in the page cache after the first."""
    opened = open_model()
    fit.room_of(opened.config, opened.mesh, EngineOptions.make(**engine_flags.engine_options()))
    samples = [single.load_seconds(opened.source, opened.config, opened.mesh) for _ in range(settings.rounds)]
    seconds, nbytes = [s for s, _ in samples], samples[0][1]
    row = {"what": "load", "format": opened.source.format, "gb": nbytes / 1e9, "seconds": median(seconds)}
    row |= {"first_s": seconds[0], "gb_per_s": nbytes / 1e9 / median(seconds), "samples": seconds}
    return run.Measured([row], {}, {}, record.device_of(opened.mesh)), workload_of(settings, opened)


def run_start(settings: Settings) -> tuple[run.Measured, Row]:
    """A start in this process."""
    began = time.time()
    opened = open_model()
    fit.room_of(opened.config, opened.mesh, EngineOptions.make(**engine_flags.engine_options()))
    row = startup.start_here(began, opened.make)
    return run.Measured([row], {}, {}, record.device_of(opened.mesh)), workload_of(settings, opened)


def run_startup(settings: Settings) -> tuple[run.Measured, Row]:
    """A start in two new processes. This one asks for no device: it would take an accelerator's memory."""
    rows, device, workload = startup.start_new_processes([*this_launcher(), "--mode=start", "--nopicture"])
    return run.Measured(rows, {}, {}, device), workload


RUNS: dict[str, Callable[[Settings], tuple[run.Measured, Row]]] = {
    "latency": run_engine,
    "throughput": run_engine,
    "prefill": run_engine,
    "load": run_load,
    "startup": run_startup,
    "start": run_start,
}


def this_launcher() -> list[str]:
    """The command that runs this launcher with the flags it was given."""
    return [sys.executable, "-m", f"{__package__}.benchmark", *sys.argv[1:]]


def workload_of(settings: Settings, opened: Opened) -> Row:
    """What was run, for the record; of a trace its size, as its name stands in the command."""
    asked = dataclasses.asdict(dataclasses.replace(settings, trace=None))
    asked |= {"requests": [str(r) for r in settings.requests], "request_rate": str(settings.request_rate)}
    asked |= {"prefill": [str(r) for r in settings.prefill or ()]}
    if settings.trace is not None:
        lengths = checks.lengths_of(settings.trace)
        asked["trace"] = {"requests": len(lengths), "input_tokens": sum(n for n, _ in lengths)}
        asked["trace"]["output_tokens"] = sum(n for _, n in lengths)
    return {
        "config": dataclasses.asdict(opened.config),
        "weights": "random" if opened.source is None else opened.source.format,
        "mesh": dict(opened.mesh.shape),
        "engine": engine_flags.engine_options(),
        "settings": asked,
    }


def print_result(mode: str, measured: run.Measured) -> None:
    """The table, the arithmetic of the limits, and what they were computed from."""
    rows = [row for row in measured.rows if row["what"] != run.COUNT]
    print(columns.text_of(mode, rows))
    if any("arithmetic" in row for row in rows):
        print("\nLimits, on each device:")
    for row in rows:
        if "arithmetic" in row:
            print(f"  {columns.name_of(row)}: {row['arithmetic']}")
    if measured.ceilings:
        print(f"\nMeasured: {columns.ceilings_text(measured.ceilings)}.")
    for row in measured.rows:
        if row["what"] == run.COUNT:
            print(f"Compilations after start: {row['count']}.")


def main() -> None:
    settings = given.read_settings()
    measured, workload = RUNS[settings.mode](settings)
    print_result(settings.mode, measured)
    versions = ("jaxlib", *given.PEER_VERSIONS.get(settings.peer, ()))
    path = record.save(
        given.name(),
        measured.device,
        workload,
        measured.rows,
        given.OUT.value,
        ceilings=measured.ceilings,
        versions=versions,
    )
    print(path)
    if given.PICTURE.value:
        rows = [row for row in measured.rows if row["what"] != run.COUNT]
        picture = path.with_suffix(".png")
        plot.draw(settings.mode, rows, f"{settings.mode}, {measured.device}", picture)
        print(picture)


def cli() -> None:
    common.run(main)


if __name__ == "__main__":
    cli()
