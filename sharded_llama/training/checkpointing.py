"""The training state on disk, written and read by orbax straight from and into its shards."""

import os
from logging import WARNING, LogRecord
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from ..errors import TrainingError
from .step import TrainState

ORBAX = os.path.join("orbax", "checkpoint")
KEEP = 2  # states; the one before the last is there in case the last one is damaged


class StateStore:
    """The last saved states in a folder, by number of steps. Of several processes all must call every method."""

    def __init__(self, folder: str | os.PathLike[str]):
        logging.get_absl_logger().addFilter(_is_worth_reading)
        self.folder = Path(os.path.abspath(folder))
        options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(
            self.folder, item_handlers=ocp.StandardCheckpointHandler(), options=options
        )

    @property
    def latest_step(self) -> int | None:
        """Steps done in the newest state; None when there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Saves `state` under its step; it is found only when it is complete."""
        self._manager.save(int(state.step), args=ocp.args.StandardSave(state))

    def restore(self, abstract: TrainState) -> TrainState:
        """The newest state, laid out as `abstract` (of `abstract_train_state`) says, on whatever mesh it was saved.

        Raises TrainingError when there is none, or when its arrays have other shapes: the model is another one, or
        padded otherwise on this mesh.
        """
        step = self.latest_step
        if step is None:
            raise TrainingError(f"{self.folder} holds no saved state to resume from.")
        stored, wanted = _shapes(self._manager.item_metadata(step)), _shapes(abstract)
        for name in wanted | stored:
            if stored.get(name) != wanted.get(name):
                raise TrainingError(
                    f"{self.folder / str(step)}: {name} has the shape {stored.get(name)}, but this run needs "
                    f"{wanted.get(name)}. The vocabulary and the feed-forward width are padded to a multiple of the "
                    "mesh's model size: resume on the mesh that the run began on, or on one that pads alike."
                )
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def close(self) -> None:
        """Ends orbax's threads."""
        self._manager.close()


def _is_worth_reading(record: LogRecord) -> bool:
    """Leaves out the many lines in which orbax describes itself."""
    return record.levelno >= WARNING or ORBAX not in record.pathname


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Array name, such as `weights.layers.3.wo`, to shape: the same for a state and for orbax's description of one."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}
