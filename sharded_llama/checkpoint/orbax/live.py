"""Saves weights that live on a mesh as an orbax checkpoint, in the background, each process its own share."""

import asyncio
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ...config import LlamaConfig
from ...errors import CheckpointError
from ...json_file import write_json
from ...mesh import broadcast_from_main, check_mesh
from ...weights import XfmrWeights
from ..folders import check_tokenizer, copy_side_files, make_partial, new_folder, publish, side_files
from ..hf.writer import CONFIG, to_hf_dict
from .source import METADATA, TEMPORARY, WEIGHTS
from .unfuse import unfuse_weights
from .writer import CHUNK_BYTES, write_metadata


class Saving:
    """A save under way. Every process must call `wait`; the checkpoint appears then and not before."""

    def __init__(self, folder: Path, partial: Path, config: LlamaConfig, side_files: list[Path]) -> None:
        self.folder = folder
        self._partial = partial
        self._config = config
        self._side_files = side_files
        self._handler: Any = None
        self._futures: list[Any] = []
        self._failure: Exception | None = None  # of this process
        self._error: CheckpointError | None = None  # of the save, which every process knows
        self._finished = False

    def _start(self, weights: XfmrWeights, mesh: Mesh) -> None:
        """Copies this process's part to the host and begins to write it. A failure is kept for `wait`."""
        import orbax.checkpoint as ocp
        from etils import epath

        try:
            # Orbax waits for stragglers with a time limit, in which a large model may not be written. Its handler
            # is used without its checkpointer, and `wait` brings the processes together.
            tensors = unfuse_weights(weights, self._config, mesh)
            self._handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True)
            save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tensors)
            args = ocp.args.PyTreeSave(tensors, save_args)
            saving = self._handler.async_save(epath.Path(self._partial / WEIGHTS), args=args)
            with ThreadPoolExecutor(1) as pool:  # the caller's thread may run an event loop of its own
                self._futures = pool.submit(asyncio.run, saving).result()
        except Exception as e:
            self._failure = e

    def wait(self) -> None:
        """Blocks until the checkpoint is complete and stands under its name.

        Raises CheckpointError, in every process, when writing failed in any; the folder is removed then. May be
        called again.
        """
        if self._finished:
            return
        if self._error:
            raise self._error
        failure = self._failure
        for future in self._futures:
            try:
                future.result()
            except Exception as e:
                failure = e
        self._agree(failure)
        if jax.process_index() == 0:
            try:
                self._publish()
            except Exception as e:
                failure = e
        self._agree(failure)
        self._finished = True
        self._close()
        logging.info("Saved %s.", self.folder)

    def _agree(self, failure: Exception | None) -> None:
        """Raises in every process what went wrong in any. All of them have stopped writing then."""
        try:
            _agree(failure and f"{self.folder}: cannot be written: {failure}")
        except CheckpointError as e:
            self._error = e
            self._close()
            if jax.process_index() == 0:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise e from failure

    def _close(self) -> None:
        """Ends orbax's threads."""
        if self._handler is not None:
            self._handler.close()

    def _publish(self) -> None:
        from etils import epath

        item = self._partial / WEIGHTS
        self._handler.finalize(epath.Path(item))  # joins the databases of the processes
        # Restored without a target, the arrays shall be plain ones, not look for the devices of this run.
        tree = json.loads((item / METADATA).read_text())
        for entry in tree["tree_metadata"].values():
            entry["value_metadata"] = {"value_type": "np.ndarray", "skip_deserialize": False}
        (item / "_sharding").unlink(missing_ok=True)
        write_metadata(item, tree)
        copy_side_files(self._side_files, self._partial, self._config.eos_ids)
        write_json(self._partial / CONFIG, to_hf_dict(self._config))
        publish(self._partial, self.folder)


def save_orbax(
    weights: XfmrWeights,
    config: LlamaConfig,
    folder: str | os.PathLike[str],
    *,
    mesh: Mesh,
    tokenizer_folder: str | os.PathLike[str] | None = None,
) -> Saving:
    """Saves `weights` of `config` on `mesh` as the new checkpoint `folder`, in the background.

    The tensors are stored in `config.dtype`. Returns once the weights may be donated or changed; `Saving.wait`
    completes the checkpoint. Of several processes all must call both, and each writes its own part to the file system
    that they share.

    Until it returns, each device holds its shard of the canonical tensors beside the weights: as much again at most
    (more only of a tensor that cannot be split, see `unfuse_weights`). Then the host holds this process's part until
    it is written. The tokenizer and generation_config.json come from `tokenizer_folder`.

    Raises CheckpointError, in every process, when orbax is missing, `folder` exists and is not empty, or
    `tokenizer_folder` holds no tokenizer; MeshError when `mesh` does not fit.
    """
    check_mesh(config, mesh)
    folder = Path(os.path.realpath(folder))
    partial, files = folder, []
    problem = None
    try:
        _check_orbax()
        if jax.process_index() == 0:
            partial, files = _prepare(folder, tokenizer_folder)
    except Exception as e:  # whatever it is, the others must not wait for this process
        problem = f"{folder}: cannot be saved: {e}"
    _agree(problem)
    partial = Path(broadcast_from_main(lambda: str(partial)))
    saving = Saving(folder, partial, config, files)
    saving._start(weights, mesh)
    return saving


def _check_orbax() -> None:
    try:
        import orbax.checkpoint  # noqa: F401
    except ImportError as e:
        raise CheckpointError(f"orbax checkpoints need a package: pip install 'sharded_llama[orbax]' ({e}).") from e


def _prepare(folder: Path, tokenizer_folder: str | os.PathLike[str] | None) -> tuple[Path, list[Path]]:
    """Checks what is given and makes the folder to fill; returns it and the files to copy beside the weights."""
    new_folder(folder)
    files: list[Path] = []
    if tokenizer_folder is not None:
        check_tokenizer(tokenizer_folder)
        files = side_files(tokenizer_folder)
    partial = make_partial(folder, TEMPORARY)
    (partial / WEIGHTS).mkdir()
    return partial, files


def _agree(problem: str | None) -> None:
    """Raises CheckpointError in every process when one has a problem: going separate ways, some would wait for ever."""
    found = np.atleast_1d(multihost_utils.process_allgather(np.int32(problem is not None)))
    if found.any():
        raise CheckpointError(problem or f"process {int(found.argmax())} could not save; see its message.")
