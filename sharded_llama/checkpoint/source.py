"""The seam between checkpoint formats and the sharded reader.

A format lists its tensors under canonical names and reads any slice of one. It knows nothing of meshes,
fusing or padding; the reader knows nothing of files. The canonical tensors, as (out, in) matrices:

    tok_embeddings           (V, D)      layers.{i}.ffn_norm  (D,)
    layers.{i}.attention_norm  (D,)      layers.{i}.w1        (F, D)  gate
    layers.{i}.wq          (H*K, D)      layers.{i}.w3        (F, D)  up
    layers.{i}.wk          (G*K, D)      layers.{i}.w2        (D, F)  down
    layers.{i}.wv          (G*K, D)      norm                 (D,)
    layers.{i}.wo          (D, H*K)      output               (V, D)  absent when tied

Rows of wq and wk are in the half-split rotary convention; a format that stores them interleaved permutes
them while reading.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..config import LlamaConfig


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor as it is stored."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSequence:
    """Checks that tensors are written in the order of `tensors`, each completely, in blocks of its dtype."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = iter(tensors.items())
        self._name, self._dtype, self._missing = "the first one", np.dtype(np.uint8), 0

    def advance(self, name: str, block: np.ndarray) -> None:
        """Raises ValueError unless `block` is what comes next of tensor `name`, or begins it when it is the next."""
        if name != self._name:
            self.finish(last=False)
            self._name, info = next(self._tensors, ("none", TensorInfo((0,), self._dtype)))
            self._dtype, self._missing = info.dtype, info.nbytes
        if name != self._name or block.dtype != self._dtype or block.nbytes > self._missing:
            raise ValueError(
                f"{block.nbytes} bytes of {block.dtype} {name} were given, but {self._missing} bytes of {self._dtype} "
                f"{self._name} come next."
            )
        self._missing -= block.nbytes

    def finish(self, last: bool = True) -> None:
        """Raises ValueError when bytes of the tensor under way are missing, or (`last`) tensors after it."""
        after = next(self._tensors, None) if last else None
        if self._missing or (after and after[1].nbytes):
            raise ValueError(f"{self._missing} bytes of {self._name} are missing, and {after and after[0]} after it.")


def shorten(items: Iterable[str], limit: int = 5) -> str:
    """The first few items of a list that a message names, and the number of the others."""
    items = list(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


class CheckpointSource(Protocol):
    """An opened checkpoint. Opening reads headers only; `read` may be called from several threads."""

    @property
    def format(self) -> str:
        """What people call the format, for messages."""

    @property
    def location(self) -> str:
        """The checkpoint's folder."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by canonical name; one that has no canonical name stands under its stored name."""

    def read_config(self) -> LlamaConfig:
        """The model that the checkpoint says it holds. Raises ConfigError when that cannot be told or run."""

    def stored_name(self, name: str) -> str:
        """What the format calls the canonical tensor `name`, whether or not it is there: for messages."""

    def read(self, name: str, slices: tuple[slice, ...], out: np.ndarray) -> int:
        """Fills `out` with the slices (step 1, one per axis) of a tensor, converted to `out.dtype`.

        `out` has the shape of the slices and may be a strided view. Memory beyond `out` stays within a few
        tens of MB. Returns the bytes that the slices take in the checkpoint. Raises CheckpointError when they
        cannot be read.
        """
