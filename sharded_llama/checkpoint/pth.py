"""PyTorch's checkpoints as `torch.save` writes them (.pth, .pt, .bin), read and written without PyTorch.

The file is a zip archive of uncompressed entries (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT), all in
one folder: `data.pkl` describes the tensors (see `pickle_tensors`), `data/{key}` holds the numbers of a storage,
`version` and `byteorder` the format's version and "little". Archives from before PyTorch 2.1 have no `byteorder`.

A file that is read may be hostile: whatever disagrees with itself is refused, even where zip tools would go on. Work is
linear in the file's size. Checksums are not compared: PyTorch does not either, and can leave them out of its files.
"""

import math
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from types import TracebackType
from typing import NamedTuple, NoReturn, Self

import numpy as np

from ..errors import CheckpointError
from .files import FileTensor
from .pickle_tensors import STORAGE_DTYPES, PickledTensor, read_state_dict, show, write_state_dict
from .source import TensorInfo

# The records of a zip archive, without versions and dates: those are written as zeros, as PyTorch does.
LOCAL, LOCAL_SIGNATURE = Struct("<4s2x2H4x3L2H"), b"PK\x03\x04"
CENTRAL, CENTRAL_SIGNATURE = Struct("<4s4x2H4x3L4H2x2L"), b"PK\x01\x02"
END, END_SIGNATURE = Struct("<4s4H2LH"), b"PK\x05\x06"
END64, END64_SIGNATURE = Struct("<4sQ4x2L4Q"), b"PK\x06\x06"
LOCATOR, LOCATOR_SIGNATURE = Struct("<4sLQL"), b"PK\x06\x07"
ONES = 0xFFFFFFFF  # of a 32-bit field: the value stands in the zip64 extra field
ZIP64, PADDING = 1, int.from_bytes(b"FB", "little")  # ids of extra fields; PyTorch pads with the latter
DIRECTORY = 1 << 4  # attribute
UTF8, DESCRIPTOR = 1 << 11, 1 << 3  # flags: names are UTF-8; sizes and checksum may follow the data

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # the pickled number that files before PyTorch 1.6 begin with
SAVE_AGAIN = "If you trust it, load it with PyTorch and torch.save its state dict"
MAX_DIRECTORY_BYTES = 16 << 20  # at most 350,000 entries; one takes some 400 bytes of memory
MAX_PICKLE_BYTES = 64 << 20
MAX_RECORD_BYTES = 64
CHECKSUM_AT = 14  # in a local header
ALIGNMENT = 64  # of the storages that are written, as PyTorch has it


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where the bytes of an archive's entry stand."""

    offset: int
    size: int


def read_pth(file: Path) -> dict[str, FileTensor]:
    """The tensors of a checkpoint by name, in the order of its dictionary; their bytes are not read.

    Tensors may share bytes, as tied weights do. Raises CheckpointError naming the file, and the entry, opcode or tensor
    that is damaged, not allowed, or not supported.
    """
    try:
        with open(file, "rb", buffering=0) as f:
            archive = _Archive(file, f.fileno(), os.fstat(f.fileno()).st_size)
            entries = archive.entries()
            _check_records(archive, entries)
            data = archive.content(entries, "data.pkl", MAX_PICKLE_BYTES)
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read: {e.strerror}.") from e
    pickled = read_state_dict(data, f"{file}: data.pkl")
    return {name: _locate(file, name, tensor, entries) for name, tensor in pickled.items()}


def _check_records(archive: "_Archive", entries: Mapping[str, _Entry]) -> None:
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


def _locate(file: Path, name: str, tensor: PickledTensor, entries: Mapping[str, _Entry]) -> FileTensor:
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


@dataclass(frozen=True)
class _Archive:
    """An opened zip archive."""

    file: Path
    fd: int
    size: int

    def fail(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.file}: {problem}.")

    def check(self, condition: bool, problem: str) -> None:
        if not condition:
            self.fail(problem)

    def read(self, offset: int, count: int) -> bytes:
        """Bytes that are known to lie within the file."""
        data = os.pread(self.fd, count, offset)
        self.check(len(data) == count, "has become shorter while it was read")
        return data

    def content(self, entries: Mapping[str, _Entry], name: str, limit: int) -> bytes:
        """All of an entry."""
        self.check(name in entries, f"lacks the entry {name} of a PyTorch checkpoint")
        entry = entries[name]
        self.check(entry.size <= limit, f"its entry {name} has {entry.size} bytes, more than {limit}")
        return self.read(entry.offset, entry.size)

    def entries(self) -> dict[str, _Entry]:
        """The entries by their names within the archive's folder."""
        self.check_magic()
        start, count, data = self.directory()
        headers = self.headers(start, count, data)
        self.check(bool(headers), "is an empty zip archive")
        names = self.names([header.name for header in headers])
        if "constants.pkl" in names:
            self.fail(f"is a TorchScript program, not a checkpoint. {SAVE_AGAIN}")
        entries, free = {}, 0
        # In the order of the file: then even local headers that all claim long extra fields are read once.
        for header, name in sorted(zip(headers, names, strict=True)):
            if header.compressed:
                self.fail(f"its entry {_show(header.name)} is compressed. {SAVE_AGAIN}")
            if header.at < free:
                self.fail(f"its entry {_show(header.name)} overlaps the entry before it")
            offset = self.data_offset(header, start)
            entries[name], free = _Entry(offset, header.size), offset + header.size
        return {name: entries[name] for name in names}

    def headers(self, start: int, count: int, data: bytes) -> list["_Header"]:
        """The headers in the zip directory, `data`, that begins at byte `start`."""
        headers, end = [], 0
        for _ in range(count):
            at, end = end, end + CENTRAL.size
            if end > len(data):
                self.fail("its zip directory ends too early")
            signature, flags, method, _, packed, size, *lengths, comment_bytes, disk, attributes, local = (
                CENTRAL.unpack_from(data, at)
            )
            name_end, end = end + lengths[0], end + sum(lengths)
            if signature != CENTRAL_SIGNATURE or end > len(data) or comment_bytes or disk:
                self.fail(f"its zip directory is damaged at byte {start + at}")
            name, extra = data[name_end - lengths[0] : name_end], data[name_end:end]
            size, packed, local = self.widen([size, packed, local], extra)
            if -1 in (size, packed, local):
                self.fail(f"its entry {_show(name)} lacks its zip64 extra field")
            if flags & ~(UTF8 | DESCRIPTOR):
                self.fail(f"its entry {_show(name)} is encrypted, or is no plain file")
            if attributes & DIRECTORY or name.endswith(b"/"):  # PyTorch would read nothing, and use memory as it is
                self.fail(f"its entry {_show(name)} is a directory")
            headers.append(_Header(local, size, flags, name, method != 0 or packed != size))
        self.check(end == len(data), "its zip directory goes on after its last entry")
        return headers

    def check_magic(self) -> None:
        """Names the formats that PyTorch had before zip archives."""
        start = self.read(0, min(self.size, 512))
        self.check(not start.startswith(LEGACY_MAGIC), f"has the format from before PyTorch 1.6. {SAVE_AGAIN}")
        self.check(start[257:262] != b"ustar", f"is a tar archive, PyTorch's oldest format. {SAVE_AGAIN}")
        self.check(
            start.startswith(LOCAL_SIGNATURE), "is not a checkpoint of PyTorch: it does not begin as a zip archive"
        )

    def directory(self) -> tuple[int, int, bytes]:
        """Where the zip directory begins, the number of its entries, and its bytes."""
        tail = self.read(max(0, self.size - END.size - LOCATOR.size - END64.size), min(self.size, 98))
        end = tail[-END.size :]
        whole = len(end) == END.size and end.startswith(END_SIGNATURE)
        self.check(whole, "is truncated, or goes on after its zip directory")
        _, disk, first_disk, here, count, length, start, comment_bytes = END.unpack(end)
        disks, stop, wide = {disk, first_disk}, self.size - END.size, (here, count, length, start)
        if tail[-END.size - LOCATOR.size :].startswith(LOCATOR_SIGNATURE):
            self.check(len(tail) == 98, "is truncated before its zip64 directory")
            _, disk64, at, n_disks = LOCATOR.unpack(tail[END64.size : END64.size + LOCATOR.size])
            signature, rest, *more_disks, here, count, length, start = END64.unpack(tail[: END64.size])
            stop = self.size - len(tail)
            sound = signature == END64_SIGNATURE and (at, rest, n_disks) == (stop, END64.size - 12, 1)
            narrow, limits = wide, (0xFFFF, 0xFFFF, ONES, ONES)
            wide, disks = (here, count, length, start), disks | {disk64, *more_disks}
            agree = all(n in (w, ones) for n, w, ones in zip(narrow, wide, limits, strict=True))
            self.check(sound and agree, "the two ends of its zip directory do not agree")
        sound = disks == {0} and comment_bytes == 0 and here == count and start + length == stop
        self.check(sound, "the end of its zip directory is damaged, or other bytes stand before or within the archive")
        self.check(
            length <= MAX_DIRECTORY_BYTES, f"its zip directory has {length} bytes, more than {MAX_DIRECTORY_BYTES}"
        )
        return start, count, self.read(start, length)

    def widen(self, fields: list[int], extra: bytes) -> list[int]:
        """Replaces fields that are all ones by the values of the zip64 extra field, or by -1 where it has none."""
        if ONES not in fields:
            return fields
        values = b""
        while len(extra) >= 4:
            kind, length = int.from_bytes(extra[:2], "little"), int.from_bytes(extra[2:4], "little")
            if kind == ZIP64:
                values = extra[4 : 4 + length]
                break
            extra = extra[4 + length :]
        wide = (int.from_bytes(values[i : i + 8], "little") for i in range(0, len(values) - 7, 8))
        return [next(wide, -1) if field == ONES else field for field in fields]

    def names(self, raw: list[bytes]) -> list[str]:
        """The names without the folder that they share."""
        seen: set[str] = set()
        names = []
        root = raw[0].partition(b"/")[0] + b"/"
        for name in raw:
            if not name.startswith(root):
                self.fail(f"its entry {_show(name)} does not stand in the folder {_show(root)}")
            try:
                text = name[len(root) :].decode()
            except UnicodeDecodeError:
                self.fail(f"its entry {_show(name)} has a name that is not UTF-8")
            if "\0" in text:
                self.fail(f"its entry {_show(name)} has a name with a zero byte")
            if text.lower() in seen:  # PyTorch ignores the case
                self.fail(f"its entry {_show(name)} occurs twice")
            seen.add(text.lower())
            names.append(text)
        return names

    def data_offset(self, header: "_Header", limit: int) -> int:
        """Where an entry's data begin; its local header must repeat what the directory says. Entries end at `limit`."""
        name, size, length = header.name, header.size, LOCAL.size + len(header.name)
        if header.at + length > limit:
            self.fail(f"its entry {_show(name)} lies outside the archive")
        local = self.read(header.at, length)
        signature, flags, method, _, packed, local_size, name_bytes, extra_bytes = LOCAL.unpack_from(local)
        offset = header.at + length + extra_bytes
        if offset + size > limit:
            self.fail(f"its entry {_show(name)} ends after byte {limit}, where the entries end")
        sizes = self.widen([local_size, packed], self.read(header.at + length, extra_bytes))
        same = (signature, flags, method, name_bytes) == (LOCAL_SIGNATURE, header.flags, 0, len(name))
        same = same and local[LOCAL.size :] == name
        if not same or (sizes != [size, size] and not (sizes == [0, 0] and flags & DESCRIPTOR)):
            self.fail(
                f"its entry {_show(name)} has a local header, at byte {header.at}, that the zip directory contradicts"
            )
        return offset


class _Header(NamedTuple):
    """What the zip directory says of an entry; in the order of the file when sorted."""

    at: int  # the first byte of the local header
    size: int
    flags: int
    name: bytes
    compressed: bool


def _show(name: bytes) -> str:
    return show(name[:200].decode(errors="backslashreplace"))


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
        extra = _zip64([size, size])
        padding = -(self._at + LOCAL.size + len(self._name) + len(extra) + 4) % ALIGNMENT
        extra += Struct("<2H").pack(PADDING, padding) + bytes(padding)
        narrow = min(size, ONES)
        header = LOCAL.pack(LOCAL_SIGNATURE, UTF8, 0, 0, narrow, narrow, len(self._name), len(extra))  # no checksum yet
        self._out.write(header + self._name + extra)

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
        size, at = min(self._size, ONES), min(self._at, ONES)
        extra = _zip64([self._size, self._size, self._at])
        sizes = (self._checksum, size, size, len(self._name), len(extra))
        record = CENTRAL.pack(CENTRAL_SIGNATURE, UTF8, 0, *sizes, 0, 0, 0, at)
        self._directory.append(record + self._name + extra)

    def _write_directory(self) -> None:
        start, count, directory = self._out.tell(), len(self._directory), b"".join(self._directory)
        stop = start + len(directory)
        few, size, at = min(count, 0xFFFF), min(len(directory), ONES), min(start, ONES)
        self._out.write(directory)
        self._out.write(END64.pack(END64_SIGNATURE, END64.size - 12, 0, 0, count, count, len(directory), start))
        self._out.write(LOCATOR.pack(LOCATOR_SIGNATURE, 0, stop, 1))
        self._out.write(END.pack(END_SIGNATURE, 0, 0, few, few, size, at, 0))


def _zip64(values: list[int]) -> bytes:
    """The zip64 extra field with those of the values that do not fit 32 bits; nothing when all fit."""
    wide = [value for value in values if value >= ONES]
    return Struct(f"<2H{len(wide)}Q").pack(ZIP64, 8 * len(wide), *wide) if wide else b""
