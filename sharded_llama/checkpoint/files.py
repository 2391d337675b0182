"""Tensors that stand uncompressed and row-major in a file: any slice of one, read into memory of the caller."""

import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from .source import TensorInfo

MAX_PARTS = 1024  # memory areas of one system call (IOV_MAX)
MAPPED_BYTES = 16 << 20  # of a file at once: 5 GB/s per thread; at 4 MiB mapping itself takes the time (3 GB/s)


@dataclass(frozen=True)
class FileTensor(TensorInfo):
    """Where a tensor stands."""

    file: Path
    offset: int  # of the first byte, from the start of the file


def check_regular(file: Path) -> None:
    """Raises CheckpointError when `file` is a pipe or a device, of which opening or reading might never end."""
    if os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file):
        raise CheckpointError(f"{file}: is not a regular file.")


def read_slices(tensor: FileTensor, slices: tuple[slice, ...], out: np.ndarray, name: str) -> int:
    """Fills `out` as `CheckpointSource.read` says; `name` is what messages call the tensor.

    Whole rows of the same dtype go straight from the file into `out`. Of other slices only the pages that hold
    them are touched.
    """
    bounds = [s.indices(n)[:2] for s, n in zip(slices, tensor.shape, strict=True)]
    shape = tuple(stop - start for start, stop in bounds)
    if out.shape != shape:
        raise ValueError(f"{name}: out has shape {out.shape}, the slices have {shape}.")
    whole_rows = shape[1:] == tensor.shape[1:]
    try:
        with open(tensor.file, "rb", buffering=0) as file:
            if whole_rows and out.dtype == tensor.dtype and out.flags.c_contiguous:
                start = tensor.offset + (bounds[0][0] if bounds else 0) * _row_bytes(tensor)
                _read_exactly(file.fileno(), start, out.reshape(-1).view(np.uint8))
            else:
                _copy_mapped(file.fileno(), tensor, bounds, out)
    except (OSError, EOFError) as e:
        raise CheckpointError(f"{tensor.file}: cannot read tensor {name}: {e}") from e
    return math.prod(shape) * tensor.dtype.itemsize


def read_rows(tensor: FileTensor, start: int, rows: Sequence[np.ndarray], name: str) -> int:
    """Fills `rows` with the rows of a matrix from `start` on, in one pass over the file. Returns the bytes read.

    Each is the bytes of a whole row, contiguous. Raises CheckpointError as `read_slices` does.
    """
    size = _row_bytes(tensor)
    try:
        with open(tensor.file, "rb", buffering=0) as file:
            for i in range(0, len(rows), MAX_PARTS):
                parts = rows[i : i + MAX_PARTS]
                offset = tensor.offset + (start + i) * size
                count = os.preadv(file.fileno(), parts, offset)
                done = count // size
                if done < len(parts):  # the system may read less than it is asked for
                    for j, part in enumerate(parts[done:], done):
                        _read_exactly(file.fileno(), offset + j * size, part)
    except (OSError, EOFError) as e:
        raise CheckpointError(f"{tensor.file}: cannot read tensor {name}: {e}") from e
    return len(rows) * size


def _row_bytes(tensor: FileTensor) -> int:
    return math.prod(tensor.shape[1:]) * tensor.dtype.itemsize


def _read_exactly(fd: int, offset: int, out: np.ndarray) -> None:
    """Fills the bytes `out` from `offset` on; one call may return fewer than asked for."""
    done = 0
    while done < out.size:
        count = os.preadv(fd, [out[done:]], offset + done)
        if count == 0:
            raise EOFError(f"the file ends at byte {offset + done}; it was longer when it was opened.")
        done += count


def _copy_mapped(fd: int, tensor: FileTensor, bounds: list[tuple[int, int]], out: np.ndarray) -> None:
    """Copies columns, or converts, through mappings of a few rows that are dropped at once.

    A mapping touches only the pages that hold the columns, and a short one leaves few of them resident.
    """
    columns = tuple(slice(*b) for b in bounds[1:])
    row_bytes = _row_bytes(tensor)
    block = max(1, MAPPED_BYTES // max(1, row_bytes))
    source_dtype, target = tensor.dtype, out
    if out.dtype == tensor.dtype:  # bits are bits: NumPy copies integers faster than bfloat16
        source_dtype = np.dtype(f"u{tensor.dtype.itemsize}")
        target = out.view(source_dtype)
    first, last = bounds[0] if out.size else (0, 0)
    for row in range(first, last, block):
        rows = min(block, last - row)
        start = tensor.offset + row * row_bytes
        lead = start % mmap.ALLOCATIONGRANULARITY
        if os.fstat(fd).st_size < start + rows * row_bytes:  # touching pages past the end kills the process
            raise EOFError("the file is shorter than when it was opened.")
        with mmap.mmap(fd, lead + rows * row_bytes, offset=start - lead, access=mmap.ACCESS_READ) as mapped:
            stored = np.frombuffer(mapped, source_dtype, rows * row_bytes // source_dtype.itemsize, lead)
            source = stored.reshape(rows, *tensor.shape[1:])[(slice(None), *columns)]
            np.copyto(target[row - first : row - first + rows], source, casting="unsafe")
            del stored, source  # a mapping that is still referred to cannot be closed
