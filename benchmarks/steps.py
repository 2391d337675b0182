"""Times the compiled decode and prefill steps on random weights, and decoding against recomputing.

    python -m benchmarks.steps --config=configs/llama3_1_8b.py --mesh=data:1,model:1

Steps run through `Runner.execute` over pages that lie in random order, without scheduler. Per decode batch:
milliseconds per step with `--cached` tokens per row in the cache, the limit (weights and live cache over the copy
bandwidth measured in the same run), and the share of it. A prefill takes steps of at most 2048 tokens on each data
shard. `--recompute` also times producing the same tokens without a cache, by running the whole sequence again for each
one.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import Mesh
from ml_collections import config_flags

from sharded_llama.attention import choose_backend
from sharded_llama.benchmark import record
from sharded_llama.config import LlamaConfig
from sharded_llama.engine.options import ACCELERATOR, Sizes, block_of, pages_per_sequence
from sharded_llama.engine.runner import Runner, Work
from sharded_llama.engine.steps import FROM_SLOT, Column, DeviceState, StepShape
from sharded_llama.errors import ConfigError
from sharded_llama.kv_cache import KVPages, pages_layout
from sharded_llama.mesh import make_mesh, parse_mesh, simulate_cpu_devices
from sharded_llama.model import xfmr
from sharded_llama.sampling import Mode
from sharded_llama.sharding import DATA, MODEL
from sharded_llama.weights import XfmrWeights, init_weights

CONFIG = config_flags.DEFINE_config_file("config", None, "Model, such as configs/llama3_1_8b.py.")
MESH = flags.DEFINE_string("mesh", "data:1,model:1", "Mesh sizes.")
SIMULATE = flags.DEFINE_integer("simulate_devices", 0, "Simulated CPU devices.")
BATCHES = flags.DEFINE_list("batches", ["1", "8", "64", "256"], "Decode batches.")
CACHED = flags.DEFINE_integer("cached", 512, "Tokens that every row attends to in a timed step.")
PREFILL = flags.DEFINE_list("prefill", ["1x2048"], "Prefills as ROWSxTOKENS.")
RECOMPUTE = flags.DEFINE_integer(
    "recompute", 0, "Also generate this many tokens with and without the cache; at least 2."
)
STEPS = flags.DEFINE_integer("steps", 64, "Timed decode steps.")
NAME = flags.DEFINE_string("name", "steps", "Name of the result.")
OUT = flags.DEFINE_string("out", "benchmarks/results", "Folder of the result.")
flags.mark_flag_as_required("config")
flags.register_validator("recompute", lambda n: n == 0 or n >= 2, "must be 0 or at least 2")


def copy_bandwidth() -> float | None:
    """Bytes per second that one GPU moves in a large copy, read plus written; None elsewhere."""
    if jax.devices()[0].platform != "gpu":
        return None
    x = jax.random.normal(jax.random.key(0), (2**29,), jnp.float32)
    negate = jax.jit(jnp.negative)
    seconds = timed(lambda _: negate(x), 20)
    return 2 * x.nbytes / seconds


def timed(run: Callable[[int], Any], repeats: int, rounds: int = 3) -> float:
    """Seconds per call of `run`, the median over rounds of `repeats` queued calls."""
    jax.block_until_ready(run(0))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for i in range(repeats):
            out = run(i)
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - start) / repeats)
    return float(np.median(seconds))


def make_runner(
    config: LlamaConfig, mesh: Mesh, weights: XfmrWeights, shape: StepShape, *, slots: int, length: int
) -> Runner:
    """A runner of steps of one shape. Each slot has pages for `length` tokens, in random order, of random content.

    `slots` and `shape` are per data shard.
    """
    of_slot, data = pages_per_sequence(length), mesh.shape[DATA]
    n_pages = slots * of_slot
    sizes = Sizes(
        slots=slots,
        max_tokens=shape.n_tokens,
        block=shape.block,
        max_blocks=shape.n_blocks,
        decode_steps=1,
        run_length=1,
        shapes=(shape,),
    )
    runner = Runner(
        config,
        mesh,
        weights,
        backend=choose_backend(config, mesh.devices.flat[0]),
        sizes=sizes,
        n_pages=n_pages,
        table_width=of_slot,
        kv_dtype="auto",
    )
    rng = np.random.default_rng(0)
    tables = np.concatenate([rng.permutation(n_pages).reshape(slots, of_slot) for _ in range(data)])
    runner.state = DeviceState(
        random_pages(config, mesh, n_pages),
        runner.put(tables.astype(np.int32)),
        runner.put(np.arange(data * slots, dtype=np.int32) % config.vocab_size),
    )
    return runner


def random_pages(config: LlamaConfig, mesh: Mesh, n_pages: int) -> tuple[KVPages, ...]:
    """Pages of normally distributed values: what is computed of zeros takes less power, and so less time."""
    abstract = KVPages.abstract(config, mesh, n_pages)
    kv, layout = abstract[0].kv_NPGK, pages_layout(abstract)[0].kv_NPGK
    fill = jax.jit(lambda key: jax.random.normal(key, kv.shape, kv.dtype), out_shardings=layout)
    return tuple(KVPages(fill(key)) for key in jax.random.split(jax.random.key(1), config.n_layers))


def per_shard(batch: int, mesh: Mesh) -> int:
    """Rows of a batch on each data shard. Raises ConfigError if they are not as many on all."""
    if batch < 1 or batch % mesh.shape[DATA]:
        raise ConfigError(f"a batch of {batch} rows cannot be split evenly over data:{mesh.shape[DATA]}.")
    return batch // mesh.shape[DATA]


def decode_work(shape: StepShape, data: int, position: int) -> Work:
    """A greedy step in which the newest token of every slot stands at `position`."""
    rows = np.zeros((data, shape.n_single, Column.COUNT), np.int32)
    rows[..., Column.TOKEN] = FROM_SLOT
    rows[..., Column.START] = position
    rows[..., Column.LENGTH] = rows[..., Column.SAMPLES] = 1
    rows[..., Column.SLOT] = np.arange(shape.n_single)
    return Work(shape, 1, Mode.GREEDY, rows.reshape(-1, Column.COUNT), np.zeros((0, 1), np.int32), chooses=True)


def prefill_works(shape: StepShape, data: int, slots: int, length: int, vocab_size: int) -> list[Work]:
    """Steps that compute a prompt of `length` random tokens in every slot and sample what follows it."""
    starts = range(0, length, shape.block)
    pieces = [(slot, start, min(shape.block, length - start)) for slot in range(slots) for start in starts]
    rng, works = np.random.default_rng(0), []
    for first in range(0, len(pieces), shape.n_blocks):
        rows = np.zeros((data, shape.n_rows, Column.COUNT), np.int32)
        rows[..., Column.SLOT] = slots  # rows that are not used
        for row, (slot, start, n) in enumerate(pieces[first : first + shape.n_blocks], shape.n_single):
            rows[:, row, : Column.LIMIT] = (0, start, n, slot, start + n == length)
        tokens = rng.integers(0, vocab_size, (data * shape.n_blocks, shape.block), np.int32)
        works.append(Work(shape, 1, Mode.GREEDY, rows.reshape(-1, Column.COUNT), tokens, chooses=True))
    return works


def bytes_per_step(config: LlamaConfig, weights: Any, batch: int, mesh_shape: dict[str, int]) -> float:
    """Bytes that one device must read for a decode step: its weights, without embeddings, and its live cache."""
    read = [*jax.tree.leaves(weights.layers), weights.norm]
    read.append(weights.tok_embeddings if weights.output is None else weights.output)
    itemsize = config.jnp_dtype.itemsize
    cache = 2 * config.n_layers * batch * CACHED.value * max(config.n_kv_heads, mesh_shape[MODEL]) * config.head_dim
    return sum(x.nbytes for x in read) / mesh_shape[MODEL] + cache * itemsize / (mesh_shape[DATA] * mesh_shape[MODEL])


def time_decode(config: LlamaConfig, mesh: Mesh, weights: XfmrWeights, batch: int) -> float:
    """Seconds per decode step; each step attends to CACHED tokens per row, its own included."""
    shape = StepShape(per_shard(batch, mesh), 0, 1)
    runner = make_runner(config, mesh, weights, shape, slots=shape.n_single, length=CACHED.value)
    # The same position again and again: the context does not grow while it is timed.
    work = decode_work(shape, mesh.shape[DATA], CACHED.value - 1)
    timed(lambda _: runner.execute(work), STEPS.value, rounds=1)  # warms up
    return timed(lambda _: runner.execute(work), STEPS.value)


def time_prefill(config: LlamaConfig, mesh: Mesh, weights: XfmrWeights, batch: int, length: int) -> float:
    """Seconds from prompts on the host to their first tokens on the device."""
    slots = per_shard(batch, mesh)
    block = block_of(mesh)
    n_blocks = min(slots * -(-length // block), ACCELERATOR["max_num_batched_tokens"] // block)
    shape = StepShape(1, n_blocks, block)
    runner = make_runner(config, mesh, weights, shape, slots=slots, length=length)
    works = prefill_works(shape, mesh.shape[DATA], slots, length, config.vocab_size)
    return timed(lambda _: [runner.execute(work) for work in works], 5)


def time_recompute(config: LlamaConfig, mesh: Mesh, weights: XfmrWeights, n_tokens: int) -> dict[str, float]:
    """Seconds for `n_tokens` after a prompt of CACHED tokens, with the cache and by recomputing, batch 1 per shard."""
    batch, length = mesh.shape[DATA], CACHED.value + n_tokens
    shape = StepShape(1, 0, 1)
    runner = make_runner(config, mesh, weights, shape, slots=1, length=length)
    works = [decode_work(shape, batch, CACHED.value + i) for i in range(n_tokens)]

    # The recomputed sequence has one fixed, padded shape: no compilation is counted against it. The model gives the
    # logits of all its positions, of which one is used.
    @jax.jit
    def whole(weights: XfmrWeights, tokens_BL: jax.Array) -> jax.Array:
        logits_BLV = xfmr(weights, config, tokens_BL, mesh=mesh, backend=runner.backend)
        return jnp.argmax(logits_BLV[:, CACHED.value], axis=-1)

    tokens = runner.put(np.ones((batch, length), np.int32))
    jax.block_until_ready(runner.execute(works[0]))
    jax.block_until_ready(whole(weights, tokens))

    start = time.perf_counter()
    for work in works[1:]:
        sampled = runner.execute(work)
    jax.block_until_ready(sampled)
    cached = time.perf_counter() - start
    start = time.perf_counter()
    for _ in works[1:]:
        out = whole(weights, tokens)
    jax.block_until_ready(out)
    recomputed = time.perf_counter() - start
    return {"cached_s": cached, "recomputed_s": recomputed, "ratio": recomputed / cached}


def main(_: list[str]) -> None:
    if SIMULATE.value:
        simulate_cpu_devices(SIMULATE.value)
    config = LlamaConfig.from_dict(CONFIG.value.model)
    mesh = make_mesh(**parse_mesh(MESH.value))
    bandwidth = copy_bandwidth()
    weights = init_weights(jax.random.key(0), config, mesh=mesh)
    results = []
    for batch in map(int, filter(None, BATCHES.value)):
        seconds = time_decode(config, mesh, weights, batch)
        row = {"step": "decode", "batch": batch, "cached": CACHED.value, "ms": 1e3 * seconds}
        if bandwidth:
            limit = bytes_per_step(config, weights, batch, mesh.shape) / bandwidth
            row |= {"bytes_limit_ms": 1e3 * limit, "share_of_limit": limit / seconds}
        print(row, flush=True)
        results.append(row)
    for shape in filter(None, PREFILL.value):
        batch, length = map(int, shape.split("x"))
        seconds = time_prefill(config, mesh, weights, batch, length)
        row = {"step": "prefill", "batch": batch, "tokens": length, "ms": 1e3 * seconds}
        print(row, flush=True)
        results.append(row)
    if RECOMPUTE.value:
        row = {"step": "recompute", **time_recompute(config, mesh, weights, RECOMPUTE.value)}
        print(row, flush=True)
        results.append(row)
    workload = {
        "config": CONFIG.value.model.to_dict(),
        "mesh": dict(mesh.shape),
        "backend": choose_backend(config, mesh.devices.flat[0]),
        "copy_bytes_per_s": bandwidth,
    }
    print(record.save(NAME.value, record.device_of(mesh), workload, results, OUT.value))


if __name__ == "__main__":
    app.run(main)
