"""Prefill and decode as compiled functions: one executable per shape, caches updated in place."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from ..attention import choose_backend
from ..config import LlamaConfig
from ..kv_cache import KVCache
from ..model import xfmr
from ..sampling import RowParams, sample
from ..sharding import named_sharding
from ..weights import XfmrWeights, abstract_weights


def prefill(
    weights: XfmrWeights,
    caches: tuple[KVCache, ...],
    tokens_BL: jax.Array,
    lengths_B: jax.Array,
    first_row: jax.Array,
    rows: RowParams | None,
    *,
    config: LlamaConfig,
    mesh: Mesh,
    backend: str,
) -> tuple[jax.Array, tuple[KVCache, ...]]:
    """Runs prompts, padded on the right to L, from position 0 and samples each one's first new token.

    The batch may be a part of the cache's: on every data shard it fills the rows from `first_row` on.
    Returns tokens (B,) and the caches.
    """
    logits_BV, caches = xfmr(
        weights,
        config,
        tokens_BL,
        None,
        caches,
        mesh=mesh,
        logits_at_B=lengths_B - 1,
        first_row=first_row,
        backend=backend,
    )
    return sample(logits_BV, rows, lengths_B, vocab_size=config.vocab_size, mesh=mesh), caches


def decode(
    weights: XfmrWeights,
    caches: tuple[KVCache, ...],
    tokens_B: jax.Array,
    cur_pos_B: jax.Array,
    rows: RowParams | None,
    *,
    config: LlamaConfig,
    mesh: Mesh,
    backend: str,
) -> tuple[jax.Array, jax.Array, tuple[KVCache, ...]]:
    """Adds every row's newest token to the cache at its position and samples the next one.

    Returns tokens (B,), their positions (B,) and the caches: the arguments of the next step.
    """
    logits_BV, caches = xfmr(
        weights,
        config,
        tokens_B[:, None],
        cur_pos_B,
        caches,
        mesh=mesh,
        logits_at_B=jnp.zeros_like(cur_pos_B),
        backend=backend,
    )
    tokens_B = sample(logits_BV, rows, cur_pos_B + 1, vocab_size=config.vocab_size, mesh=mesh)
    # Rows that are finished run on until the batch is; they must stay within the cache.
    last_position = caches[0].k_BSGK.shape[1] - 1
    return tokens_B, jnp.minimum(cur_pos_B + 1, last_position), caches


class Steps:
    """The compiled steps of one model on one mesh, each compiled on first use and kept."""

    def __init__(self, config: LlamaConfig, mesh: Mesh, backend: str | None = None):
        self.config = config
        self.mesh = mesh
        self.backend = choose_backend(config, mesh.devices.flat[0], backend)
        self._compiled: dict[tuple, Any] = {}

    @property
    def n_compiled(self) -> int:
        """Number of executables made so far."""
        return len(self._compiled)

    def prefill(self, batch: int, length: int, cache_batch: int, cache_length: int, *, greedy: bool) -> Any:
        """Executable of `prefill` for `batch` prompts padded to `length`: f(weights, caches, tokens, lengths, ...)."""
        args = (
            abstract_weights(self.config, self.mesh),
            KVCache.abstract(self.config, self.mesh, cache_batch, cache_length),
            self._abstract("tokens", (batch, length), jnp.int32),
            self._abstract("tokens", (batch,), jnp.int32),
            self._abstract("replicated", (), jnp.int32),
            None if greedy else self._abstract_rows(batch),
        )
        shape = {"batch": batch, "length": length, "cache_batch": cache_batch, "cache_length": cache_length}
        return self._compile(prefill, args, **shape, greedy=greedy)

    def decode(self, batch: int, cache_length: int, *, greedy: bool) -> Any:
        """Executable of `decode`: f(weights, caches, tokens, cur_pos, rows) -> (tokens, cur_pos, caches)."""
        args = (
            abstract_weights(self.config, self.mesh),
            KVCache.abstract(self.config, self.mesh, batch, cache_length),
            self._abstract("replicated", (batch,), jnp.int32),
            self._abstract("tokens", (batch,), jnp.int32),
            None if greedy else self._abstract_rows(batch),
        )
        return self._compile(decode, args, batch=batch, cache_length=cache_length, greedy=greedy)

    def put(self, name: str, array: np.ndarray) -> jax.Array:
        """A host array, the same in every process, as a global array laid out as the table says for `name`."""
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, named_sharding(self.mesh, name), lambda index: array[index])

    def put_rows(self, rows: RowParams) -> RowParams:
        return RowParams(*(self.put("tokens", x) for x in rows))

    def _abstract(self, name: str, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(self.mesh, name))

    def _abstract_rows(self, batch: int) -> RowParams:
        f32 = self._abstract("tokens", (batch,), jnp.float32)
        return RowParams(
            temperature_B=f32,
            top_k_B=self._abstract("tokens", (batch,), jnp.int32),
            top_p_B=f32,
            min_p_B=f32,
            seed_B2=self._abstract("tokens", (batch, 2), jnp.uint32),
        )

    def _compile(self, step: Any, args: tuple, **shape: int) -> Any:
        key = (step, *shape.items())
        if key not in self._compiled:
            start = time.perf_counter()
            run = functools.partial(step, config=self.config, mesh=self.mesh, backend=self.backend)
            # Outputs keep the layout of the inputs they replace, so that one step's result is the next one's input;
            # the caches (argument 1) are donated, so that they are updated in place.
            jitted = jax.jit(run, donate_argnums=1, out_shardings=self._out_shardings(step))
            self._compiled[key] = jitted.lower(*args).compile()
            described = ", ".join(f"{name}={value}" for name, value in shape.items())
            logging.info("compiled %s (%s): %.1f s", step.__name__, described, time.perf_counter() - start)
        return self._compiled[key]

    def _out_shardings(self, step: Any) -> Any:
        tokens, positions, cache = (named_sharding(self.mesh, n) for n in ("replicated", "tokens", "kv_cache"))
        return (tokens, cache) if step is prefill else (tokens, positions, cache)
