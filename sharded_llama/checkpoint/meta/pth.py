"""PyTorch's checkpoints as `torch.save` writes them (.pth, .pt, .bin), read and written without PyTorch.

The file is a zip archive of uncompressed entries (see `zip_archive`), all in one folder: `data.pkl` describes the
tensors (see `pickle_tensors`), `data/{key}` holds the numbers of a storage, `version` and `byteorder` the format's
version and "little". Archives from before PyTorch 2.1 have no `byteorder`.

A file that is read may be hostile: whatever disagrees with itself is refused. Work is linear in the file's size.
"""

import math
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from ...errors import CheckpointError
from ..files import FileTensor, check_regular
from ..source import TensorInfo
from .pickle_tensors import STORAGE_DTYPES, PickledTensor, read_state_dict, show, write_state_dict
from .zip_archive import CHECKSUM_AT, Archive, Entry, central_header, directory_end, local_header

MAX_DIRECTORY_BYTES = 16 << 20  # at most 350,000 entries; one takes some 400 bytes of memory
MAX_PICKLE_BYTES = 64 << 20
MAX_RECORD_BYTES = 64


def read_pth(file: Path) -> dict[str, FileTensor]:
    """The tensors of a checkpoint by name, in the order of its dictionary; their bytes are not read.

    Tensors may share bytes, as tied weights do. Raises CheckpointError naming the file, and the entry, opcode or tensor
    that is damaged, not allowed, or not supported.
    """
    check_regular(file)
    try:
        with open(file, "rb", buffering=0) as f:
            archive = Archive(file, f.fileno(), os.fstat(f.fileno()).st_size)
            entries = archive.entries(MAX_DIRECTORY_BYTES)
            _check_records(archive, entries)
            data = archive.content(entries, "data.pkl", MAX_PICKLE_BYTES)
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read: {e.strerror}.") from e
    pickled = read_state_dict(data, f"{file}: data.pkl")
    return {name: _locate(file, name, tensor, entries) for name, tensor in pickled.items()}


def _check_records(archive: Archive, entries: Mapping[str, Entry]) -> None:
    """Checks the entries that say what kind of archive this is."""
    allowed = {
        "version": rb"0*([1-9]|10)\n?",  # the versions that PyTorch 2 reads; they differ in TorchScript only
        ".data/version": rb"0*([1-9]|10)\n?",
        "byteorder": rb"little",
        ".format_version": rb"\d+",
        ".storage_alignment": rb"\d+",
        ".data/serialization_id": rb"[ -~]*",
    }
    for name, pattern in allowed.items():
        if name in entries or name == "version":
            content = archive.content(entries, name, MAX_RECORD_BYTES)
            if not re.fullmatch(pattern, content):
                archive.fail(f"its entry {name} holds {content!r}, which is not supported")


def _locate(file: Path, name: str, tensor: PickledTensor, entries: Mapping[str, Entry]) -> FileTensor:
    """Checks a tensor against its storage, and that against its entry."""

    def wrong(problem: str) -> CheckpointError:
        return CheckpointError(f"{file}: tensor {show(name)} {problem}.")

    storage, shape = tensor.storage, tensor.shape
    dtype = STORAGE_DTYPES.get(storage.type)
    if dtype is None:
        supported = ", ".join(STORAGE_DTYPES)
        raise wrong(f"has a dtype that is not supported: its storage is a {storage.type}; supported are {supported}")
    entry = entries.get(f"data/{storage.key}")
    if entry is None:
        raise wrong(f"has storage {show(storage.key)}, which the archive lacks")
    needed = storage.numel * dtype.itemsize
    if needed != entry.size:
        raise wrong(f"has a storage of {needed} bytes, but its entry in the archive has {entry.size}")
    if not _is_contiguous(shape, tensor.strides):
        raise wrong(f"of shape {shape} is not contiguous: it has strides {tensor.strides}")
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 2**63:  # neither NumPy nor PyTorch has such empty ones
        raise wrong(f"has shape {shape}, which is too large")
    end = tensor.offset + math.prod(shape)
    if end > storage.numel:
        raise wrong(f"ends at element {end} of its storage, which has {storage.numel}")
    return FileTensor(shape, dtype, file, entry.offset + tensor.offset * dtype.itemsize)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements follow one another row by row. Strides of axes of length 1 and of empty tensors are free."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step and 0 not in shape:
            return False
        step *= size
    return True


class PthWriter:
    """Writes a checkpoint that `torch.load(file, weights_only=True)` reads, as a stream of blocks.

        with PthWriter(file, tensors) as writer:
            for name, block in ...:
                writer.write(name, block)

    `tensors` gives shape and dtype (float64, float32, float16 or bfloat16) by name; `root` is the folder in the
    archive; `aliases` are further names of tensors, for weights that are tied. Leaving the context completes the file
    and flushes it to the disk; ValueError says which tensor is incomplete. After an exception the file is just closed,
    incomplete.
    """

    def __init__(
        self,
        file: Path,
        tensors: Mapping[str, TensorInfo],
        root: str = "consolidated",
        *,
        aliases: Mapping[str, str] | None = None,
    ):
        if not root or "/" in root:
            raise ValueError(f"root {root!r} is not the name of a folder.")
        self._file, self._root = file, root
        self._pickle = write_state_dict(tensors, aliases)
        self._pending = [(f"data/{i}", name, info) for i, (name, info) in enumerate(tensors.items())][::-1]
        self._directory: list[bytes] = []

    def __enter__(self) -> Self:
        self._out = open(self._file, "wb")
        for entry, content in (("data.pkl", self._pickle), ("version", b"3\n"), ("byteorder", b"little")):
            self._begin(entry, len(content))
            self._append(content)
            self._end()
        self._begin_next()
        return self

    def write(self, name: str, block: np.ndarray) -> None:
        """Appends the bytes of the C-contiguous array `block` to tensor `name`.

        Tensors come in the order of the mapping, each in one or more blocks of any shape; an empty one needs none.
        Raises ValueError for another order, dtype or number of bytes.
        """
        self._skip_complete(until=name)
        expected = self._pending[-1][1] if self._pending else "the end"
        if name != expected:
            raise ValueError(f"{name}: does not come now, but {expected} ({self._missing} bytes).")
        dtype = self._pending[-1][2].dtype
        if block.dtype != dtype or not block.flags.c_contiguous:
            raise ValueError(f"{name}: expected a C-contiguous block of {dtype}, got {block.dtype}.")
        if block.nbytes > self._missing:
            raise ValueError(f"{name}: {self._missing} bytes are missing, the block has {block.nbytes}.")
        self._append(block.reshape(-1).view(np.uint8))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._out:
            if kind is None:
                self._skip_complete(until=None)
                if self._pending:
                    raise ValueError(f"{self._pending[-1][1]}: the last {self._missing} bytes were not written.")
                self._write_directory()
                self._out.flush()
                os.fsync(self._out.fileno())

    def _skip_complete(self, until: str | None) -> None:
        """Ends the tensors that have all their bytes, up to tensor `until`."""
        while self._pending and self._pending[-1][1] != until and self._missing == 0:
            self._end()
            self._pending.pop()
            self._begin_next()

    def _begin_next(self) -> None:
        if self._pending:
            entry, _, info = self._pending[-1]
            self._begin(entry, info.nbytes)

    def _begin(self, entry: str, size: int) -> None:
        """Begins an entry of `size` bytes, which will start aligned."""
        self._at, self._size, self._missing, self._checksum = self._out.tell(), size, size, 0
        self._name = f"{self._root}/{entry}".encode()
        self._out.write(local_header(self._name, size, self._at))

    def _append(self, content: bytes | np.ndarray) -> None:
        self._out.write(content)
        self._checksum = zlib.crc32(content, self._checksum)
        self._missing -= len(content)

    def _end(self) -> None:
        """Ends an entry: puts its checksum into its header, and notes it for the directory."""
        end = self._out.tell()
        self._out.seek(self._at + CHECKSUM_AT)
        self._out.write(self._checksum.to_bytes(4, "little"))
        self._out.seek(end)
        self._directory.append(central_header(self._name, self._size, self._at, self._checksum))

    def _write_directory(self) -> None:
        start, directory = self._out.tell(), b"".join(self._directory)
        self._out.write(directory)
        self._out.write(directory_end(start, len(self._directory), len(directory)))
