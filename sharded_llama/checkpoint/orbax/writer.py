"""Writes an orbax item from a stream of blocks, in a memory of a few chunks.

It is what `source` describes: zarr 2 arrays, zstd, that `orbax.checkpoint.StandardCheckpointer` restores as plain
arrays or into any sharding. Weights that live on a mesh are saved by `live`.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np

from ...errors import CheckpointError
from ..folders import sync
from ..source import TensorInfo, TensorSequence
from .source import COMMIT, METADATA, WEIGHTS, import_tensorstore
from .zarr import ZARR2_DTYPES

__all__ = ["CHUNK_BYTES", "WEIGHTS", "OrbaxWriter", "chunk_shape", "write_metadata"]

CHUNK_BYTES = 16 << 20
STRIP_BYTES = 32 << 20  # rows of a matrix whose columns are split, buffered until its chunks are full
COLUMN_PARTS = 8
SPLIT_BY_COLUMNS = ("wo", "w2")  # over devices: their chunks are narrow, so that a device's columns are few chunks
DTYPE_CODES = {dtype: code for code, dtype in ZARR2_DTYPES.items()}


def chunk_shape(name: str, info: TensorInfo) -> tuple[int, ...]:
    """The chunks of a canonical tensor: about CHUNK_BYTES of whole rows, or narrower where devices split columns."""
    shape = tuple(max(1, n) for n in info.shape)
    row_bytes = int(np.prod(shape[1:])) * info.dtype.itemsize
    if name.rpartition(".")[2] in SPLIT_BY_COLUMNS and info.nbytes > CHUNK_BYTES:
        rows = min(shape[0], max(1, STRIP_BYTES // row_bytes))
        return rows, -(-shape[1] // COLUMN_PARTS)
    return min(shape[0], max(1, CHUNK_BYTES // row_bytes)), *shape[1:]


class OrbaxWriter:
    """Writes canonical tensors as the new orbax item `folder`, a context manager.

    The arrays are files of their own (no OCDBT database: that one rewrites its index with every chunk, or holds all
    chunks in memory until the end). Memory beyond the caller's block: twice STRIP_BYTES, once compressed. On a normal
    exit the item is complete and durable; on an exception the folder is left as it is, and is recognised as
    incomplete.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self._ts = import_tensorstore()
        self._folder = Path(os.path.abspath(folder))
        self._tensors = dict(tensors)
        for name, info in self._tensors.items():
            if info.dtype not in DTYPE_CODES:
                raise ValueError(f"{name}: {info.dtype} is not one of {', '.join(map(str, DTYPE_CODES))}.")
        self._sequence = TensorSequence(self._tensors)
        self._array: _ArrayWriter | None = None
        self._name: str | None = None
        self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, block: np.ndarray) -> None:
        """Appends whole rows (first axis) to tensor `name`.

        Raises ValueError when another tensor, dtype or number of rows is due, and CheckpointError when writing fails.
        """
        info = self._tensors.get(name)
        if info is not None and block.shape[1:] != info.shape[1:]:
            raise ValueError(
                f"{name}: a block has shape {block.shape}, but the tensor {info.shape}: whole rows are due."
            )
        self._sequence.advance(name, block)
        try:
            if name != self._name:
                self._name, self._array = name, _ArrayWriter(self._ts, self._folder / name, name, self._tensors[name])
            self._array.append(block)
        except Exception as e:  # tensorstore raises various types
            raise CheckpointError(f"{self._folder / name}: cannot be written: {e}") from e

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            return
        self._sequence.finish()
        try:
            for name in self._tensors:
                sync(self._folder / name)
            write_metadata(self._folder, _tree_metadata(self._tensors))
        except OSError as e:
            raise CheckpointError(f"{self._folder}: cannot be written: {e}") from e


class _ArrayWriter:
    """One array: collects rows until its chunks are full, compresses and writes them."""

    def __init__(self, ts: ModuleType, folder: Path, name: str, info: TensorInfo) -> None:
        chunks = chunk_shape(name, info)
        metadata = {
            "shape": list(info.shape),
            "chunks": list(chunks),
            "dtype": DTYPE_CODES[info.dtype],
            "compressor": {"id": "zstd", "level": 1},
            "dimension_separator": ".",
            "fill_value": None,
            "filters": None,
            "order": "C",
            "zarr_format": 2,
        }
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{folder}/"},
            "metadata": metadata,
            "store_data_equal_to_fill_value": True,  # a chunk that is not there is a chunk that is missing
            "create": True,
            "delete_existing": True,
        }
        self._store = ts.open(spec, context=ts.Context({"cache_pool": {"total_bytes_limit": 0}})).result()
        self._strip = chunks[0]
        self._buffer = np.empty((min(self._strip, info.shape[0]), *info.shape[1:]), info.dtype)
        self._rows = info.shape[0]
        self._done = 0  # rows given so far

    def append(self, block: np.ndarray) -> None:
        while len(block):
            filled = self._done % self._strip
            rows = min(self._strip - filled, self._rows - self._done)  # that complete the strip
            if not filled and len(block) >= rows:
                self._write(block[:rows], self._done)  # no need to collect
            else:
                self._buffer[filled : filled + len(block[:rows])] = block[:rows]
                if len(block) >= rows:
                    self._write(self._buffer[: filled + rows], self._done - filled)
            self._done += min(rows, len(block))
            block = block[rows:]

    def _write(self, strip: np.ndarray, first: int) -> None:
        self._store[first : first + len(strip)].write(strip).result()


def _tree_metadata(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The contents of _METADATA for arrays that are files (orbax: `InternalTreeMetadata.to_json`)."""
    dictionary_key = 2  # KeyType.DICT
    tree = {}
    for name in tensors:
        keys = name.split(".")
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": dictionary_key} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def write_metadata(item: Path, tree: dict[str, Any]) -> None:
    """Marks an item as complete: its tree, then the commit. Raises OSError."""
    now = time.time_ns()
    commit = {
        "item_handlers": "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler",
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": {},
    }
    for name, content in ((METADATA, tree), (COMMIT, commit)):
        (item / name).write_text(json.dumps(content))
        sync(item / name)
    sync(item)
