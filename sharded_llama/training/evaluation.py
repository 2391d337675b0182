"""How well a model predicts a text: nats per token, and bits per byte, which compares across tokenizers."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..config import LlamaConfig
from ..model import xfmr
from ..weights import XfmrWeights
from .data import Batch, TokenizedText, evaluation_batches, put_batch
from .loss import token_nll


class Score(NamedTuple):
    """The cost of a text under a model."""

    nats: float  # -log p(text), windows taken as independent
    n_tokens: int
    n_bytes: int

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return self.nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the UTF-8 text."""
        return self.nats / math.log(2) / self.n_bytes


def score_text(
    weights: XfmrWeights,
    config: LlamaConfig,
    text: TokenizedText,
    *,
    mesh: Mesh,
    batch: int,
    length: int,
    bos_id: int,
    backend: str | None = None,
) -> Score:
    """Scores every token of `text` once, in consecutive windows of `length` tokens, each starting from BOS.

    `batch` windows run at a time, a multiple of the mesh's data size. `backend` is that of attention.
    """
    nats = 0.0
    for windows in evaluation_batches(text.ids, batch=batch, length=length, bos_id=bos_id):
        nats += float(_score_batch(weights, put_batch(windows, mesh), config=config, mesh=mesh, backend=backend))
    return Score(nats, len(text.ids), text.n_bytes)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "backend"))
def _score_batch(
    weights: XfmrWeights, batch: Batch, *, config: LlamaConfig, mesh: Mesh, backend: str | None
) -> jax.Array:
    logits_BLV = xfmr(weights, config, batch.tokens_BL, mesh=mesh, backend=backend)
    return jnp.sum(jnp.where(batch.valid_BL, token_nll(logits_BLV, batch.targets_BL), 0))
