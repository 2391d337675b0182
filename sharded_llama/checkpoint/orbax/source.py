"""Orbax checkpoints of canonical tensors: a tree of zarr arrays that tensorstore reads chunk by chunk.

A checkpoint folder holds config.json and the tokenizer, and in `weights/` the orbax item: the tensors as a nested
dict, `{"tok_embeddings", "layers": {"0": {"wq", ...}}, "norm", "output"}`, in the form that
`orbax.checkpoint.StandardCheckpointer().restore(folder / "weights")` reads. The item itself is accepted too, with
config.json in it or beside it.

tensorstore reads a chunk that is not there as zeros, trusts sizes that a description claims and follows whatever
path it is given. So opening lists every stored value and checks them first (`keys`, `zarr`).
"""

import ctypes
import itertools
import json
import math
import os
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...config import LlamaConfig
from ...errors import CheckpointError
from ..source import TensorInfo, shorten
from .keys import MANIFEST, Value, file_size, ocdbt_values, plain_values
from .zarr import ZarrArray, check_chunk, check_sizes, is_file_name, parse_zarr

WEIGHTS = "weights"  # the item within a checkpoint folder
METADATA = "_METADATA"
COMMIT = "_CHECKPOINT_METADATA"
TEMPORARY = ".orbax-checkpoint-tmp"  # in the names of folders that orbax has not finished

MAX_METADATA_BYTES = 64 << 20
MAX_DESCRIPTION_BYTES = 1 << 20
READS_UNTIL_RELEASE = 4
MIN_CACHE_BYTES, MAX_CACHE_BYTES = 64 << 20, 256 << 20

ARRAYS = ("jax.Array", "np.ndarray")
EMPTY = ("None", "Dict", "List", "Tuple", "NamedTuple")  # nodes of a tree that hold no array


def import_tensorstore() -> types.ModuleType:
    """tensorstore, which comes with orbax. Raises CheckpointError when it is not installed."""
    try:
        import tensorstore
    except ImportError as e:
        raise CheckpointError(
            f"orbax checkpoints need another package: pip install 'sharded_llama[orbax]' ({e})."
        ) from e
    return tensorstore


@dataclass(frozen=True)
class OrbaxTensor(TensorInfo):
    """A stored array: its description, where its chunks stand, and tensorstore's handle of it."""

    array: ZarrArray
    values: Mapping[str, Value]  # by chunk key; a key is missing only where the checkpoint may leave zeros out
    complete: bool  # every chunk must be stored
    store: Any
    checked: set[str] = field(default_factory=set)  # chunks that have been looked at


@dataclass(frozen=True)
class OrbaxSource:
    """An opened orbax checkpoint: a `CheckpointSource`."""

    format: ClassVar[str] = "orbax"
    location: str
    tensors: dict[str, OrbaxTensor]
    config_folder: Path
    reads: Iterator[int] = field(default_factory=itertools.count)  # counts them

    def read_config(self) -> LlamaConfig:
        """See `CheckpointSource.read_config`."""
        return LlamaConfig.from_hf(self.config_folder)

    def stored_name(self, name: str) -> str:
        """Orbax's name of canonical tensor `name` is the same."""
        return name

    def read(self, name: str, slices: tuple[slice, ...], out: np.ndarray) -> int:
        """See `CheckpointSource.read`. Decodes one chunk at a time, and those only that hold a part of the slices."""
        tensor = self.tensors[name]
        bounds = [s.indices(n)[:2] for s, n in zip(slices, tensor.shape, strict=True)]
        shape = tuple(stop - start for start, stop in bounds)
        if out.shape != shape:
            raise ValueError(f"{name}: out has shape {out.shape}, the slices have {shape}.")
        for index in tensor.array.indices(bounds):
            box = tuple(
                slice(max(start, i * c), min(stop, (i + 1) * c))
                for (start, stop), i, c in zip(bounds, index, tensor.array.chunk, strict=True)
            )
            target = tuple(slice(s.start - a, s.stop - a) for s, (a, _) in zip(box, bounds, strict=True))
            _copy(self._read_chunk(tensor, name, index, box), out[(*target, ...)])  # a view, even of a scalar
        if next(self.reads) % READS_UNTIL_RELEASE == 0:
            _release_memory()
        return out.size * tensor.dtype.itemsize

    def _read_chunk(self, tensor: OrbaxTensor, name: str, index: tuple[int, ...], box: tuple[slice, ...]) -> np.ndarray:
        key = tensor.array.key(index)
        where = f"{self.location}: chunk {key} of tensor {name}"
        if key not in tensor.checked and key in tensor.values:
            value = tensor.values[key]
            check_chunk(tensor.array, value.length, value.at, tensor.complete, where)
            tensor.checked.add(key)
        try:
            return tensor.store[box].read().result()
        except Exception as e:  # tensorstore raises various types for what it cannot read
            raise CheckpointError(f"{where}: cannot be read: {str(e)[:300]}") from e


def _release_memory() -> None:
    """Hands back to the system what threads have freed: glibc keeps tens of MB of decoded chunks for each of them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _copy(source: np.ndarray, out: np.ndarray) -> None:
    if source.dtype == out.dtype and out.ndim:  # bits are bits: NumPy copies integers faster than bfloat16
        bits = f"u{source.dtype.itemsize}"
        source, out = source.view(bits), out.view(bits)
    np.copyto(out, source, casting="unsafe")


def is_orbax(folder: Path) -> bool:
    """Whether `folder` is or holds an orbax checkpoint, be it complete or not."""
    folder = Path(os.path.abspath(folder))
    if _is_temporary(folder) or any(folder.glob(f"*{TEMPORARY}*")):
        return True
    return any((item / name).exists() for item in (folder / WEIGHTS, folder) for name in (METADATA, COMMIT, MANIFEST))


def _is_temporary(folder: Path) -> bool:
    return any(TEMPORARY in path.name for path in (folder, folder.parent))


def open_orbax(folder: Path) -> OrbaxSource:
    """Lists and checks what the orbax checkpoint in `folder` stores; reads no weights.

    Raises CheckpointError, naming the file, when orbax or tensorstore is missing, when the checkpoint was not finished
    or lacks files or chunks, and when its metadata are damaged, ask for more than is stored or leave the folder.
    """
    ts = import_tensorstore()
    folder = Path(os.path.abspath(folder))
    item = folder / WEIGHTS if (folder / WEIGHTS).is_dir() else folder
    if _is_temporary(folder):
        raise CheckpointError(
            f"{folder} is the temporary folder of a save that was not finished; use another checkpoint."
        )
    if not (item / METADATA).exists():
        unfinished = next(iter(folder.glob(f"*{TEMPORARY}*")), None)
        why = f"; {unfinished.name} is what a save left that was not finished" if unfinished else ""
        raise CheckpointError(f"{item / METADATA} is missing: the orbax checkpoint is incomplete{why}.")
    _check_commit(item / COMMIT)
    metadata = _read_json(item / METADATA)
    names = _tensor_names(metadata, item / METADATA)
    ocdbt, zarr3 = metadata.get("use_ocdbt"), metadata.get("use_zarr3", False)
    ocdbt = os.path.lexists(item / MANIFEST) if ocdbt is None else ocdbt
    complete = metadata.get("store_array_data_equal_to_fill_value", False)
    if not all(type(flag) is bool for flag in (ocdbt, zarr3, complete)):
        raise CheckpointError(
            f"{item / METADATA}: use_ocdbt, use_zarr3 and store_array_data_... must be true or false."
        )
    stored = ocdbt_values(item) if ocdbt else plain_values(item, names)
    tensors = _open_tensors(ts, item, names, stored, ocdbt, zarr3, complete)
    here = item is not folder or (item / "config.json").exists()
    return OrbaxSource(str(folder), tensors, folder if here else folder.parent)


def _read_json(file: Path) -> dict[str, Any]:
    size = file_size(file)
    if size > MAX_METADATA_BYTES:
        raise CheckpointError(f"{file}: has {size} bytes; metadata have {MAX_METADATA_BYTES} at most.")
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{file}: is not JSON: {str(e)[:300]}") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: is not a JSON object.")
    return content


def _check_commit(file: Path) -> None:
    """Orbax notes the time of the commit when everything else is done; older checkpoints have no such file."""
    if not os.path.lexists(file):
        return
    committed = _read_json(file).get("commit_timestamp_nsecs")
    if type(committed) is not int or committed <= 0:
        raise CheckpointError(f"{file}: the checkpoint was not finished: its commit_timestamp_nsecs is {committed!r}.")


def _tensor_names(metadata: dict[str, Any], file: Path) -> list[str]:
    """The arrays of the tree, keys joined by dots as orbax names them."""
    try:
        names: dict[str, None] = {}
        for entry in metadata["tree_metadata"].values():
            keys = [key["key"] for key in entry["key_metadata"]]
            kind, name = entry["value_metadata"]["value_type"], ".".join(keys)
            if kind in EMPTY:
                continue
            if kind not in ARRAYS or entry["value_metadata"].get("skip_deserialize") not in (None, False):
                raise CheckpointError(f"{file}: {name} is a {kind!r}; arrays are expected.")
            if not is_file_name(name) or name in names:
                raise CheckpointError(f"{file}: {name!r} is not the name of an array, or stands there twice.")
            name.encode()  # no path otherwise
            names[name] = None
    except (KeyError, TypeError, AttributeError, UnicodeError) as e:
        raise CheckpointError(f"{file}: its tree_metadata are malformed: {type(e).__name__}: {str(e)[:200]}") from e
    if not names:
        raise CheckpointError(f"{file}: lists no arrays.")
    return list(names)


def _open_tensors(
    ts: types.ModuleType,
    item: Path,
    names: list[str],
    stored: dict[str, Value],
    ocdbt: bool,
    zarr3: bool,
    complete: bool,
) -> dict[str, OrbaxTensor]:
    of_array: dict[str, dict[str, Value]] = {name: {} for name in names}
    for key, value in stored.items():
        name, _, rest = key.partition("/")
        if name in of_array:
            of_array[name][rest] = value
    arrays = {name: _describe(item, name, of_array[name], zarr3, complete) for name in names}
    # The decoded chunks that neighbouring reads share. Chunks beyond it, which neither this package nor orbax on
    # several devices writes, are decoded again for every block that is read of them.
    cache = min(max(2 * max(array.chunk_bytes for array in arrays.values()), MIN_CACHE_BYTES), MAX_CACHE_BYTES)
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache}, "file_io_concurrency": {"limit": 16}})
    tensors = {}
    for name, array in arrays.items():
        try:
            store = ts.open(_spec(item, name, array, ocdbt, complete), context=context).result()
        except Exception as e:  # tensorstore raises various types for what it cannot open
            raise CheckpointError(f"{item}: tensor {name} cannot be opened: {str(e)[:300]}") from e
        if (store.shape, store.dtype.name) != (array.shape, array.dtype.name):
            raise CheckpointError(f"{item}: tensor {name} is {store.dtype.name} {store.shape} to tensorstore.")
        tensors[name] = OrbaxTensor(array.shape, array.dtype, array, of_array[name], complete, store)
    return tensors


def _describe(item: Path, name: str, values: dict[str, Value], zarr3: bool, complete: bool) -> ZarrArray:
    """The description of an array, held against the chunks that are stored of it."""
    file = "zarr.json" if zarr3 else ".zarray"
    where = f"{item}: {file} of tensor {name}"
    if file not in values:
        raise CheckpointError(f"{where} is missing: the checkpoint is incomplete.")
    if values[file].length > MAX_DESCRIPTION_BYTES:
        raise CheckpointError(f"{where}: has {values[file].length} bytes; it is no array description.")
    try:
        text = values[file].at(0, MAX_DESCRIPTION_BYTES)
    except OSError as e:
        raise CheckpointError(f"{where}: cannot be read: {e}") from e
    array = parse_zarr(text, zarr3, where)
    chunks = values.keys() - {file}
    check_sizes(array, max((values[key].length for key in chunks), default=0), where)
    count = math.prod(array.grid)
    if complete and count > len(chunks):  # a grid may be huge: it is not walked through
        raise CheckpointError(
            f"{item}: tensor {name} has {len(chunks)} of {count} chunks: the checkpoint is incomplete."
        )
    lacking = [key for key in map(array.key, array.indices()) if key not in chunks] if complete else []
    if lacking:
        raise CheckpointError(
            f"{item}: tensor {name} lacks {len(lacking)} of {count} chunks: {shorten(lacking)}: "
            "the checkpoint is incomplete."
        )
    return array


def _spec(item: Path, name: str, array: ZarrArray, ocdbt: bool, complete: bool) -> dict[str, Any]:
    """tensorstore's spec of an array, which names no place outside `item`."""
    base = {"driver": "file", "path": f"{item}/" if ocdbt else f"{item}/{name}/"}
    return {
        "driver": array.driver,
        "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"} if ocdbt else base,
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
        "fill_missing_data_reads": not complete,
        "open": True,
    }
