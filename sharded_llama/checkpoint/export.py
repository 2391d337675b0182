"""Writes a checkpoint in any format, from another one or from weights on a mesh: complete, or not there at all.

Every format takes the canonical tensors in one pass, in blocks of rows, so that the host holds a few blocks.
"""

import os
import shutil
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from tqdm import tqdm

from ..config import LlamaConfig
from ..errors import CheckpointError
from ..json_file import write_json
from ..tokenizer.convert import to_hf_tokenizer, to_tiktoken
from ..weights import XfmrWeights
from .folders import check_tokenizer, copy_side_files, make_partial, new_folder, publish, side_files
from .hf.writer import CONFIG, MAX_SHARD_BYTES, hf_writer, to_hf_dict
from .layout import canonical_shapes, shard_pieces
from .meta.writer import meta_writer
from .orbax.writer import WEIGHTS, OrbaxWriter
from .reader import check_tensors
from .source import CheckpointSource, TensorInfo

BLOCK_BYTES = 16 << 20
THREADS = 4
BLOCKS_AHEAD = 8
PARTIAL = ".partial"  # in the names of folders that are not finished

Blocks = Iterator[tuple[str, np.ndarray]]  # canonical name, its next rows; in the order of `canonical_shapes`


@dataclass(frozen=True)
class ExportFormat:
    """What to write, and how it is divided into files."""

    name: str = "hf"  # one of FORMATS
    max_shard_bytes: int = MAX_SHARD_BYTES  # of a Hugging Face file; a larger tensor has one of its own
    meta_files: int = 1  # model-parallel ranks of a Meta checkpoint

    def __post_init__(self) -> None:
        if self.name not in FORMATS:
            raise CheckpointError(f"{self.name!r} is not a format to write: it must be one of {', '.join(FORMATS)}.")


FORMATS = ("hf", "meta", "orbax")


class Writer(Protocol):
    """Takes canonical tensors in order."""

    def write(self, name: str, block: np.ndarray) -> None:
        """Appends rows to a tensor."""


def convert(
    source: CheckpointSource,
    config: LlamaConfig,
    folder: str | os.PathLike[str],
    format: ExportFormat = ExportFormat(),
    *,
    progress: bool = True,
) -> int:
    """Writes the checkpoint `source` of `config`, in `config.dtype`, as the new folder `folder`.

    The tokenizer and the sampling defaults come along. Memory is a few blocks of 16 MiB, or heads if these are larger.
    Returns the bytes of all tensors. Raises CheckpointError as `save_weights` does, or when `source` does not hold
    the tensors of `config`.
    """
    check_tensors(source, config)
    folder = new_folder(folder)
    total = model_bytes(config)
    show = progress and sys.stderr.isatty()
    with tqdm(total=total, unit="B", unit_scale=True, desc="Converting", disable=not show) as bar:

        def counted() -> Blocks:
            for name, block in source_blocks(source, config):
                yield name, block
                bar.update(block.nbytes)

        _write_folder(counted(), config, folder, format, Path(source.location))
    return total


def save_weights(
    weights: XfmrWeights,
    config: LlamaConfig,
    folder: str | os.PathLike[str],
    format: ExportFormat = ExportFormat(),
    *,
    tokenizer_folder: str | os.PathLike[str] | None = None,
) -> None:
    """Writes `weights` in `config.dtype`, with config and the tokenizer's files, as the new folder `folder`.

    Tensors are canonical: nothing fused, repeated or padded. The host holds one stored array and one tensor at a
    time. The folder appears under its name only when it is complete. Of several processes all must call this; the
    first one writes. Raises CheckpointError when `folder` exists and is not empty, when `tokenizer_folder` holds
    no tokenizer, or when writing fails.
    """
    failure: Exception | None = None
    writer = jax.process_index() == 0
    if writer:
        try:
            folder = new_folder(folder)
            if tokenizer_folder is not None:
                check_tokenizer(tokenizer_folder)
        except CheckpointError as e:
            failure = e
    _raise_everywhere(failure)
    tensors = _weight_blocks(weights, config)
    if writer:
        try:
            _write_folder(tensors, config, folder, format, tokenizer_folder and Path(tokenizer_folder))
            logging.info("Exported %s.", folder)
        except Exception as e:  # whatever it is, the others must not wait for this process
            failure = e
    if jax.process_count() > 1:
        for _ in tensors:  # gathers need every process, even when the writer has given up
            pass
    _raise_everywhere(failure)


def model_bytes(config: LlamaConfig) -> int:
    """Bytes of all canonical tensors in `config.dtype`."""
    return sum(int(np.prod(shape)) for shape in canonical_shapes(config).values()) * config.jnp_dtype.itemsize


def _raise_everywhere(failure: Exception | None) -> None:
    """Raises on all processes what the first one found: going separate ways, some would wait for ever."""
    failed = multihost_utils.broadcast_one_to_all(np.int32(failure is not None))
    if failure is not None:
        raise failure
    if failed:
        raise CheckpointError("the first process could not export; see its message.")


def stored_dtype(source: CheckpointSource) -> str:
    """The smallest dtype that holds the values of all tensors exactly."""
    dtypes = {info.dtype.name for info in source.tensors.values()}
    if len(dtypes) == 1:
        return dtypes.pop()
    return "float64" if "float64" in dtypes else "float32"  # bfloat16 and float16 do not hold one another


def source_blocks(source: CheckpointSource, config: LlamaConfig) -> Blocks:
    """The canonical tensors of a checkpoint in `config.dtype`, read a few blocks ahead by several threads."""

    def read(name: str, rows: slice, shape: tuple[int, ...]) -> np.ndarray:
        out = np.empty((rows.stop - rows.start, *shape[1:]), config.jnp_dtype)
        source.read(name, (rows, *(slice(0, n) for n in shape[1:])), out)
        return out

    with ThreadPoolExecutor(THREADS) as pool:
        ahead: deque[tuple[str, Future[np.ndarray]]] = deque()
        try:
            for name, shape in canonical_shapes(config).items():
                for rows in row_blocks(config, name, shape):
                    ahead.append((name, pool.submit(read, name, rows, shape)))
                    if len(ahead) >= BLOCKS_AHEAD:
                        name_of, block = ahead.popleft()
                        yield name_of, block.result()
            for name, block in ahead:
                yield name, block.result()
        finally:
            pool.shutdown(cancel_futures=True)


def row_blocks(config: LlamaConfig, name: str, shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of a tensor in blocks of BLOCK_BYTES; of wq and wk, in whole heads, which Meta's layout permutes."""
    unit = config.head_dim if name.endswith(("wq", "wk")) else 1
    row_bytes = int(np.prod(shape[1:])) * config.jnp_dtype.itemsize
    step = max(1, BLOCK_BYTES // (row_bytes * unit)) * unit
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _weight_blocks(weights: XfmrWeights, config: LlamaConfig) -> Blocks:
    """The canonical tensors of weights on a mesh, each whole. Every process must take part."""
    for path, array in jax.tree_util.tree_leaves_with_path(weights):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        yield from _unfuse(_to_host(array), name, config)


def _unfuse(stored: np.ndarray, name: str, config: LlamaConfig) -> Blocks:
    shapes = canonical_shapes(config)
    pieces = shard_pieces(config, name, stored.shape, (slice(None),) * stored.ndim)
    for tensor in dict.fromkeys(piece.tensor for piece in pieces):
        out = np.empty(shapes[tensor], config.jnp_dtype)
        for piece in pieces:
            if piece.tensor == tensor:
                out[piece.source] = piece.view(stored)  # copies of a repeated head are equal: any may stay
        yield tensor, out


def _to_host(array: jax.Array) -> np.ndarray:
    """The whole of a global array in the memory of every process."""
    if not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    # An array keeps the host copy that NumPy asks of it; this one of the same buffers is dropped with its copy.
    buffers = [shard.data for shard in array.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, buffers))


def _write_folder(
    blocks: Blocks, config: LlamaConfig, folder: Path, format: ExportFormat, side_folder: Path | None
) -> None:
    """Fills a folder of another name and renames it at the end: a run that is cut short leaves nothing that loads."""
    try:
        partial = make_partial(folder, PARTIAL)
        try:
            _check_space(partial, config, format)
            if side_folder is not None:  # first: what is wrong with a tokenizer shows before hours of writing
                _copy_side_files(side_folder, partial, config, format)
            with _open_writer(partial, config, format) as writer:
                for name, block in blocks:
                    writer.write(name, block)
            if format.name != "meta":  # whose writer ends with params.json: without these nothing loads
                write_json(partial / CONFIG, to_hf_dict(config))
            publish(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as e:
        raise CheckpointError(f"{folder}: cannot be written: {e}") from e


def _open_writer(folder: Path, config: LlamaConfig, format: ExportFormat) -> AbstractContextManager[Writer]:
    match format.name:
        case "hf":
            return hf_writer(folder, config, format.max_shard_bytes)
        case "meta":
            return meta_writer(folder, config, format.meta_files)
        case _:
            infos = {name: TensorInfo(shape, config.jnp_dtype) for name, shape in canonical_shapes(config).items()}
            return OrbaxWriter(folder / WEIGHTS, infos)


def _copy_side_files(source: Path, target: Path, config: LlamaConfig, format: ExportFormat) -> None:
    """The tokenizer, in the form that the format's users need, and the sampling defaults."""
    files = {file.name: file for file in side_files(source)}
    copy_side_files(list(files.values()), target, config.eos_ids)
    if format.name == "hf" and "tokenizer.json" not in files and "tokenizer.model" in files:
        to_hf_tokenizer(files["tokenizer.model"], target)
    if format.name == "meta" and "tokenizer.model" not in files and "tokenizer.json" in files:
        to_tiktoken(files["tokenizer.json"], target / "tokenizer.model")


def _check_space(folder: Path, config: LlamaConfig, format: ExportFormat) -> None:
    """Raises OSError before a disk is filled in vain; orbax compresses, by how much is not known before."""
    free, needed = shutil.disk_usage(folder).free, model_bytes(config)
    if format.name != "orbax" and free < needed:
        raise OSError(f"it needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free there.")
