"""The zip archives that `torch.save` writes: uncompressed entries, all in one folder, read and written.

The records are those of https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, with and without zip64.

An archive that is read may be hostile: whatever disagrees with itself is refused, even where zip tools would go on.
Work is linear in the file's size. Checksums are not compared: PyTorch does not either, and can leave them out of its
files.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import NamedTuple, NoReturn

from ...errors import CheckpointError
from .pickle_tensors import show

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
CHECKSUM_AT = 14  # in a local header
ALIGNMENT = 64  # of the entries that are written, as PyTorch has it


@dataclass(frozen=True, slots=True)
class Entry:
    """Where the bytes of an archive's entry stand."""

    offset: int
    size: int


class Header(NamedTuple):
    """What the zip directory says of an entry; in the order of the file when sorted."""

    at: int  # the first byte of the local header
    size: int
    flags: int
    name: bytes
    compressed: bool


@dataclass(frozen=True)
class Archive:
    """An opened zip archive of `size` bytes. Methods raise CheckpointError, naming the file, for what is damaged."""

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

    def content(self, entries: Mapping[str, Entry], name: str, limit: int) -> bytes:
        """All of an entry."""
        self.check(name in entries, f"lacks the entry {name} of a PyTorch checkpoint")
        entry = entries[name]
        self.check(entry.size <= limit, f"its entry {name} has {entry.size} bytes, more than {limit}")
        return self.read(entry.offset, entry.size)

    def entries(self, limit: int) -> dict[str, Entry]:
        """The entries by their names within the archive's folder. The zip directory may have up to `limit` bytes."""
        self.check_magic()
        start, count, data = self.directory(limit)
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
            entries[name], free = Entry(offset, header.size), offset + header.size
        return {name: entries[name] for name in names}

    def headers(self, start: int, count: int, data: bytes) -> list[Header]:
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
            headers.append(Header(local, size, flags, name, method != 0 or packed != size))
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

    def directory(self, limit: int) -> tuple[int, int, bytes]:
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
        self.check(length <= limit, f"its zip directory has {length} bytes, more than {limit}")
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

    def data_offset(self, header: Header, limit: int) -> int:
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


def local_header(name: bytes, size: int, at: int) -> bytes:
    """What stands at byte `at`, before an entry of `size` bytes: padded, so that these are aligned; no checksum yet."""
    extra = _zip64([size, size])
    padding = -(at + LOCAL.size + len(name) + len(extra) + 4) % ALIGNMENT
    extra += Struct("<2H").pack(PADDING, padding) + bytes(padding)
    narrow = min(size, ONES)
    return LOCAL.pack(LOCAL_SIGNATURE, UTF8, 0, 0, narrow, narrow, len(name), len(extra)) + name + extra


def central_header(name: bytes, size: int, at: int, checksum: int) -> bytes:
    """What the zip directory says of an entry whose local header begins at byte `at`."""
    extra, narrow = _zip64([size, size, at]), min(size, ONES)
    sizes = (checksum, narrow, narrow, len(name), len(extra))
    return CENTRAL.pack(CENTRAL_SIGNATURE, UTF8, 0, *sizes, 0, 0, 0, min(at, ONES)) + name + extra


def directory_end(start: int, count: int, size: int) -> bytes:
    """What follows a zip directory of `count` entries and `size` bytes that begins at byte `start`."""
    few, narrow, at = min(count, 0xFFFF), min(size, ONES), min(start, ONES)
    return (
        END64.pack(END64_SIGNATURE, END64.size - 12, 0, 0, count, count, size, start)
        + LOCATOR.pack(LOCATOR_SIGNATURE, 0, start + size, 1)
        + END.pack(END_SIGNATURE, 0, 0, few, few, narrow, at, 0)
    )


def _zip64(values: list[int]) -> bytes:
    """The zip64 extra field with those of the values that do not fit 32 bits; nothing when all fit."""
    wide = [value for value in values if value >= ONES]
    return Struct(f"<2H{len(wide)}Q").pack(ZIP64, 8 * len(wide), *wide) if wide else b""


def _show(name: bytes) -> str:
    return show(name[:200].decode(errors="backslashreplace"))
