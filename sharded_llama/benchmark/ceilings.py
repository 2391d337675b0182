"""What the devices do at best, measured where and when the engine is: copying, matmuls, all-reduces."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P

from ..config import LlamaConfig
from ..sharding import MODEL
from .limits import Ceilings
from .statistics import median

COPY_BYTES = {"cpu": 128 << 20}  # of the array that is copied; elsewhere:
COPY_BYTES_DEFAULT = 2 << 30
FREE_SHARE = 8  # and at most this part of what is free
CUBE = {"cpu": 1024}  # side of the matrices that are multiplied; elsewhere:
CUBE_DEFAULT = 8192
REDUCED = 4096  # elements of the array that is summed over `model`
REPEATS = {"cpu": 2}  # calls of a round; elsewhere:
REPEATS_DEFAULT = 10
CHAIN = 32  # sums in one program, so that the time of starting it is shared


def measure_ceilings(config: LlamaConfig, mesh: Mesh) -> Ceilings:
    """Bytes and FLOPs per second of the mesh's first device, and the latency of a small all-reduce over `model`.

    Matrices have the model's type; a float32 model asks for full float32 products. Arrays are random: zeros take less
    power, and so less time.
    """
    device = mesh.devices.flat[0]
    return Ceilings(
        copy_bandwidth(device),
        matmul_rate(device, config.jnp_dtype),
        all_reduce_latency(mesh, config.jnp_dtype) if mesh.shape[MODEL] > 1 else 0.0,
    )


def copy_bandwidth(device: jax.Device) -> float:
    """Bytes per second, read plus written, of negating a large float32 array."""
    nbytes = COPY_BYTES.get(device.platform, COPY_BYTES_DEFAULT)
    free = _free_bytes(device)
    if free is not None:
        nbytes = min(nbytes, free // FREE_SHARE)
    n = max(1024, nbytes // 4)
    with jax.default_device(device):
        x = jax.jit(lambda key: jax.random.normal(key, (n,), jnp.float32))(jax.random.key(0))
        negate = jax.jit(jnp.negative)
        return 2 * x.nbytes / seconds_of(lambda: negate(x), _repeats(device))


def matmul_rate(device: jax.Device, dtype: jnp.dtype) -> float:
    """FLOPs per second of the product of two square matrices of `dtype`, added up in float32 where that is wider."""
    n = CUBE.get(device.platform, CUBE_DEFAULT)
    precision = jax.lax.Precision.HIGHEST if dtype.itemsize >= 4 else None
    with jax.default_device(device):
        draw = jax.jit(lambda key: jax.random.normal(key, (n, n), jnp.float32).astype(dtype))
        a, b = (draw(key) for key in jax.random.split(jax.random.key(1)))
        multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
        return 2 * n**3 / seconds_of(lambda: multiply(a, b), _repeats(device))


def all_reduce_latency(mesh: Mesh, dtype: jnp.dtype) -> float:
    """Seconds of one sum of a small array over `model`, of many in a chain."""
    size = mesh.shape[MODEL]

    def chain(x: jax.Array) -> jax.Array:
        for _ in range(CHAIN):
            x = (jax.lax.psum(x, MODEL) / size).astype(x.dtype)
        return x

    x = jax.random.normal(jax.random.key(2), (REDUCED,), jnp.float32).astype(dtype)
    run = jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    x = jax.device_put(x, jax.NamedSharding(mesh, P()))
    return seconds_of(lambda: run(x), 4) / CHAIN


def seconds_of(run: Callable[[], Any], repeats: int, rounds: int = 5) -> float:
    """Seconds of one call of `run`, the median over rounds of `repeats` queued calls."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            out = run()
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - start) / repeats)
    return median(seconds)


def _repeats(device: jax.Device) -> int:
    return REPEATS.get(device.platform, REPEATS_DEFAULT)


def _free_bytes(device: jax.Device) -> int | None:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return max(0, stats["bytes_limit"] - stats.get("bytes_in_use", 0))
