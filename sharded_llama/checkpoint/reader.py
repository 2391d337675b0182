"""Reads a checkpoint into sharded weights: each process reads the shards of its own devices and nothing else."""

import functools
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tqdm import tqdm

from ..config import LlamaConfig
from ..errors import CheckpointError
from ..mesh import check_mesh
from ..sharding import MODEL, named_sharding
from ..weights import WeightSpec, XfmrWeights, weight_specs
from .layout import canonical_shapes, part_axis
from .reads import Bounds, Scratch, Unit, bounds_of, plan_units, read_block, split_rows
from .source import CheckpointSource, shorten

THREADS = min(16, max(4, os.cpu_count() or 1))  # an H200's host reads 20 GB/s with 8, 26 with 16
UPLOADS = 4  # at once: one alone runs at half of the speed
MAX_BYTES_IN_FLIGHT = 384 << 20
MAX_BYTES_IN_FLIGHT_CPU = 4 << 30  # of the arrays themselves: enough that no thread waits for the last block of one
UNIT_BYTES = 64 << 20  # larger arrays are assembled on their devices: one large upload is several times slower
ALIGNMENT = 64  # bytes; JAX on CPU takes an array that is aligned like this as it is, without a copy


class ReadStats(NamedTuple):
    """What a load read from the checkpoint."""

    nbytes: int
    seconds: float

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / 1e9 / self.seconds


class _Stored(NamedTuple):
    """A stored array, and how this process reads its shards of it."""

    spec: WeightSpec
    sharding: NamedSharding
    axis: int  # along which the units follow one another
    units: list[Unit]


class _Reading(NamedTuple):
    """A unit under way: buffers that are being filled, and then uploaded."""

    stored: _Stored
    unit: Unit
    reads: list[Future[int]]
    upload: Future[jax.Array]

    @property
    def host_bytes(self) -> int:
        return self.unit.host_bytes(self.stored.spec.dtype.itemsize)


def load_weights(
    source: CheckpointSource,
    config: LlamaConfig,
    *,
    mesh: Mesh,
    progress: bool = True,
    threads: int = THREADS,
    max_bytes_in_flight: int | None = None,
) -> XfmrWeights:
    """The weights of `source` on `mesh`, in `config.dtype`.

    Every process reads the bytes that the shards of its own devices need, each of them once. Between the files and
    the devices the host holds at most `max_bytes_in_flight` bytes (MAX_BYTES_IN_FLIGHT) and one part of an array
    (UNIT_BYTES) more, and `threads` times 16 MiB. On CPU what is read is the array's own memory, and the bound higher.
    `progress` shows a bar when standard error is a terminal.

    Raises CheckpointError when the checkpoint's tensors are not those of `config`, before anything is read, and
    MeshError when the mesh does not fit.
    """
    weights, stats = read_weights(
        source, config, mesh=mesh, progress=progress, threads=threads, max_bytes_in_flight=max_bytes_in_flight
    )
    logging.info(
        "Loaded %s (%s): %.2f GB in %.1f s (%.2f GB/s).",
        source.location,
        source.format,
        stats.nbytes / 1e9,
        stats.seconds,
        stats.gb_per_s,
    )
    return weights


def read_weights(
    source: CheckpointSource,
    config: LlamaConfig,
    *,
    mesh: Mesh,
    progress: bool = True,
    threads: int = THREADS,
    max_bytes_in_flight: int | None = None,
) -> tuple[XfmrWeights, ReadStats]:
    """`load_weights`, and what it read."""
    check_mesh(config, mesh)
    check_tensors(source, config)
    plans, tree = _plan(config, mesh)
    if max_bytes_in_flight is None:
        max_bytes_in_flight = MAX_BYTES_IN_FLIGHT if _unit_bytes(mesh) else MAX_BYTES_IN_FLIGHT_CPU
    total = sum(read.nbytes(source) for stored in plans for unit in stored.units for read in unit.reads)
    start, nbytes = time.perf_counter(), 0
    arrays: list[jax.Array] = []
    show = progress and sys.stderr.isatty()
    with (
        ThreadPoolExecutor(threads) as pool,
        ThreadPoolExecutor(UPLOADS) as uploads,
        tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=not show) as bar,
    ):
        # Arrays of one name are alike. Compiling takes as long as reading the first units.
        assemblies = {
            name: pool.submit(_compile_assembly, stored, jax.config.jax_enable_x64)
            for name, stored in {stored.spec.name: stored for stored in plans if len(stored.units) > 1}.items()
        }
        try:
            for reading in _read_ahead(plans, source, pool, uploads, max_bytes_in_flight):
                for read in reading.reads:
                    count = read.result()
                    nbytes += count
                    bar.update(count)
                stored, unit, part = reading.stored, reading.unit, reading.upload.result()
                if len(stored.units) == 1:
                    arrays.append(part)
                    continue
                assembly = assemblies[stored.spec.name].result()
                if unit is stored.units[0]:
                    arrays.append(assembly.empty())
                arrays[-1] = assembly.write[part.shape](arrays[-1], part, np.int32(unit.start))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            uploads.shutdown(cancel_futures=True)
            raise
    return jax.tree.unflatten(tree, arrays), ReadStats(nbytes, time.perf_counter() - start)


def check_tensors(source: CheckpointSource, config: LlamaConfig) -> None:
    """Raises CheckpointError, naming tensors and shapes, unless `source` holds exactly the model of `config`."""
    expected, found = canonical_shapes(config), source.tensors
    problems = {
        "missing": [f"{source.stored_name(n)} {shape}" for n, shape in expected.items() if n not in found],
        "extra": [
            f"{source.stored_name(n)} {info.shape}"
            for n, info in found.items()
            # An output stored beside tied embeddings goes unused, as in transformers.
            if n not in expected and not (n == "output" and config.tie_embeddings)
        ],
        "misshapen": [
            f"{source.stored_name(n)} is {found[n].shape}, should be {shape}"
            for n, shape in expected.items()
            if n in found and found[n].shape != shape
        ],
    }
    texts = [f"{what} tensors: {shorten(names)}" for what, names in problems.items() if names]
    if texts:
        raise CheckpointError(f"{source.location} does not hold the configured model; {'; '.join(texts)}.")


def _plan(config: LlamaConfig, mesh: Mesh) -> tuple[list[_Stored], jax.tree_util.PyTreeDef]:
    leaves, tree = jax.tree_util.tree_flatten_with_path(weight_specs(config, mesh.shape[MODEL]))
    plans = []
    for path, spec in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        sharding = named_sharding(mesh, spec.name)
        units = plan_units(config, name, spec, sharding, _unit_bytes(mesh))
        plans.append(_Stored(spec, sharding, part_axis(name), units))
    return plans, tree


def _unit_bytes(mesh: Mesh) -> int | None:
    """Bytes of an array on their way at once; None: all, because on CPU they are the array's own memory."""
    return None if mesh.devices.flat[0].platform == "cpu" else UNIT_BYTES


def _read_ahead(
    plans: list[_Stored],
    source: CheckpointSource,
    pool: ThreadPoolExecutor,
    uploads: ThreadPoolExecutor,
    max_bytes: int,
) -> Iterator[_Reading]:
    """The units in order, each when its reads have been handed to the threads, as many ahead as `max_bytes` allow."""
    scratch = Scratch()
    under_way: deque[_Reading] = deque()
    in_flight = 0
    for stored in plans:
        for unit in stored.units:
            while under_way and in_flight > max_bytes:
                in_flight -= under_way[0].host_bytes
                yield under_way.popleft()  # its memory is free when the next one is asked for
            under_way.append(_start(stored, unit, source, pool, uploads, scratch))
            in_flight += under_way[-1].host_bytes
    while under_way:
        yield under_way.popleft()


def _start(
    stored: _Stored,
    unit: Unit,
    source: CheckpointSource,
    pool: ThreadPoolExecutor,
    uploads: ThreadPoolExecutor,
    scratch: Scratch,
) -> _Reading:
    """Hands the reads of a unit to the threads, in blocks of rows, and its upload, which waits for them."""
    # Fresh buffers every time: on CPU they become the array's own memory.
    buffers = {
        shard: _aligned_zeros(tuple(b - a for a, b in box), stored.spec.dtype) for shard, box in unit.boxes.items()
    }
    reads = [
        pool.submit(read_block, source, read.tensor, box, places, scratch)
        for read in unit.reads
        for box, places in split_rows(read, buffers)
    ]
    return _Reading(
        stored, unit, reads, uploads.submit(_upload, stored, unit, buffers, reads, jax.config.jax_enable_x64)
    )


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + ALIGNMENT, np.uint8)  # large ones come zeroed from the system and cost nothing here
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _part_shape(stored: _Stored, unit: Unit) -> tuple[int, ...]:
    """The shape of a unit as an array of its own, with the sharding of the whole one."""
    axis, shape = stored.axis, stored.spec.shape
    start, stop = next(iter(unit.boxes.values()))[axis]
    shards = shape[axis] // stored.sharding.shard_shape(shape)[axis]
    return (*shape[:axis], shards * (stop - start), *shape[axis + 1 :])


def _upload(
    stored: _Stored, unit: Unit, buffers: dict[Bounds, np.ndarray], reads: list[Future[int]], x64: bool
) -> jax.Array:
    """The unit as an array of its own, with the sharding of the whole one. The buffers are free to go then.

    Runs in a thread of its own, which has none of the caller's settings of JAX: `x64` is the one that matters.
    """
    for read in reads:
        read.result()
    spec, sharding, axis, _ = stored
    shape = _part_shape(stored, unit)
    rows, part_rows = (sharding.shard_shape(x)[axis] for x in (spec.shape, shape))

    def part(index: tuple[slice, ...]) -> np.ndarray:
        shard = list(bounds_of(index, shape))
        shard[axis] = tuple(n // part_rows * rows for n in shard[axis])
        return buffers[tuple(shard)]

    with jax.enable_x64(x64):
        return jax.make_array_from_callback(shape, sharding, part, dtype=spec.dtype).block_until_ready()


class _Assembly(NamedTuple):
    """Compiled programs that put an array together on its devices."""

    empty: Callable[[], jax.Array]
    write: dict[tuple[int, ...], Callable[..., jax.Array]]  # by the shape of the part


def _compile_assembly(stored: _Stored, x64: bool) -> _Assembly:
    spec, sharding, axis, units = stored
    with jax.enable_x64(x64):
        empty = jax.jit(functools.partial(jnp.zeros, spec.shape, spec.dtype), out_shardings=sharding)
        # Writes into every shard, in place, without communication.
        write = jax.jit(
            jax.shard_map(
                functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis),
                mesh=sharding.mesh,
                in_specs=(sharding.spec, sharding.spec, P()),
                out_specs=sharding.spec,
            ),
            donate_argnums=0,
        )

        def abstract(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, spec.dtype, sharding=sharding)

        whole, start = abstract(spec.shape), jax.ShapeDtypeStruct((), np.int32)
        shapes = {_part_shape(stored, unit) for unit in units}
        writes = {shape: write.lower(whole, abstract(shape), start).compile() for shape in shapes}
        return _Assembly(empty.lower().compile(), writes)
