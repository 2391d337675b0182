"""The paged key/value cache of one layer: pages of P positions, sharded over `data` and the kv heads.

A sequence's position s stands at place s % P of the page that its block table names at s // P. Each data shard has a
pool of its own, and block tables hold the page's number within it. Written in place when donated.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding

from .config import LlamaConfig
from .errors import ConfigError
from .layers import accumulator
from .sharding import DATA, MODEL, kv_head_layout, named_sharding

PAGE_SIZE = 16  # positions; what is cached and shared between sequences is whole pages

# Types of the cache by name; "auto" is the model's own.
KV_DTYPES = ("auto", "bfloat16", "float32", "float8_e4m3fn", "int8")
EIGHT_BIT = {"float8_e4m3fn": 448.0, "int8": 127.0}  # largest value that is stored; a scale brings each head to it


class KVPages(NamedTuple):
    """Keys and values of one layer. kv head g has its key at 2g and its value at 2g+1 of the heads' axis."""

    kv_NPGK: jax.Array  # (N, P, 2G', K)
    scale_NPG: jax.Array | None = None  # float32 (N, P, 2G') of an 8-bit cache: what the stored values are times

    @classmethod
    def abstract(
        cls, config: LlamaConfig, mesh: Mesh, n_pages: int, kv_dtype: str = "auto", page_size: int = PAGE_SIZE
    ) -> tuple["KVPages", ...]:
        """The shapes and shardings of `new`, without memory."""
        n_kv_heads, _ = kv_head_layout(config, mesh.shape[MODEL])
        shape = (mesh.shape[DATA] * n_pages, page_size, 2 * n_kv_heads, config.head_dim)
        dtype = cache_dtype(config, kv_dtype)
        sharding = named_sharding(mesh, "kv_pages")
        kv = jax.ShapeDtypeStruct(shape, dtype, sharding=_layout(mesh))
        scale = jax.ShapeDtypeStruct(shape[:-1], jnp.float32, sharding=sharding) if dtype.name in EIGHT_BIT else None
        return (cls(kv, scale),) * config.n_layers

    @classmethod
    def new(
        cls, config: LlamaConfig, mesh: Mesh, n_pages: int, kv_dtype: str = "auto", page_size: int = PAGE_SIZE
    ) -> tuple["KVPages", ...]:
        """Empty pages for every layer, `n_pages` on each data shard, each made directly in its shards."""
        return _zeros(config, mesh, kv_dtype, n_pages, page_size)()

    def write(self, k_TGK: jax.Array, v_TGK: jax.Array, at_T: jax.Array) -> "KVPages":
        """Writes one token each at place `at_T` = page * P + place within the page; places beyond the pool are dropped.

        No two tokens may have the same place. What is not finite is stored as 0: a sequence whose numbers overflow must
        not reach those that have its pages after it, through products with probability 0. An 8-bit cache stores each
        head of each token with a scale of its own (largest absolute value over the type's), which is written once and
        never changes.
        """
        kv_TGK = jnp.stack([k_TGK, v_TGK], axis=-2).reshape(k_TGK.shape[0], -1, k_TGK.shape[-1])
        kv_TGK = jnp.where(jnp.isfinite(kv_TGK), kv_TGK, 0)
        dtype = self.kv_NPGK.dtype
        if self.scale_NPG is None:
            return KVPages(_put(self.kv_NPGK, kv_TGK.astype(dtype), at_T))
        largest = EIGHT_BIT[dtype.name]
        kv_TGK = kv_TGK.astype(accumulator(kv_TGK.dtype))
        # Never subnormal, which CPUs take for 0: zeros over it must be 0.
        scale_TG = jnp.maximum(jnp.max(jnp.abs(kv_TGK), axis=-1) / largest, jnp.finfo(jnp.float32).tiny)
        kv_TGK = kv_TGK / scale_TG[..., None]
        if dtype == jnp.int8:
            kv_TGK = jnp.round(kv_TGK)
        kv_TGK = jnp.clip(kv_TGK, -largest, largest).astype(dtype)
        return KVPages(_put(self.kv_NPGK, kv_TGK, at_T), _put(self.scale_NPG, scale_TG.astype(jnp.float32), at_T))

    def read(self, pages: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Keys and values (.., P, G', K) of pages (..), in `dtype`; numbers beyond the pool read some page."""
        kv = _get(self.kv_NPGK, pages)
        if self.scale_NPG is None:
            kv = kv.astype(dtype)
        else:
            scale = self.scale_NPG.at[pages].get(mode="clip")
            kv = (kv.astype(jnp.float32) * scale[..., None]).astype(dtype)
        return kv[..., 0::2, :], kv[..., 1::2, :]

    def copy(self, source_C: jax.Array, target_C: jax.Array) -> "KVPages":
        """Copies whole pages; targets beyond the pool are dropped."""

        def copied(x: jax.Array) -> jax.Array:
            return _in_bits(lambda x, at, new: x.at[at].set(new, mode="drop"), x, target_C, _get(x, source_C))

        return jax.tree.map(copied, self)


def _get(pages: jax.Array, at: jax.Array) -> jax.Array:
    return _in_bits(lambda pages, at: pages.at[at].get(mode="clip"), pages, at)


def _put(pages: jax.Array, new: jax.Array, at_T: jax.Array) -> jax.Array:
    flat = pages.reshape(-1, *pages.shape[2:])
    if len(at_T) == 1:
        # XLA makes a slice's update of a write at one place, and on CPUs then copies the pool. The second is nowhere.
        new, at_T = jnp.concatenate([new, new]), jnp.append(at_T, flat.shape[0])
    # Places beyond the pool are all made different, so that the indices are unique as promised.
    beyond_T = flat.shape[0] + jnp.arange(at_T.shape[0], dtype=at_T.dtype)
    at_T = jnp.where(at_T < flat.shape[0], at_T, beyond_T)

    def put(flat: jax.Array, at_T: jax.Array, new: jax.Array) -> jax.Array:
        return flat.at[at_T].set(new, mode="drop", unique_indices=True)

    return _in_bits(put, flat, at_T, new).reshape(pages.shape)


def _in_bits(move: Callable[..., jax.Array], pages: jax.Array, at: jax.Array, *new: jax.Array) -> jax.Array:
    """`move` of whole numbers in place of small floating-point types on CPUs, which do not have these: XLA would
    convert the whole pool to float32 and back."""
    if not jnp.issubdtype(pages.dtype, jnp.floating) or pages.dtype.itemsize >= 4:
        return move(pages, at, *new)

    def of_bits(pages: jax.Array, at: jax.Array, *new: jax.Array) -> jax.Array:
        bits = jnp.dtype(f"uint{8 * pages.dtype.itemsize}")
        moved = move(*(x if x is at else jax.lax.bitcast_convert_type(x, bits) for x in (pages, at, *new)))
        return jax.lax.bitcast_convert_type(moved, pages.dtype)

    return jax.lax.platform_dependent(pages, at, *new, cpu=of_bits, default=move)


def _layout(mesh: Mesh) -> Format | NamedSharding:
    """Row-major on TPUs: of heads narrower than 128 the compiler would want another order, and copy the pool."""
    sharding = named_sharding(mesh, "kv_pages")
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    return Format(Layout((0, 1, 2, 3)), sharding) if on_tpu else sharding


def pages_layout(pages: tuple[KVPages, ...]) -> tuple[KVPages, ...]:
    """What pages of `KVPages.abstract` are laid out as, for the results of compiled steps."""
    return jax.tree.map(lambda x: x.sharding if x.format is None or x.format.layout is None else x.format, pages)


def cache_dtype(config: LlamaConfig, kv_dtype: str) -> jnp.dtype:
    """The type that a cache of this name stores. Raises ConfigError for an unknown name."""
    if kv_dtype not in KV_DTYPES:
        raise ConfigError(f"kv_cache_dtype={kv_dtype!r} is not one of {', '.join(KV_DTYPES)}.")
    return config.jnp_dtype if kv_dtype == "auto" else jnp.dtype(kv_dtype)


def page_bytes(config: LlamaConfig, mesh: Mesh, kv_dtype: str, page_size: int = PAGE_SIZE) -> int:
    """Bytes of one page in all layers on one device."""
    of_layer = KVPages.abstract(config, mesh, 1, kv_dtype, page_size)[0]
    return config.n_layers * sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(of_layer)
    )


@functools.cache
def _zeros(config: LlamaConfig, mesh: Mesh, kv_dtype: str, n_pages: int, page_size: int) -> Callable[[], Any]:
    """Jitted, so that no device ever holds more than its shards; compiled once for each size."""
    abstract = KVPages.abstract(config, mesh, n_pages, kv_dtype, page_size)
    return jax.jit(
        lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), abstract), out_shardings=pages_layout(abstract)
    )
