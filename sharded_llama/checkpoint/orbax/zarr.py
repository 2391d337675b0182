"""The description of a stored array (zarr 2 and 3, as far as orbax writes them), checked before tensorstore sees it.

Formats: https://zarr-specs.readthedocs.io (v2; v3 with the codecs bytes, zstd, crc32c and sharding_indexed) and
RFC 8878 (zstd). Sizes in a description are claims: they are held against the bytes that are really stored.
"""

import itertools
import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ...errors import CheckpointError

ZARR2_DTYPES = {
    "<f8": np.dtype(np.float64),
    "<f4": np.dtype(np.float32),
    "<f2": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
ZARR3_DTYPES = {dtype.name: dtype for dtype in ZARR2_DTYPES.values()}

MAX_RANK = 8
# A chunk may unpack to this many bytes more than twice what is stored of it: a few bytes can stand for terabytes.
SLACK_BYTES = 256 << 20
BOUND_FACTOR = 4  # by which `zstd_bound` may exceed what a part really unpacks to: zstd splits its blocks

ReadAt = Callable[[int, int], bytes]  # offset and size within a stored value -> bytes, fewer at its end


class ZarrArray(NamedTuple):
    """What a description says of an array."""

    driver: str  # of tensorstore: "zarr" or "zarr3"
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]  # what one key holds
    part: tuple[int, ...]  # what is decoded at once: `chunk`, or in zarr 3 a part of it that has an index entry
    zstd: bool
    indexed: bool  # a key holds an index of parts
    index_at_end: bool
    separator: str  # of chunk indices in keys

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk) * self.dtype.itemsize

    @property
    def part_bytes(self) -> int:
        return math.prod(self.part) * self.dtype.itemsize

    @property
    def grid(self) -> tuple[int, ...]:
        """Chunks along each axis."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True))

    def key(self, index: tuple[int, ...]) -> str:
        """The key of a chunk, after the array's own name."""
        if self.driver == "zarr":
            return self.separator.join(map(str, index)) or "0"
        return self.separator.join(["c", *map(str, index)])

    def indices(self, bounds: list[tuple[int, int]] | None = None) -> Iterator[tuple[int, ...]]:
        """The chunks that hold the box `bounds` (start and stop per axis), or all, in order."""
        bounds = [(0, n) for n in self.shape] if bounds is None else bounds
        if any(start >= stop for start, stop in bounds):
            return iter(())
        return itertools.product(
            *(range(start // c, -(-stop // c)) for (start, stop), c in zip(bounds, self.chunk, strict=True))
        )


class _Malformed(ValueError):
    pass


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise _Malformed(what)


def parse_zarr(text: bytes, zarr3: bool, where: str) -> ZarrArray:
    """Reads a .zarray or zarr.json. Raises CheckpointError, naming `where`, for all but what orbax writes."""
    try:
        raw = json.loads(text)
        _require(isinstance(raw, dict), "it is not a JSON object")
        return (_parse_zarr3 if zarr3 else _parse_zarr2)(raw)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as e:
        what = str(e) if isinstance(e, _Malformed) else f"{type(e).__name__}: {e}"
        raise CheckpointError(f"{where}: is not an array description that can be read: {what[:300]}.") from e


def _sizes(value: Any, what: str, least: int) -> tuple[int, ...]:
    ok = isinstance(value, list) and len(value) <= MAX_RANK and all(type(n) is int and n >= least for n in value)
    _require(ok, f"{what} is {str(value)[:100]}, not a list of up to {MAX_RANK} sizes of {least} or more")
    _require(math.prod(value) < 1 << 60, f"{what} {value} is larger than any array")
    return tuple(value)


def _parse_zarr2(raw: dict[str, Any]) -> ZarrArray:
    _require(raw["zarr_format"] == 2 and raw["order"] == "C", "zarr_format must be 2 and order C")
    _require(raw["filters"] is None, "filters are not supported")
    dtype, compressor, separator = raw["dtype"], raw["compressor"], raw.get("dimension_separator", ".")
    _require(isinstance(dtype, str) and dtype in ZARR2_DTYPES, f"dtype {dtype!r} is not of {', '.join(ZARR2_DTYPES)}")
    _require(compressor is None or compressor["id"] == "zstd", f"compressor {compressor!r} is neither zstd nor none")
    _require(separator in (".", "/"), f"dimension_separator {separator!r} is neither . nor /")
    shape, chunk = _sizes(raw["shape"], "shape", 0), _sizes(raw["chunks"], "chunks", 1)
    _require(len(shape) == len(chunk), f"shape {shape} and chunks {chunk} differ in rank")
    return ZarrArray("zarr", shape, ZARR2_DTYPES[dtype], chunk, chunk, compressor is not None, False, True, separator)


def _parse_zarr3(raw: dict[str, Any]) -> ZarrArray:
    _require(raw["zarr_format"] == 3 and raw["node_type"] == "array", "zarr_format must be 3 and node_type array")
    _require(not raw.get("storage_transformers"), "storage_transformers are not supported")
    dtype, grid, encoding = raw["data_type"], raw["chunk_grid"], raw["chunk_key_encoding"]
    _require(isinstance(dtype, str) and dtype in ZARR3_DTYPES, f"data_type {dtype!r} is not of {list(ZARR3_DTYPES)}")
    _require(grid["name"] == "regular" and encoding["name"] == "default", "its chunk grid or keys are not the default")
    separator = (encoding.get("configuration") or {}).get("separator", "/")
    _require(separator in (".", "/"), f"separator {separator!r} is neither . nor /")
    shape = _sizes(raw["shape"], "shape", 0)
    chunk = part = _sizes(grid["configuration"]["chunk_shape"], "chunk_shape", 1)
    codecs, indexed, at_end = raw["codecs"], False, True
    if codecs[0]["name"] == "sharding_indexed":
        _require(len(codecs) == 1, "codecs after sharding_indexed are not supported")
        inner = codecs[0]["configuration"]
        indexed, at_end = True, inner.get("index_location", "end") == "end"
        _require(at_end or inner["index_location"] == "start", "index_location is neither start nor end")
        part, codecs = _sizes(inner["chunk_shape"], "chunk_shape of sharding_indexed", 1), inner["codecs"]
        _require(_codecs(inner["index_codecs"]) == ["bytes", "crc32c"], "index_codecs must be bytes and crc32c")
    _require(len(shape) == len(chunk) == len(part), f"shape {shape} and chunks {chunk}, {part} differ in rank")
    _require(not any(c % p for c, p in zip(chunk, part, strict=True)), f"chunks {chunk} are not whole parts {part}")
    names = _codecs(codecs)
    _require(names in (["bytes"], ["bytes", "zstd"]), f"codecs {names} are not bytes, with or without zstd")
    return ZarrArray("zarr3", shape, ZARR3_DTYPES[dtype], chunk, part, "zstd" in names, indexed, at_end, separator)


def _codecs(codecs: list[dict[str, Any]]) -> list[str]:
    endian = [codec.get("configuration", {}).get("endian", "little") for codec in codecs if codec["name"] == "bytes"]
    _require(endian == ["little"], "the bytes codec must be little endian")
    return [codec["name"] for codec in codecs]


def check_sizes(array: ZarrArray, largest_value: int, where: str) -> None:
    """Raises CheckpointError when a chunk would take far more memory than the bytes that are stored of it."""
    if array.chunk_bytes > SLACK_BYTES + 2 * largest_value:
        raise CheckpointError(
            f"{where}: has chunks {array.chunk} of {array.dtype}, {array.chunk_bytes} bytes each, but at most "
            f"{largest_value} bytes are stored of one."
        )


def check_chunk(array: ZarrArray, length: int, at: ReadAt, complete: bool, where: str) -> None:
    """Raises CheckpointError when a stored chunk of `length` bytes lacks parts or unpacks to far more than it should.

    A part that is missing would be read as zeros: it is refused when `complete` says that all are stored.
    """
    try:
        for start, size in _parts(array, length, at, complete):
            limit = max(SLACK_BYTES, BOUND_FACTOR * array.part_bytes)
            if array.zstd and zstd_bound(lambda a, n, start=start: at(start + a, n), size, limit) > limit:
                raise _Malformed(f"it unpacks to more than {limit} bytes, and should to {array.part_bytes}")
            if not array.zstd and size != array.part_bytes:
                raise _Malformed(f"it has {size} bytes instead of {array.part_bytes}")
    except (_Malformed, struct.error, OSError) as e:
        raise CheckpointError(f"{where}: is damaged: {e}.") from e


def _parts(array: ZarrArray, length: int, at: ReadAt, complete: bool) -> Iterator[tuple[int, int]]:
    """Offset and size of what is decoded at once: the value itself, or what its index lists."""
    if not array.indexed:
        yield 0, length
        return
    count = math.prod(c // p for c, p in zip(array.chunk, array.part, strict=True))
    size = 16 * count + 4  # offset and size of each part, and the index's own checksum
    _require(size <= length, f"its index of {count} parts does not fit in {length} bytes")
    index = at(length - size if array.index_at_end else 0, size)
    for i in range(count):
        start, part = struct.unpack_from("<QQ", index, 16 * i)
        if start == part == 2**64 - 1:
            _require(not complete, f"part {i} of {count} is missing")
            continue
        _require(start + part <= length, f"part {i} lies beyond its {length} bytes")
        yield start, part


def zstd_bound(at: ReadAt, length: int, limit: int) -> int:
    """An upper bound of what the zstd frames in `length` bytes unpack to, or of the window that they ask for.

    Only the headers of frames and blocks are read (RFC 8878, 3.1.1). Stops beyond `limit`. Raises ValueError when
    they are malformed.
    """
    position = total = 0
    while position < length and total <= limit:
        magic, size = struct.unpack("<II", at(position, 8).ljust(8, b"\0"))
        if magic & 0xFFFFFFF0 == 0x184D2A50:  # to be skipped
            position += 8 + size
            continue
        _require(magic == 0xFD2FB528, f"byte {position} begins no zstd frame")
        header = at(position + 4, 14)
        _require(len(header) >= 2, f"byte {position} begins a zstd frame that is cut off")
        flags = header[0]
        single, window = bool(flags & 32), 0
        skip = 1 + (not single) + (0, 1, 2, 4)[flags & 3]
        if single:
            content = (1, 2, 4, 8)[flags >> 6]
            window = int.from_bytes(header[skip : skip + content], "little") + (256 if content == 2 else 0)
        else:
            content = (0, 2, 4, 8)[flags >> 6]
            exponent, mantissa = header[1] >> 3, header[1] & 7
            window = (1 << 10 + exponent) * (8 + mantissa) // 8
        position += 4 + skip + content
        unpacked, last = 0, False
        while not last and total + unpacked <= limit:
            block = int.from_bytes(at(position, 3).ljust(3, b"\x06"), "little")  # cut off: of the reserved type
            last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
            _require(kind != 3 and position + 3 <= length, f"byte {position} begins no zstd block")
            unpacked += size if kind < 2 else 128 << 10
            position += 3 + (1 if kind == 1 else size)
        position += 4 * bool(flags & 4)
        total += max(unpacked, window)
    _require(position <= length or total > limit, "its zstd frames are cut off")
    return total


KEY_PART = re.compile(r"[^/\0]+")  # a tensor's name as one component of a path


def is_file_name(name: str) -> bool:
    """Whether `name` can be a file's name in a folder, and nothing else."""
    return bool(KEY_PART.fullmatch(name)) and name not in (".", "..")
