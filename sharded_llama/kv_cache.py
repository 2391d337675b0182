"""The key/value cache of one layer, sharded over the batch and the kv heads, updated in place when donated."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from .config import LlamaConfig
from .errors import MeshError
from .sharding import DATA, MODEL, kv_head_layout, named_sharding


class KVCache(NamedTuple):
    """Keys and values of one layer: (B, S, G', K), position s of row b at [b, s]."""

    k_BSGK: jax.Array
    v_BSGK: jax.Array

    @classmethod
    def abstract(cls, config: LlamaConfig, mesh: Mesh, batch: int, length: int) -> tuple["KVCache", ...]:
        """The shapes and shardings of `new`, without memory."""
        if batch % mesh.shape[DATA]:
            raise MeshError(f"a cache of {batch} rows does not divide over data={mesh.shape[DATA]}.")
        n_kv_heads, _ = kv_head_layout(config, mesh.shape[MODEL])
        array = jax.ShapeDtypeStruct(
            (batch, length, n_kv_heads, config.head_dim), config.jnp_dtype, sharding=named_sharding(mesh, "kv_cache")
        )
        return (cls(array, array),) * config.n_layers

    @classmethod
    def new(cls, config: LlamaConfig, mesh: Mesh, batch: int, length: int) -> tuple["KVCache", ...]:
        """One empty cache per layer, each made directly in its shards."""
        return _zeros(config, mesh, batch, length)

    def update(
        self,
        k_BLGK: jax.Array,
        v_BLGK: jax.Array,
        cur_pos_B: jax.Array | None,
        first_row: jax.Array | int = 0,
    ) -> "KVCache":
        """Writes L new tokens per row at positions cur_pos.. and returns the cache (in place when donated).

        `cur_pos_B=None` means position 0 in every row; the rows then start at row `first_row` of the cache, which
        may have more of them. Padding of a prompt may be written: it lies behind the row's last token, where
        nothing looks before a later token replaces it. Positions past the end of the cache are not written.
        """
        return KVCache(
            _write(self.k_BSGK, k_BLGK, cur_pos_B, first_row), _write(self.v_BSGK, v_BLGK, cur_pos_B, first_row)
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _zeros(config: LlamaConfig, mesh: Mesh, batch: int, length: int) -> tuple[KVCache, ...]:
    """Jitted, so that no device ever holds more than its shards; compiled once for each size."""
    return jax.tree.map(
        lambda s: jax.lax.with_sharding_constraint(jnp.zeros(s.shape, s.dtype), s.sharding),
        KVCache.abstract(config, mesh, batch, length),
    )


def _write(
    cache_BSGK: jax.Array, new_BLGK: jax.Array, cur_pos_B: jax.Array | None, first_row: jax.Array | int
) -> jax.Array:
    rows, length = new_BLGK.shape[:2]
    if cur_pos_B is None:
        if length > cache_BSGK.shape[1]:
            raise ValueError(f"{length} tokens do not fit a cache of {cache_BSGK.shape[1]} positions")
        zero = jnp.zeros_like(first_row)  # indices must be of one type, whichever is the default
        return jax.lax.dynamic_update_slice(cache_BSGK, new_BLGK, (first_row, zero, zero, zero))
    if length == 1:
        # The hot path of decoding. The caller keeps positions within the cache, so no bounds are checked.
        return cache_BSGK.at[jnp.arange(rows), cur_pos_B].set(
            new_BLGK[:, 0], mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True
        )
    positions_BL = cur_pos_B[:, None] + jnp.arange(length)
    return cache_BSGK.at[jnp.arange(rows)[:, None], positions_BL].set(
        new_BLGK, mode="drop", unique_indices=True, indices_are_sorted=True
    )
