"""Times of single pieces: decode steps, first tokens of an idle engine, prompts, loading."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ..checkpoint import CheckpointSource
from ..checkpoint.reader import read_weights
from ..config import LlamaConfig
from ..engine.engine import Engine
from ..engine.options import Sizes
from ..errors import EngineError
from ..kv_cache import PAGE_SIZE
from ..sharding import DATA
from . import steady
from .workload import Rows, random_prompt


class DecodePlan(NamedTuple):
    """How the steps of one batch are timed, so that `context` is about the middle of it."""

    batch: int
    prompt: int  # tokens of a prompt, give or take half a page
    dispatches: int  # of one round
    longest: int  # tokens of the longest sequence at the end


def plan_decode(sizes: Sizes, data: int, batch: int, context: int, steps: int, rounds: int) -> DecodePlan:
    """Prompts so much shorter than `context` as is generated before the middle of `rounds` rounds of `steps` steps."""
    per_shard = -(-batch // data)
    dispatches = -(-steps // sizes.decode_steps)
    timed = sizes.decode_steps * (rounds * (dispatches + steady.GUARD) + 2 * steady.GUARD)
    # While prompts are computed sequences get a token in each step, the first one all along, the last one none.
    prompt, most = max(1, context - timed // 2), 0
    for _ in range(4 if batch > 1 else 0):  # a shorter prompt takes fewer steps, and so on
        usual, most = steady.steps_before(sizes, per_shard, prompt)
        prompt = max(1, context - timed // 2 - (usual + 1) // 2)
    return DecodePlan(batch, prompt, dispatches, prompt + PAGE_SIZE // 2 + 1 + most + timed)


class DecodeSampler:
    """Milliseconds of decode steps, one round after another, while a batch decodes."""

    def __init__(self, engine: Engine, decoding: steady.Decoding, plan: DecodePlan):
        self._engine, self._decoding, self._plan = engine, decoding, plan
        self.contexts: list[float] = []

    def __call__(self) -> float:
        """Milliseconds per step of one round. Nothing is left running, so that something else can be timed after."""
        engine, n = self._engine, self._plan.dispatches
        for _ in range(steady.GUARD):
            steady.step(engine)
        first = self._decoding.context()
        per_dispatch = self._decoding.steps_per_dispatch
        seconds, _ = steady.timed_steps(engine, n, n * self._plan.batch * per_dispatch)
        self.contexts.append((first + self._decoding.context()) / 2)
        jax.block_until_ready(engine.runner.state)
        return 1e3 * seconds / (n * per_dispatch)


@contextmanager
def decode_sampler(engine: Engine, plan: DecodePlan, rng: np.random.Generator) -> Iterator[DecodeSampler]:
    """Has the batch decode while the block runs."""
    with steady.decoding(engine, plan.batch, plan.prompt, rng) as decoding:
        yield DecodeSampler(engine, decoding, plan)


def prefill_ms(engine: Engine, rows: Rows, rng: np.random.Generator) -> float:
    """Milliseconds from random prompts on the host to the first token of each of them, on an idle engine."""
    prompts = [random_prompt(engine.config.vocab_size, rows.tokens, rng) for _ in range(rows.rows)]
    params = steady.greedy(1)
    start = time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.add_request(f"prefill-{number}", prompt, params)
    missing = rows.rows
    while missing:
        for delta in engine.step():
            if delta.error:
                raise EngineError(delta.error)
            missing -= len(delta.token_ids)
    ms = 1e3 * (time.perf_counter() - start)
    while engine.has_unfinished:
        engine.step()
    return ms


def prefill_steps(sizes: Sizes, data: int, rows: Rows) -> int:
    """Steps that these prompts take at least, by the tokens of a step."""
    return max(1, math.ceil(rows.rows * rows.tokens / (data * max(1, sizes.max_blocks * sizes.block))))


def interleaved(rounds: int, samplers: Sequence[Callable[[], float]], rest_ms: int = 0) -> list[list[float]]:
    """`rounds` samples of each, one of each in turn: what slows the machine down for a while slows all of them.

    rest_ms: milliseconds of rest before each sample.
    """
    samples: list[list[float]] = [[] for _ in samplers]
    for _ in range(rounds):
        for of_sampler, sampler in zip(samples, samplers, strict=True):
            time.sleep(rest_ms / 1e3)
            of_sampler.append(sampler())
    return samples


def load_seconds(source: CheckpointSource, config: LlamaConfig, mesh: Mesh) -> tuple[float, int]:
    """Seconds until all weights are on the mesh, and the bytes that were read."""
    start = time.perf_counter()
    weights, stats = read_weights(source, config, mesh=mesh, progress=False)
    jax.block_until_ready(weights)
    return time.perf_counter() - start, stats.nbytes


def slots_of(engine: Engine) -> int:
    """Sequences that run at the same time on the whole mesh."""
    return engine.sizes.slots * engine.mesh.shape[DATA]
