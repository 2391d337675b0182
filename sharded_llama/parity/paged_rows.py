"""Sequences of equal length in the paged cache, each in pages of its own: for running prompts piece by piece."""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ..engine.options import block_of
from ..kv_cache import PAGE_SIZE, KVPages
from ..model import StepRows
from ..sharding import DATA, put


class PagedRows(NamedTuple):
    """Which pages the sequences have. They stand in reverse, so that a table that is not looked at shows."""

    tables_BW: np.ndarray
    n_pages: int  # of each data shard

    @classmethod
    def new(cls, mesh: Mesh, batch: int, length: int) -> "PagedRows":
        """Room for `batch` sequences of `length` tokens; the batch divides over `data`."""
        width, of_shard = -(-length // PAGE_SIZE), batch // mesh.shape[DATA]
        first_B = np.arange(batch) % of_shard * width
        return cls((first_B[:, None] + np.arange(width)[::-1]).astype(np.int32), of_shard * width)

    def step(self, tokens_BL: np.ndarray, starts_B: np.ndarray, mesh: Mesh) -> tuple[StepRows, int, int]:
        """The rows that run L tokens of each sequence, as serving does: single tokens, or rows of chunks.

        Returns global arrays, the rows of one token on each data shard, and the tokens that each sequence has in the
        step, padding included.
        """
        batch, length = tokens_BL.shape
        block = 1 if length == 1 else block_of(mesh)
        n_rows = -(-length // block)
        padded_BL = np.pad(tokens_BL, [(0, 0), (0, n_rows * block - length)]).astype(np.int32)
        first = np.arange(n_rows) * block
        rows = StepRows(
            tokens_T=padded_BL.reshape(-1),
            start_R=(starts_B[:, None] + first).reshape(-1).astype(np.int32),
            length_R=np.tile(np.minimum(length - first, block), batch).astype(np.int32),
            tables_RW=np.repeat(self.tables_BW, n_rows, axis=0),
        )
        n_single = batch // mesh.shape[DATA] if block == 1 else 0
        return jax.tree.map(lambda x: put(mesh, "tokens", x), rows), n_single, n_rows * block

    def cached(self, pages: KVPages, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values (B, length, G', K) that host arrays of pages hold."""
        batch, width = self.tables_BW.shape
        kv = pages.kv_NPGK
        kv = kv.reshape(batch, width, *kv.shape[1:])[:, ::-1].reshape(batch, -1, *kv.shape[2:])[:, :length]
        return kv[:, :, 0::2], kv[:, :, 1::2]
