"""Which values an orbax checkpoint stores, and in which bytes of which file: known before anything is read.

Values stand in files named by their keys (array/chunk), or in an OCDBT database: a manifest, B+tree nodes and data
files (https://google.github.io/tensorstore/kvstore/ocdbt). tensorstore decodes manifest and nodes one at a time;
every place that they name is checked before it is followed.
"""

import os
import stat
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import CheckpointError
from .zarr import MAX_RANK, is_file_name, zstd_bound

MANIFEST = "manifest.ocdbt"
MAX_NODE_BYTES = 256 << 20  # unpacked; orbax writes nodes of up to 100 MB
MAX_HEIGHT = 16
NODE_HEADER = 14  # magic (4), length (8), version and compression (1 each)


class Value(NamedTuple):
    """Where the value of a key stands: in a file, or (`inline`) within the database's node."""

    file: Path
    offset: int
    length: int
    inline: bytes | None = None

    def at(self, offset: int, size: int) -> bytes:
        """Bytes of the value, fewer at its end. Raises OSError."""
        size = max(0, min(size, self.length - offset))
        if self.inline is not None:
            return self.inline[offset : offset + size]
        with open(self.file, "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, self.offset + offset)


def plain_values(item: Path, names: Iterable[str]) -> dict[str, Value]:
    """The values of a checkpoint without a database: one file each, in a folder for each array of `names`."""
    values = {}
    for name in names:
        for folder, subfolders, files in os.walk(item / name, onerror=_raise):
            if len(Path(folder).parts) - len(item.parts) > MAX_RANK + 1:
                subfolders.clear()  # no chunk stands as deep as this
            for file in files:
                path = Path(folder, file)
                values[path.relative_to(item).as_posix()] = Value(path, 0, file_size(path))
    return values


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # what is missing is told by its name later
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}.") from error


def file_size(path: Path) -> int:
    """The size of a regular file; reading of anything else might never end."""
    try:
        info = os.stat(path)
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: is missing or cannot be read: {e}; the checkpoint is incomplete.") from e
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{path}: is not a regular file.")
    return info.st_size


def ocdbt_values(item: Path) -> dict[str, Value]:
    """The values of the database in `item`. Raises CheckpointError when it is damaged or files of it are missing."""
    return dict(_Database(item).values())


class _Database:
    def __init__(self, item: Path) -> None:
        import tensorstore as ts

        self._item = item
        try:
            self._base = ts.KvStore.open({"driver": "file", "path": f"{item}/"}).result()
        except Exception as e:  # tensorstore raises various types, as for a path that is not UTF-8
            raise CheckpointError(f"{item}: cannot be opened: {str(e)[:300]}") from e
        self._sizes: dict[str, int] = {}
        self._seen: set[str] = set()
        self._dump = ts.ocdbt.dump

    def values(self) -> Iterator[tuple[str, Value]]:
        manifest = self._item / MANIFEST
        self._check_node(Value(manifest, 0, file_size(manifest)))
        try:
            content = self._decode(manifest, None)
            if content["config"].get("manifest_kind", "single") != "single":
                raise ValueError("its manifest_kind is not single")
            version = content["versions"][-1]
            root, height = version["root"].get("location"), version["root_height"]
            if root is not None:
                yield from self._entries(root, height, b"", manifest)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as e:
            if isinstance(e, CheckpointError):
                raise
            raise CheckpointError(f"{manifest}: is not a manifest of orbax: {type(e).__name__}: {str(e)[:300]}") from e

    def _entries(self, location: str, height: int, prefix: bytes, where: Path) -> Iterator[tuple[str, Value]]:
        value = self._locate(location, "btreenode", where)
        if location in self._seen or not 0 <= height <= MAX_HEIGHT:
            raise CheckpointError(f"{where}: its tree is malformed: {location[:200]} at height {height}.")
        self._seen.add(location)
        self._check_node(value)
        node = self._decode(value.file, location)
        if node["height"] != height:
            raise CheckpointError(f"{value.file}: is a node of height {node['height']} instead of {height}.")
        for entry in node["entries"]:
            key = prefix + entry["key"]
            if height:
                common = prefix + entry["subtree_common_prefix"]
                yield from self._entries(entry["location"], height - 1, common, value.file)
            elif "inline_value" in entry:
                inline = bytes(entry["inline_value"])
                yield key.decode(errors="replace"), Value(value.file, 0, len(inline), inline)
            else:
                yield key.decode(errors="replace"), self._locate(entry["indirect_value"], "value", value.file)

    def _locate(self, location: str, kind: str, where: Path) -> Value:
        """The place that `kind:folder:file:offset:length` names. It must lie in a file within the checkpoint."""
        try:
            found, base, name, offset, length = location.split(":")
            path = urllib.parse.unquote(base, errors="strict") + urllib.parse.unquote(name, errors="strict")
            start, size = int(offset), int(length)
        except ValueError as e:
            raise CheckpointError(f"{where}: names the malformed place {location[:200]!r}.") from e
        if found != kind or min(start, size) < 0 or not all(map(is_file_name, path.split("/"))):
            raise CheckpointError(f"{where}: names {location[:200]!r}, which is no {kind} in a file of {self._item}.")
        if path not in self._sizes:
            self._sizes[path] = file_size(self._item / path)
        if start + size > self._sizes[path]:
            raise CheckpointError(
                f"{self._item / path}: is truncated: it has {self._sizes[path]} bytes, but bytes up to {start + size} "
                "are needed."
            )
        return Value(self._item / path, start, size)

    def _check_node(self, value: Value) -> None:
        """Bounds what tensorstore will unpack."""
        try:
            compressed = value.at(NODE_HEADER - 1, 1) != b"\0"
            size = value.length - NODE_HEADER - 4  # a checksum of 4 bytes follows
            if compressed:
                size = zstd_bound(lambda a, n: value.at(NODE_HEADER + a, n), size, MAX_NODE_BYTES)
        except (ValueError, OSError, IndexError) as e:
            raise CheckpointError(f"{value.file}: is damaged: {e}.") from e
        if size > MAX_NODE_BYTES:
            raise CheckpointError(f"{value.file}: unpacks to more than {MAX_NODE_BYTES} bytes.")

    def _decode(self, file: Path, location: str | None) -> Any:
        try:
            return self._dump(self._base, location).result()
        except Exception as e:  # tensorstore raises various types for what it cannot decode
            raise CheckpointError(f"{file}: cannot be decoded: {str(e)[:300]}") from e
