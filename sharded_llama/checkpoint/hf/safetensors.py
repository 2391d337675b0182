"""Hugging Face safetensors: one `model.safetensors`, or shards with `model.safetensors.index.json`.

A file is the header's length (8 bytes, little endian), the header (JSON: name -> dtype, shape, byte range),
and the tensors' bytes (https://huggingface.co/docs/safetensors). Headers are checked completely when a
checkpoint is opened, at least as strictly as by the reference implementation; tensor bytes are read by slice, and only
those that are asked for.
"""

import json
import math
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from ...config import LlamaConfig
from ...errors import CheckpointError
from ..files import FileTensor, check_regular, read_slices
from ..names import HF_NAMES, to_canonical, to_stored
from ..source import TensorInfo, TensorSequence, shorten

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}

METADATA = "__metadata__"  # of a header: free text, strings by name
CHECKPOINT_METADATA = MappingProxyType({"format": "pt"})  # transformers refuses files that do not say so
ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}

MAX_HEADER_BYTES = 16 << 20  # some 100,000 tensors. The reference has 100 MB, but parsing can take 30 times the memory
MAX_DIMS = 32  # what every NumPy can hold
MAX_INTEGER = 2**63 - 1


@dataclass(frozen=True)
class SafetensorsSource:
    """An opened safetensors checkpoint: a `CheckpointSource`."""

    format: ClassVar[str] = "Hugging Face safetensors"
    location: str
    tensors: dict[str, FileTensor]

    def read_config(self) -> LlamaConfig:
        """See `CheckpointSource.read_config`."""
        return LlamaConfig.from_hf(self.location)

    def stored_name(self, name: str) -> str:
        """The Hugging Face name of canonical tensor `name`."""
        return to_stored(name, HF_NAMES)

    def read(self, name: str, slices: tuple[slice, ...], out: np.ndarray) -> int:
        """See `CheckpointSource.read`."""
        return read_slices(self.tensors[name], slices, out, to_stored(name, HF_NAMES))


def open_safetensors(folder: Path) -> SafetensorsSource:
    """Reads and checks the headers of the safetensors checkpoint in `folder`.

    Raises CheckpointError naming the file and the tensor that is missing, truncated, malformed, or of a dtype
    that is not supported.
    """
    single = os.path.lexists(folder / SINGLE_FILE)
    stored = read_header(folder / SINGLE_FILE) if single else _read_shards(folder / INDEX_FILE)
    tensors: dict[str, FileTensor] = {}
    for stored_name, tensor in stored.items():
        name = to_canonical(stored_name, HF_NAMES)
        if to_stored(name, HF_NAMES) != stored_name:
            raise CheckpointError(f"{tensor.file}: tensor {stored_name} should be called {to_stored(name, HF_NAMES)}.")
        tensors[name] = tensor
    if not tensors:
        raise CheckpointError(f"{folder / (SINGLE_FILE if single else INDEX_FILE)}: holds no tensors.")
    return SafetensorsSource(str(folder), tensors)


def read_index(index: Path) -> dict[str, list[str]]:
    """The names of the tensors in each file that an index names, without derived buffers.

    Raises CheckpointError when it is malformed, or names what is not a .safetensors file beside it.
    """
    check_regular(index)
    try:
        with open(index, "rb") as f:
            text = f.read(MAX_HEADER_BYTES + 1)
        if len(text) > MAX_HEADER_BYTES:
            raise ValueError(f"it has more than {MAX_HEADER_BYTES} bytes")
        weight_map = _parse_json(text)["weight_map"]
        names_of: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            if not _is_derived(name):
                names_of.setdefault(file, []).append(name)
    except OSError as e:
        raise CheckpointError(f"{index}: cannot be read: {e.strerror}.") from e
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as e:
        problem = f" ({e})" if isinstance(e, ValueError) else ""
        raise CheckpointError(
            f"{index}: is not an index: it needs a weight_map of tensor name -> file name{problem}."
        ) from e
    for file in names_of:
        # A name, not a path: an index must not reach outside its folder.
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: weight_map names {file!r}, which is not a .safetensors file beside it.")
    return names_of


def _read_shards(index: Path) -> dict[str, FileTensor]:
    """The tensors of all the files that an index names."""
    names_of = read_index(index)
    missing = [file for file in sorted(names_of) if not os.path.isfile(index.parent / file)]
    if missing:
        raise CheckpointError(f"{index.parent}: {len(missing)} of {len(names_of)} shards missing: {shorten(missing)}.")
    tensors: dict[str, FileTensor] = {}
    for file, names in sorted(names_of.items()):
        header = read_header(index.parent / file)
        absent = [name for name in names if name not in header]
        if absent:
            raise CheckpointError(
                f"{index.parent / file}: lacks tensors that the index says it has: {shorten(absent)}."
            )
        tensors |= {name: header[name] for name in names}
    return tensors


def _is_derived(name: str) -> bool:
    """Old checkpoints store the rotary frequencies, which follow from the config."""
    return name.endswith("rotary_emb.inv_freq")


def _parse_json(data: bytes) -> Any:
    """JSON as the reference implementation's parser takes it, which is stricter than Python's.

    Names that occur twice, which it takes in part, are refused as well: readers differ in which one counts. Raises
    ValueError, or RecursionError for what is nested too deeply.
    """

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        "".join(text for pair in pairs for text in pair if isinstance(text, str)).encode()  # no half of a character
        names = dict(pairs)
        if len(names) != len(pairs):
            raise ValueError("a name occurs twice")
        return names

    def refuse(literal: str) -> None:
        raise ValueError(f"{literal} is not JSON")

    return json.loads(
        data.decode(),
        object_pairs_hook=checked,
        parse_constant=refuse,
        parse_int=lambda text: -0.0 if text == "-0" else int(text),  # it is no whole number there
    )


def read_header(file: Path) -> dict[str, FileTensor]:
    """The tensors of one safetensors file by stored name, without derived buffers.

    Raises CheckpointError when the file is truncated, or its header malformed or at odds with the file's size.
    """
    return read_header_and_metadata(file)[0]


def read_header_and_metadata(file: Path) -> tuple[dict[str, FileTensor], dict[str, str]]:
    """What `read_header` returns, and the file's metadata: text by name, empty where there is none."""
    check_regular(file)
    try:
        with open(file, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{file}: is not a safetensors file: {size} bytes, header length {length}.")
            if 8 + length > size:
                raise CheckpointError(f"{file}: is truncated within its header: {size} bytes of {8 + length} or more.")
            text = f.read(length)
        if text[:1].isspace():
            raise ValueError("it begins with white space")
        header = _parse_json(text)
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read: {e.strerror}.") from e
    except (ValueError, RecursionError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(f"{file}: its header is not JSON: {e}") from e
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its header is not a JSON object.")
    metadata = header.pop(METADATA, None)
    strings = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not strings:
        raise CheckpointError(f"{file}: its {METADATA} is not an object of strings: {reprlib.repr(metadata)}.")
    tensors = {name: _parse_entry(file, 8 + length, name, entry) for name, entry in header.items()}
    _check_layout(file, 8 + length, size, tensors)
    return {name: tensor for name, tensor in tensors.items() if not _is_derived(name)}, metadata or {}


def _parse_entry(file: Path, data_start: int, name: str, entry: Any) -> FileTensor:
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sizes = (*shape, begin, end)
        if type(code) is not str or entry.keys() != ENTRY_FIELDS or len(shape) > MAX_DIMS:
            raise ValueError
        if not all(type(n) is int and 0 <= n <= MAX_INTEGER for n in sizes):
            raise ValueError
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(
            f"{file}: tensor {name} has a malformed header entry, {reprlib.repr(entry)}; it needs just dtype, shape "
            "and data_offsets, with whole numbers from 0 on."
        ) from e
    if code not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name} has dtype {code}, which is not supported; {', '.join(DTYPES)} are. "
            "Quantised checkpoints cannot be read."
        )
    dtype = DTYPES[code]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{file}: tensor {name} of {code} {shape} needs {math.prod(shape) * dtype.itemsize} bytes, "
            f"but the header gives it {end - begin}."
        )
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize > MAX_INTEGER:  # NumPy has no such empty arrays
        raise CheckpointError(f"{file}: tensor {name} has shape {shape}, which is too large.")
    return FileTensor(shape, dtype, file, data_start + begin)


def _check_layout(file: Path, data_start: int, size: int, tensors: Mapping[str, FileTensor]) -> None:
    """Tensors must follow one another without gaps or overlaps, and fill the file."""
    ordered = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    for name, tensor in ordered:
        if tensor.offset + tensor.nbytes > size:
            end = tensor.offset + tensor.nbytes
            raise CheckpointError(f"{file}: is truncated: tensor {name} ends at byte {end}, the file at {size}.")
    end, last = data_start, "the header"
    for name, tensor in ordered:
        if tensor.offset != end:
            raise CheckpointError(
                f"{file}: tensor {name} begins at byte {tensor.offset}, but {last} before it ends at {end}."
            )
        end, last = tensor.offset + tensor.nbytes, name
    if end != size:
        raise CheckpointError(f"{file}: has {size} bytes, but its tensors end at {end}.")


class SafetensorsWriter:
    """Writes a file that holds `tensors` (by stored name): their bytes in that order, each in one or more blocks.

    `metadata` is text by name that stands in the header.
    """

    def __init__(
        self, file: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] = CHECKPOINT_METADATA
    ) -> None:
        header: dict[str, Any] = {METADATA: dict(metadata)}
        end = 0
        for name, info in tensors.items():
            begin, end = end, end + info.nbytes
            header[name] = {"dtype": DTYPE_CODES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start aligned
        self._sequence = TensorSequence(tensors)
        self._file = open(file, "wb")  # noqa: SIM115 (close)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, block: np.ndarray) -> None:
        """Appends the bytes of `block` to tensor `name`. Raises ValueError for what does not come next."""
        self._sequence.advance(name, block)
        self._file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8))

    def close(self, complete: bool = True) -> None:
        """Closes the file; `complete` says that it has to be, and makes it durable."""
        with self._file:
            if complete:
                self._sequence.finish()
                self._file.flush()
                os.fsync(self._file.fileno())  # the rename that follows an export must not outlive the data
