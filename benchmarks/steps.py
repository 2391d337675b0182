"""Times the compiled decode and prefill steps on random weights, and decoding against recomputing.

    python -m benchmarks.steps --config=configs/llama3_1_8b.py --mesh=data:1,model:1

Per decode batch: milliseconds per step with `--cached` tokens per row in the cache, the limit (weights and live
cache over the copy bandwidth measured in the same run), and the share of it. `--recompute` also times producing
the same tokens without a cache, by running the whole sequence again for each one.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from benchmarks import record
from sharded_llama.config import LlamaConfig
from sharded_llama.engine.steps import Steps
from sharded_llama.kv_cache import KVCache
from sharded_llama.mesh import make_mesh, parse_mesh, simulate_cpu_devices
from sharded_llama.model import xfmr
from sharded_llama.sharding import DATA, MODEL
from sharded_llama.weights import init_weights

CONFIG = config_flags.DEFINE_config_file("config", None, "Model, such as configs/llama3_1_8b.py.")
MESH = flags.DEFINE_string("mesh", "data:1,model:1", "Mesh sizes.")
SIMULATE = flags.DEFINE_integer("simulate_devices", 0, "Simulated CPU devices.")
BATCHES = flags.DEFINE_list("batches", ["1", "8", "64", "256"], "Decode batches.")
CACHED = flags.DEFINE_integer("cached", 512, "Tokens that every row attends to in a timed step.")
PREFILL = flags.DEFINE_list("prefill", ["1x2048"], "Prefills as ROWSxTOKENS.")
RECOMPUTE = flags.DEFINE_integer("recompute", 0, "Also generate this many tokens with and without the cache.")
STEPS = flags.DEFINE_integer("steps", 64, "Timed decode steps.")
NAME = flags.DEFINE_string("name", "steps", "Name of the result.")
OUT = flags.DEFINE_string("out", None, "Folder of the result; default: benchmarks/results.")
flags.mark_flag_as_required("config")


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


def random_caches(config: LlamaConfig, steps: Steps, batch: int, length: int) -> tuple[KVCache, ...]:
    abstract = KVCache.abstract(config, steps.mesh, batch, length)[0]
    fill = jax.jit(
        lambda key: jax.random.normal(key, abstract.k_BSGK.shape, config.jnp_dtype),
        out_shardings=abstract.k_BSGK.sharding,
    )
    keys = jax.random.split(jax.random.key(1), 2 * config.n_layers)
    return tuple(KVCache(fill(keys[2 * i]), fill(keys[2 * i + 1])) for i in range(config.n_layers))


def bytes_per_step(config: LlamaConfig, weights: Any, batch: int, mesh_shape: dict[str, int]) -> float:
    """Bytes that one device must read for a decode step: its weights, without embeddings, and its live cache."""
    read = [*jax.tree.leaves(weights.layers), weights.norm]
    read.append(weights.tok_embeddings if weights.output is None else weights.output)
    itemsize = config.jnp_dtype.itemsize
    cache = 2 * config.n_layers * batch * CACHED.value * max(config.n_kv_heads, mesh_shape[MODEL]) * config.head_dim
    return sum(x.nbytes for x in read) / mesh_shape[MODEL] + cache * itemsize / (mesh_shape[DATA] * mesh_shape[MODEL])


def time_decode(config: LlamaConfig, steps: Steps, weights: Any, batch: int) -> float:
    """Seconds per decode step; each step attends to CACHED tokens per row, its own included."""
    length = CACHED.value + 64
    run = steps.decode(batch, length, greedy=True)
    tokens = steps.put("replicated", np.arange(batch, dtype=np.int32))
    positions = steps.put("tokens", np.full(batch, CACHED.value - 1, np.int32))
    caches = jax.block_until_ready(random_caches(config, steps, batch, length))
    seconds = []
    for _ in range(4):  # the first round warms up
        start = time.perf_counter()
        for _ in range(STEPS.value):
            # The same position again and again: the context does not grow while it is timed.
            tokens, _, caches = run(weights, caches, tokens, positions, None)
        jax.block_until_ready(tokens)
        seconds.append((time.perf_counter() - start) / STEPS.value)
    return float(np.median(seconds[1:]))


def time_prefill(config: LlamaConfig, steps: Steps, weights: Any, batch: int, length: int) -> float:
    """Seconds from a prompt on the device to its first token on the device."""
    run = steps.prefill(batch, length, batch, length, greedy=True)
    rng = np.random.default_rng(0)
    tokens = steps.put("tokens", rng.integers(0, config.vocab_size, (batch, length), np.int32))
    lengths = steps.put("tokens", np.full(batch, length, np.int32))
    row = steps.put("replicated", np.int32(0))
    caches = KVCache.new(config, steps.mesh, batch, length)

    def once(_: int) -> jax.Array:
        nonlocal caches
        token, caches = run(weights, caches, tokens, lengths, row, None)
        return token

    return timed(once, 5)


def time_recompute(config: LlamaConfig, steps: Steps, weights: Any, n_tokens: int) -> dict[str, float]:
    """Seconds for `n_tokens` after a prompt of CACHED tokens, with the cache and by recomputing, batch 1 per shard."""
    batch, length = steps.mesh.shape[DATA], CACHED.value + n_tokens
    run = steps.decode(batch, length, greedy=True)
    new = steps.put("replicated", np.arange(batch, dtype=np.int32))
    positions = steps.put("tokens", np.full(batch, CACHED.value, np.int32))
    caches = random_caches(config, steps, batch, length)
    # The recomputed sequence has one fixed, padded shape: no compilation is counted against it.
    whole = jax.jit(
        lambda w, tokens, at: xfmr(w, config, tokens, mesh=steps.mesh, logits_at_B=at, backend=steps.backend)[0]
    )
    tokens = steps.put("tokens", np.ones((batch, length), np.int32))
    at = steps.put("tokens", np.full(batch, CACHED.value, np.int32))
    new, positions, caches = jax.block_until_ready(run(weights, caches, new, positions, None))
    jax.block_until_ready(whole(weights, tokens, at))

    start = time.perf_counter()
    for _ in range(n_tokens - 1):
        new, positions, caches = run(weights, caches, new, positions, None)
    jax.block_until_ready(new)
    cached = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(n_tokens - 1):
        out = whole(weights, tokens, at)
    jax.block_until_ready(out)
    recomputed = time.perf_counter() - start
    return {"cached_s": cached, "recomputed_s": recomputed, "ratio": recomputed / cached}


def main(_: list[str]) -> None:
    if SIMULATE.value:
        simulate_cpu_devices(SIMULATE.value)
    config = LlamaConfig.from_dict(CONFIG.value.model)
    mesh = make_mesh(**parse_mesh(MESH.value))
    steps = Steps(config, mesh)
    bandwidth = copy_bandwidth()
    weights = init_weights(jax.random.key(0), config, mesh=mesh)
    results = []
    for batch in map(int, filter(None, BATCHES.value)):
        seconds = time_decode(config, steps, weights, batch)
        row = {"step": "decode", "batch": batch, "cached": CACHED.value, "ms": 1e3 * seconds}
        if bandwidth:
            limit = bytes_per_step(config, weights, batch, mesh.shape) / bandwidth
            row |= {"bytes_limit_ms": 1e3 * limit, "share_of_limit": limit / seconds}
        print(row, flush=True)
        results.append(row)
    for shape in filter(None, PREFILL.value):
        batch, length = map(int, shape.split("x"))
        seconds = time_prefill(config, steps, weights, batch, length)
        row = {"step": "prefill", "batch": batch, "tokens": length, "ms": 1e3 * seconds}
        print(row, flush=True)
        results.append(row)
    if RECOMPUTE.value:
        row = {"step": "recompute", **time_recompute(config, steps, weights, RECOMPUTE.value)}
        print(row, flush=True)
        results.append(row)
    workload = {
        "config": CONFIG.value.model.to_dict(),
        "mesh": dict(mesh.shape),
        "backend": steps.backend,
        "copy_bytes_per_s": bandwidth,
    }
    print(record.save(NAME.value, mesh, workload, results, OUT.value))


if __name__ == "__main__":
    app.run(main)
