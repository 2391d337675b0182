"""Reads a checkpoint into sharded weights: each process reads the shards of its own devices and nothing else."""

import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from ..config import LlamaConfig
from ..errors import CheckpointError
from ..mesh import check_mesh
from ..sharding import MODEL, named_sharding
from ..weights import WeightSpec, XfmrWeights, weight_specs
from .layout import Piece, canonical_shapes, shard_pieces
from .source import CheckpointSource, shorten

THREADS = 8
MAX_BYTES_IN_FLIGHT = 512 << 20
BLOCK_BYTES = 16 << 20  # of one thread's reads: a large shard keeps all threads busy
ALIGNMENT = 64  # bytes; JAX on CPU takes an array that is aligned like this as it is, without a copy

Bounds = tuple[tuple[int, int], ...]  # start and stop per axis


class _Plan(NamedTuple):
    """What this process reads of one stored array: the pieces of each distinct shard."""

    spec: WeightSpec
    sharding: NamedSharding
    shards: dict[Bounds, list[Piece]]

    @property
    def host_bytes(self) -> int:
        return len(self.shards) * math.prod(self.sharding.shard_shape(self.spec.shape)) * self.spec.dtype.itemsize


class _Reading(NamedTuple):
    """A plan under way: buffers that are being filled."""

    plan: _Plan
    buffers: dict[Bounds, np.ndarray]
    reads: list[Future[int]]


def load_weights(
    source: CheckpointSource,
    config: LlamaConfig,
    *,
    mesh: Mesh,
    progress: bool = True,
    threads: int = THREADS,
    max_bytes_in_flight: int = MAX_BYTES_IN_FLIGHT,
) -> XfmrWeights:
    """The weights of `source` on `mesh`, in `config.dtype`.

    Every process reads the shards of its own devices, once where `data` repeats them. Between the files and the
    devices the host holds at most `max_bytes_in_flight` bytes, or one stored array if that is more. `progress`
    shows a bar when standard error is a terminal. Raises CheckpointError when the checkpoint's tensors are not
    those of `config`, before anything is read, and MeshError when the mesh does not fit.
    """
    check_mesh(config, mesh)
    check_tensors(source, config)
    plans, tree = _plan(config, mesh)
    total = sum(_source_bytes(source, pieces) for plan in plans for pieces in plan.shards.values())
    start = time.perf_counter()
    arrays: list[jax.Array] = []
    under_way: deque[_Reading] = deque()
    in_flight = 0
    show = progress and sys.stderr.isatty()
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=not show) as bar,
    ):
        for plan in plans:
            while under_way and in_flight + plan.host_bytes > max_bytes_in_flight:
                in_flight -= under_way[0].plan.host_bytes
                arrays.append(_finish(under_way.popleft(), bar))
            under_way.append(_start(plan, source, pool))
            in_flight += plan.host_bytes
        while under_way:
            arrays.append(_finish(under_way.popleft(), bar))
    seconds = time.perf_counter() - start
    logging.info(
        "Loaded %s: %.2f GB in %.1f s (%.2f GB/s).", source.location, total / 1e9, seconds, total / 1e9 / seconds
    )
    return jax.tree.unflatten(tree, arrays)


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


def _plan(config: LlamaConfig, mesh: Mesh) -> tuple[list[_Plan], jax.tree_util.PyTreeDef]:
    leaves, tree = jax.tree_util.tree_flatten_with_path(weight_specs(config, mesh.shape[MODEL]))
    plans = []
    for path, spec in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        sharding = named_sharding(mesh, spec.name)
        shards = {}
        for index in sharding.addressable_devices_indices_map(spec.shape).values():
            if _bounds(index, spec.shape) not in shards:
                shards[_bounds(index, spec.shape)] = shard_pieces(config, name, spec.shape, index)
        plans.append(_Plan(spec, sharding, shards))
    return plans, tree


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _source_bytes(source: CheckpointSource, pieces: list[Piece]) -> int:
    return sum(
        math.prod(s.stop - s.start for s in piece.source) * source.tensors[piece.tensor].dtype.itemsize
        for piece in pieces
    )


def _start(plan: _Plan, source: CheckpointSource, pool: ThreadPoolExecutor) -> _Reading:
    """Hands the reads of one stored array to the threads, in blocks of rows."""
    shape = plan.sharding.shard_shape(plan.spec.shape)
    # Fresh buffers for every array: on CPU they become the array's own memory.
    buffers = {bounds: _aligned_zeros(shape, plan.spec.dtype) for bounds in plan.shards}
    reads = [
        pool.submit(source.read, piece.tensor, slices, out)
        for bounds, pieces in plan.shards.items()
        for piece in pieces
        for slices, out in _row_blocks(piece, piece.view(buffers[bounds]))
    ]
    return _Reading(plan, buffers, reads)


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + ALIGNMENT, np.uint8)  # large ones come zeroed from the system and cost nothing here
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _row_blocks(piece: Piece, view: np.ndarray) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Splits a piece and its place in the shard along their first axis."""
    first, *rest = piece.source
    step = max(1, BLOCK_BYTES * len(view) // view.nbytes)
    for row in range(0, len(view), step):
        rows = slice(first.start + row, min(first.start + row + step, first.stop))
        yield (rows, *rest), view[row : row + step]


def _finish(reading: _Reading, bar: tqdm) -> jax.Array:
    """Waits for the reads and makes the array. The buffers are free to go when its transfer is done."""
    for read in reading.reads:
        bar.update(read.result())
    spec, sharding, _ = reading.plan
    array = jax.make_array_from_callback(
        spec.shape, sharding, lambda index: reading.buffers[_bounds(index, spec.shape)], dtype=spec.dtype
    )
    return array.block_until_ready()
