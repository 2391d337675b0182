"""What a process reads: each byte that its shards need, once, and then copied wherever it has to go.

A stored array is read in units that bound how much of it the host holds: the same part of each of its shards. Where
shards need the same part of a tensor (a kv head that is repeated), or neighbouring columns (wo, w2), they share a read.
"""

import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import NamedSharding

from ..config import LlamaConfig
from ..weights import WeightSpec
from .layout import Index, Piece, part_axis, shard_pieces
from .source import CheckpointSource

BLOCK_BYTES = 16 << 20  # of one thread at once: a large tensor keeps all threads busy

Bounds = tuple[tuple[int, int], ...]  # start and stop per axis


class Target(NamedTuple):
    """A piece of a unit's buffer for the shard `shard`."""

    shard: Bounds
    piece: Piece


class Read(NamedTuple):
    """A box of a tensor, and everything that is filled from it."""

    tensor: str
    box: Index
    targets: list[Target]

    def nbytes(self, source: CheckpointSource) -> int:
        """Bytes in the checkpoint."""
        return math.prod(s.stop - s.start for s in self.box) * source.tensors[self.tensor].dtype.itemsize


class Unit(NamedTuple):
    """A part of every shard of a stored array that this process has, and the reads that fill it."""

    start: int  # of the part in a shard, along `part_axis`
    boxes: dict[Bounds, Bounds]  # by shard; both in indices of the whole array
    reads: list[Read]

    def host_bytes(self, itemsize: int) -> int:
        return itemsize * sum(math.prod(b - a for a, b in box) for box in self.boxes.values())


def bounds_of(index: Index, shape: tuple[int, ...]) -> Bounds:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def plan_units(
    config: LlamaConfig, name: str, spec: WeightSpec, sharding: NamedSharding, unit_bytes: int | None
) -> list[Unit]:
    """The units, of about `unit_bytes` each (None: one), that fill this process's shards of the stored array `name`."""
    indices = sharding.addressable_devices_indices_map(spec.shape).values()
    shards = list(dict.fromkeys(bounds_of(index, spec.shape) for index in indices))
    axis, shard_shape = part_axis(name), sharding.shard_shape(spec.shape)
    rows = shard_shape[axis]
    step = rows
    if unit_bytes is not None:
        step = _even_step(rows, -(-len(shards) * math.prod(shard_shape) * spec.dtype.itemsize // unit_bytes))
    units = []
    for start in range(0, rows, step):
        boxes = {shard: _part(shard, axis, start, step) for shard in shards}
        units.append(Unit(start, boxes, _merge(config, name, spec.shape, boxes)))
    return units


def _even_step(rows: int, parts: int) -> int:
    """Rows of a part when `rows` are split into `parts`, or into a few more where these are equal."""
    parts = min(parts, rows)
    return next((rows // n for n in range(parts, 2 * parts) if rows % n == 0), rows // parts)


def _part(shard: Bounds, axis: int, start: int, step: int) -> Bounds:
    first, stop = shard[axis]
    return (*shard[:axis], (first + start, min(first + start + step, stop)), *shard[axis + 1 :])


def _merge(config: LlamaConfig, name: str, shape: tuple[int, ...], boxes: dict[Bounds, Bounds]) -> list[Read]:
    """One read for all pieces that have the same rows of a tensor and columns that meet."""
    targets = [
        Target(shard, piece)
        for shard, box in boxes.items()
        for piece in shard_pieces(config, name, shape, tuple(slice(*b) for b in box))
    ]
    targets.sort(key=lambda t: (t.piece.tensor, [(s.start, s.stop) for s in t.piece.source]))
    reads: list[Read] = []
    for target in targets:
        tensor, source = target.piece.tensor, target.piece.source
        last = reads[-1] if reads else None
        if last and last.tensor == tensor and last.box[0] == source[0] and _meet(last.box, source):
            columns = tuple(slice(a.start, max(a.stop, b.stop)) for a, b in zip(last.box[1:], source[1:], strict=True))
            reads[-1] = Read(tensor, (last.box[0], *columns), [*last.targets, target])
        else:
            reads.append(Read(tensor, source, [target]))
    return reads


def _meet(box: Index, later: Index) -> bool:
    """Whether the columns of `later`, which begin no earlier, overlap or touch those of `box`."""
    return all(b.start <= a.stop for a, b in zip(box[1:], later[1:], strict=True))


class Scratch(threading.local):
    """Memory of each thread for a block that goes to several places; used again and again."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = math.prod(shape) * dtype.itemsize
        if self._memory.size < size:
            self._memory = np.empty(max(size, BLOCK_BYTES), np.uint8)
        return self._memory[:size].view(dtype).reshape(shape)


def split_rows(read: Read, buffers: dict[Bounds, np.ndarray]) -> Iterator[tuple[Index, list[tuple[Index, np.ndarray]]]]:
    """Cuts a read into blocks of rows: (box of the tensor, [(part of that box, where it goes in `buffers`)])."""
    rows, *columns = read.box
    places = [
        (
            tuple(slice(s.start - c.start, s.stop - c.start) for s, c in zip(piece.source[1:], columns, strict=True)),
            piece.view(buffers[shard]),
        )
        for shard, piece in read.targets
    ]
    row_bytes = math.prod(c.stop - c.start for c in columns) * places[0][1].dtype.itemsize
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        block = slice(start - rows.start, stop - rows.start)
        parts = [((slice(None), *part), view[block]) for part, view in places]
        yield (slice(start, stop), *columns), parts


def read_block(
    source: CheckpointSource, tensor: str, box: Index, parts: list[tuple[Index, np.ndarray]], scratch: Scratch
) -> int:
    """Reads a block and copies it to where it goes. Returns the bytes read from the checkpoint."""
    shape = tuple(s.stop - s.start for s in box)
    first = parts[0][1]
    if first.shape == shape:  # where the whole block goes: at best the only place
        whole, rest = first, parts[1:]
    else:
        whole, rest = scratch.array(shape, first.dtype), parts
    count = source.read(tensor, box, whole)
    for part, view in rest:
        np.copyto(_bits(view), _bits(whole)[part])
    return count


def _bits(array: np.ndarray) -> np.ndarray:
    """The same memory as integers, which NumPy copies faster than bfloat16."""
    return array.view(f"u{array.dtype.itemsize}")
