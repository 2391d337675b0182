"""Meta's own checkpoints: params.json and one consolidated.NN.pth for each of 1 to 8 model-parallel ranks.

A rank has rows of the column-parallel matrices (wq, wk, wv, w1, w3, output), columns of the row-parallel ones (wo, w2),
all of the norms, and of the embeddings either columns (Llama 2) or rows (Llama 3). Rows of wq and wk pair
neighbours in rotary embeddings: row 2i + h of a head is row h * K/2 + i of the canonical, half-split order.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from ... import meta_config
from ...config import LlamaConfig
from ...errors import CheckpointError, ConfigError
from ..files import FileTensor, read_rows, read_slices
from ..names import META_NAMES, to_canonical, to_stored
from ..source import TensorInfo, shorten
from .pth import read_pth

FILE_PATTERN = "consolidated.*.pth"
MAX_FILES = 8
DERIVED = "rope.freqs"  # Llama 2 stores the rotary frequencies, which follow from params.json
SPLIT_AXES = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
ROTATED = ("wq", "wk")
COMPARED_BYTES = 16 << 20


def consolidated(rank: int) -> str:
    """The file name of a rank."""
    return f"consolidated.{rank:02}.pth"


class Split(NamedTuple):
    """A tensor in equal parts along `axis`, one in each file; None: every file has all of it."""

    axis: int | None
    parts: tuple[FileTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(n * len(self.parts) if i == self.axis else n for i, n in enumerate(self.parts[0].shape))


@dataclass(frozen=True)
class MetaSource:
    """An opened Meta checkpoint: a `CheckpointSource`."""

    format: ClassVar[str] = "Meta"
    location: str
    config: LlamaConfig
    tensors: dict[str, TensorInfo]
    splits: dict[str, Split]

    def read_config(self) -> LlamaConfig:
        """See `CheckpointSource.read_config`."""
        return self.config

    def stored_name(self, name: str) -> str:
        """Meta's name of canonical tensor `name`."""
        return to_stored(name, META_NAMES)

    def read(self, name: str, slices: tuple[slice, ...], out: np.ndarray) -> int:
        """See `CheckpointSource.read`."""
        if name.rpartition(".")[2] not in ROTATED:
            return self._read_rows(name, slices, out)
        k = self.config.head_dim
        start, stop, _ = slices[0].indices(self.tensors[name].shape[0])
        if start % k or stop % k:  # a part of a head: its rows are every other one in the file
            rows = (
                (row // k * k + 2 * (row % (k // 2)) + row % k // (k // 2), out[i : i + 1])
                for i, row in enumerate(range(start, stop))
            )
            return sum(self._read_rows(name, (slice(row, row + 1), slices[1]), place) for row, place in rows)
        part, first = self._rank(name, start)
        whole_rows = out.shape[1] == part.shape[1] and out.flags.c_contiguous
        if whole_rows and out.dtype == part.dtype and first + len(out) <= part.shape[0]:
            halves = out.view(np.uint8).reshape(-1, 2, k // 2, out.shape[1] * out.itemsize)
            in_file = [row for head in halves for pair in zip(*head, strict=True) for row in pair]
            return read_rows(part, first, in_file, self.stored_name(name))
        interleaved = np.empty(out.shape, out.dtype)
        count = self._read_rows(name, slices, interleaved)
        to, stored = (x.view(f"u{x.dtype.itemsize}") for x in (out, interleaved))
        for head in range(0, stop - start, k):
            to[head : head + k // 2] = stored[head : head + k : 2]
            to[head + k // 2 : head + k] = stored[head + 1 : head + k : 2]
        return count

    def _rank(self, name: str, row: int) -> tuple[FileTensor, int]:
        """The part of a column-parallel matrix that has `row`, and which row of it that is."""
        parts = self.splits[name].parts
        rank, local = divmod(row, parts[0].shape[0])
        return parts[rank], local

    def _read_rows(self, name: str, slices: tuple[slice, ...], out: np.ndarray) -> int:
        """Reads slices of a tensor in the order of rows that the files have."""
        axis, parts = self.splits[name]
        if axis is None:
            return read_slices(parts[0], slices, out, self.stored_name(name))
        size = parts[0].shape[axis]
        start, stop, _ = slices[axis].indices(size * len(parts))
        count = 0
        for i, part in enumerate(parts):
            a, b = max(start, i * size), min(stop, (i + 1) * size)
            if a < b:
                local, target = list(slices), [slice(None)] * len(slices)
                local[axis], target[axis] = slice(a - i * size, b - i * size), slice(a - start, b - start)
                count += read_slices(part, tuple(local), out[tuple(target)], self.stored_name(name))
        return count


def is_meta(folder: Path) -> bool:
    """Whether the files in `folder` are, or seem to be meant as, a Meta checkpoint."""
    return (folder / meta_config.PARAMS).exists() or any(folder.glob(FILE_PATTERN))


def open_meta(folder: Path, rope_factor: float | None = None) -> MetaSource:
    """Reads params.json and the directories of the .pth files in `folder`.

    Raises CheckpointError naming the file, and the tensor or field, that is missing, malformed, or not supported.
    """
    files = _rank_files(folder)
    try:
        params = meta_config.read_params(folder)
        sidecar = meta_config.read_sidecar(folder)
    except ConfigError as e:
        raise CheckpointError(str(e)) from e
    ranks = [read_pth(file) for file in files]
    splits = _join(files, ranks, params["dim"])
    embeddings = splits.get("tok_embeddings")
    if embeddings is None:
        raise CheckpointError(f"{files[0]}: lacks {to_stored('tok_embeddings', META_NAMES)}.")
    try:
        config = meta_config.read_config(
            folder,
            params,
            sidecar,
            vocab_size=embeddings.shape[0],
            dtype=embeddings.parts[0].dtype.name,
            tied=sidecar["tie_embeddings"] if "tie_embeddings" in sidecar else _is_tied(splits, params),
            rope_factor=rope_factor,
        )
    except ConfigError as e:
        raise CheckpointError(str(e)) from e
    _check_number(folder, splits, config)
    tensors = {name: TensorInfo(split.shape, split.parts[0].dtype) for name, split in splits.items()}
    return MetaSource(str(folder), config, tensors, splits)


def _rank_files(folder: Path) -> list[Path]:
    """The files of the ranks in order; raises CheckpointError when some are missing."""
    found = {file.name for file in folder.glob(FILE_PATTERN)}
    odd = sorted(name for name in found if not re.fullmatch(r"consolidated\.[0-9]{2}\.pth", name))
    if odd:
        raise CheckpointError(f"{folder / odd[0]}: expected names consolidated.00.pth, consolidated.01.pth and so on.")
    if not found:
        raise CheckpointError(f"{folder} has {meta_config.PARAMS} but no weights: {consolidated(0)} is missing.")
    count = int(max(found).split(".")[1]) + 1
    missing = [consolidated(rank) for rank in range(count) if consolidated(rank) not in found]
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} of {count} or more files missing: {shorten(missing)}.")
    if count > MAX_FILES:
        raise CheckpointError(f"{folder}: has {count} files; checkpoints of 1 to {MAX_FILES} are supported.")
    return [folder / consolidated(rank) for rank in range(count)]


def _check_number(folder: Path, splits: Mapping[str, Split], config: LlamaConfig) -> None:
    """The last files may be missing: the heads of one tell how many there are."""
    wq = splits.get("layers.0.wq")
    if wq is None or not wq.parts[0].shape[0]:
        return
    count, odd = divmod(config.n_heads * config.head_dim, wq.parts[0].shape[0])
    missing = [consolidated(rank) for rank in range(len(wq.parts), min(count, MAX_FILES))]
    if missing and not odd:
        raise CheckpointError(f"{folder}: has {len(wq.parts)} of {count} files; missing: {shorten(missing)}.")


def _join(files: list[Path], ranks: list[Mapping[str, FileTensor]], dim: int) -> dict[str, Split]:
    """Every tensor with its parts, by canonical name. Raises CheckpointError when the files do not belong together."""
    splits: dict[str, Split] = {}
    for file, rank in zip(files, ranks, strict=True):
        differing = sorted(ranks[0].keys() ^ rank.keys())
        if differing:
            lacking = files[0] if differing[0] in rank else file
            raise CheckpointError(f"{lacking}: lacks tensor {differing[0]}, which the other files have.")
    for name, first in ranks[0].items():
        if name == DERIVED:
            continue
        canonical = to_canonical(name, META_NAMES)
        expected = to_stored(canonical, META_NAMES)
        if name != expected:  # a canonical name would pass for the tensor that it means, unchecked
            raise CheckpointError(f"{first.file}: tensor {name} should be called {expected}.")
        parts = tuple(rank[name] for rank in ranks)
        for part in parts:
            if (part.shape, part.dtype) != (first.shape, first.dtype):
                raise CheckpointError(
                    f"{part.file}: tensor {name} is {part.dtype} {part.shape}, but {first.dtype} {first.shape} "
                    f"in {first.file.name}."
                )
        axis = SPLIT_AXES.get(canonical.rpartition(".")[2])
        if canonical == "tok_embeddings":
            if len(first.shape) != 2 or first.shape[1] not in (dim, dim / len(files)):
                raise CheckpointError(
                    f"{first.file}: tensor {name} is {first.shape}; with {len(files)} files and dim={dim}, expected "
                    f"rows of {dim} (Llama 3) or {dim / len(files):g} (Llama 2)."
                )
            axis = 0 if first.shape[1] == dim else 1
        if axis is not None and len(first.shape) != 2:
            raise CheckpointError(f"{first.file}: tensor {name} is {first.shape}, but should be a matrix.")
        splits[canonical] = Split(axis, parts)
    return splits


def _is_tied(splits: Mapping[str, Split], params: Mapping[str, object]) -> bool:
    """Whether the output matrix is the embeddings: the same bytes of the file; in Llama 3.2 1B and 3B absent or equal.

    These are the published models that are tied, and their files hold the matrix twice: it is read to be compared. A
    file of any other model that lacks its output is damaged.
    """
    embeddings, output = splits["tok_embeddings"], splits.get("output")
    if not meta_config.is_llama32(params):
        return output is not None and output.parts == embeddings.parts
    if output is None or output.parts == embeddings.parts:
        return True
    if output.parts[0].shape != embeddings.parts[0].shape:
        return False
    return all(_same_bytes(a, b) for a, b in zip(embeddings.parts, output.parts, strict=True))


def _same_bytes(a: FileTensor, b: FileTensor) -> bool:
    """Whether two tensors of one shape and dtype are equal, bit for bit."""
    if a.dtype != b.dtype:
        return False
    rows = max(1, COMPARED_BYTES // max(1, a.nbytes // max(1, a.shape[0])))
    first, second = (np.empty((min(rows, a.shape[0]), *a.shape[1:]), a.dtype) for _ in range(2))
    for start in range(0, a.shape[0], rows):
        count = min(rows, a.shape[0] - start)
        for tensor, out in ((a, first), (b, second)):
            read_slices(tensor, (slice(start, start + count), slice(None)), out[:count], "of tied embeddings")
        if not np.array_equal(first[:count].view(np.uint8), second[:count].view(np.uint8)):
            return False
    return True
