"""What a benchmark will do on this model, mesh and memory: filled in, and refused where it cannot be."""

import dataclasses

from jax.sharding import Mesh

from ..config import LlamaConfig
from ..sharding import DATA
from . import fit
from .settings import Settings
from .single import plan_decode
from .trace import Trace
from .workload import Rows

BATCHES = (1, 8, 64, 256)
CONTEXT = 512
INPUT_LEN = 1024
PREFILL = (Rows(1, 2048), Rows(8, 2048))


def resolve(settings: Settings, config: LlamaConfig, mesh: Mesh, room: fit.Room) -> Settings:
    """The settings with defaults that fit this engine. Raises ConfigError for those given that do not."""
    check = {"latency": _latency, "prefill": _prefill, "throughput": _throughput}.get(settings.mode)
    return settings if check is None else check(settings, config, mesh, room)


def _latency(settings: Settings, config: LlamaConfig, mesh: Mesh, room: fit.Room) -> Settings:
    half = max(1, room.max_model_len // 2)
    settings = dataclasses.replace(
        settings,
        batches=settings.batches or tuple(b for b in BATCHES if b <= room.slots),
        context=settings.context or min(CONTEXT, half),
        input_len=settings.input_len or min(INPUT_LEN, half),
    )
    for batch in settings.batches:
        what = f"--batches={batch}"
        fit.check_batch(room, batch, what)
        plan = plan_decode(room.sizes, mesh.shape[DATA], batch, settings.context, settings.steps, settings.rounds)
        what += f" with --context={settings.context}"
        fit.check_length(
            room, plan.longest, what, "lower --context, --steps or --rounds, or raise --max_model_len if the model can"
        )
        fit.check_cache(room, mesh, batch, plan.longest, what)
    what = f"--input_len={settings.input_len}"
    fit.check_length(room, settings.input_len + 1, what, "lower it")
    fit.check_cache(room, mesh, 1, settings.input_len + 1, what)
    return settings


def _prefill(settings: Settings, config: LlamaConfig, mesh: Mesh, room: fit.Room) -> Settings:
    if settings.prefill is None:
        fitting = (Rows(min(r.rows, room.slots), min(r.tokens, room.max_model_len - 1)) for r in PREFILL)
        settings = dataclasses.replace(settings, prefill=tuple(dict.fromkeys(fitting)))
    for rows in settings.prefill:
        what = f"--prefill={rows}"
        fit.check_batch(room, rows.rows, what)
        fit.check_length(room, rows.tokens + 1, what, "lower the tokens, or raise --max_model_len if the model can")
        fit.check_cache(room, mesh, rows.rows, rows.tokens + 1, what)
    return settings


def _throughput(settings: Settings, config: LlamaConfig, mesh: Mesh, room: fit.Room) -> Settings:
    """A request has to fit alone, and so many of mean length as the bounds ask for; otherwise requests wait."""
    workloads = [(f"--requests={r}", [(r.n_in, r.n_out)]) for r in settings.requests]
    if settings.trace is not None:
        workloads.append(("the trace", lengths_of(settings.trace)))
    for what, lengths in workloads:
        number, longest = max(enumerate(map(sum, lengths)), key=lambda item: item[1])
        if settings.trace is not None:
            what = f"line {settings.trace.lines[number].number} of the trace"
        advice = "leave it out with --skip_long, or raise --max_model_len if the model can"
        fit.check_length(room, longest, what, advice if settings.trace else "lower the lengths")
        fit.check_cache(room, mesh, 1, longest, what)
        mean = max(1, sum(map(sum, lengths)) // len(lengths))
        for bound in filter(None, settings.bounds):
            flag = "--concurrencies" if settings.concurrencies else "--max_concurrency"
            fit.check_batch(room, bound, f"{flag}={bound}")
            fit.check_cache(room, mesh, bound, mean, f"{flag}={bound}")
    return settings


def lengths_of(trace: Trace) -> list[tuple[int, int]]:
    """(prompt, answer) tokens of each request."""
    return [(line.n_in, line.n_out) for line in trace.lines]


def without_long(trace: Trace, max_model_len: int) -> Trace:
    """The requests of a trace that fit, which may be none."""
    return trace._replace(lines=[line for line in trace.lines if line.n_in + line.n_out <= max_model_len])
