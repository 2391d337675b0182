"""All sequences decoding together: how long the engine's steps take then."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ..engine.engine import Engine, StepSeconds
from ..engine.options import Sizes
from ..engine.runner import Runner, Work
from ..engine.steps import FROM_SLOT, Column
from ..errors import ConfigError, EngineError
from ..kv_cache import PAGE_SIZE
from ..sampling import SamplingParams
from ..sharding import DATA
from .workload import random_prompt

GUARD = 4  # dispatches before and after something is timed that are not


class Decoding(NamedTuple):
    """Sequences that decode."""

    batch: int
    last: list[Work]  # the last work with rows that was executed, in a list of one

    @property
    def steps_per_dispatch(self) -> int:
        return self.last[0].n_steps

    def context(self) -> float:
        """Positions that a token of the last work sees on average, itself included."""
        starts = self.last[0].rows_RX[live(self.last[0]), Column.START]
        return float(starts.mean() + 1 + (self.steps_per_dispatch - 1) / 2)


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
    engine: Engine,
    batch: int,
    prompt: int,
    rng: np.random.Generator,
    params: Sequence[SamplingParams] | None = None,
) -> Iterator[Decoding]:
    """`batch` sequences after random prompts of about `prompt` tokens, all of them decoding; ends them after.

    params: of each sequence; default: greedy.

    Lengths of prompts differ by up to a page, so that the sequences need new pages at different steps, as they do in
    service. Raises ConfigError if the engine has fewer slots, EngineError if they never all decode together.
    """
    slots = engine.sizes.slots * engine.mesh.shape[DATA]
    if not 1 <= batch <= slots:
        raise ConfigError(f"a batch of {batch} does not fit the engine's {slots} slots: raise --max_num_seqs.")
    half = min(PAGE_SIZE // 2, prompt - 1)
    lengths = rng.integers(prompt - half, prompt + half + (half == 0), batch)
    params = params or [greedy(engine.max_model_len)] * batch
    for i, (length, of_sequence) in enumerate(zip(lengths, params, strict=True)):
        engine.add_request(f"decoding-{i}", random_prompt(engine.config.vocab_size, length, rng), of_sequence)
    with recorded(engine.runner) as last:
        while not last or int(live(last[0]).sum()) < batch or last[0].shape.n_blocks:
            step(engine)
            if not engine.has_unfinished:
                raise EngineError(f"{batch} sequences never decoded together: pages or --max_model_len are too few.")
        for _ in range(GUARD):
            step(engine)
        yield Decoding(batch, last)
    for i in range(batch):
        engine.abort(f"decoding-{i}")
    while engine.has_unfinished:
        step(engine)


def greedy(n_tokens: int) -> SamplingParams:
    """The most likely tokens, exactly `n_tokens` of them."""
    return SamplingParams(temperature=0.0, max_tokens=n_tokens, ignore_eos=True)


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


def bare_seconds(runner: Runner, work: Work, repeats: int) -> float:
    """Seconds of one execution of a work's rows, the median over three rounds of `repeats` queued ones."""
    work = work._replace(tables_U3=None, copies_C2=None)
    rounds = []
    for _ in range(4):  # the first round warms up
        jax.block_until_ready(runner.state)
        start = time.perf_counter()
        for _ in range(repeats):
            runner.execute(work)
        jax.block_until_ready(runner.state)
        rounds.append((time.perf_counter() - start) / repeats)
    return float(np.median(rounds[1:]))


def steps_before(sizes: Sizes, batch: int, prompt: int) -> tuple[int, int]:
    """Steps before all of `batch` sequences of a data shard decode: as a rule, and at most."""
    blocks = batch * -(-(prompt + PAGE_SIZE) // sizes.block)
    blocks_per_step = max(1, min(sizes.max_blocks, (sizes.max_tokens - batch) // sizes.block))
    usual = -(-blocks // blocks_per_step)
    # Every chunk may leave a part of a block unused, and the engine is one dispatch ahead.
    return usual, usual + batch
