"""All between the projections and attention as one kernel, for NVIDIA GPUs: Pallas in the Triton dialect.

It rotates queries and keys and writes keys and values to their places in the pages, each read and written once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..kv_cache import KVPages
from ..layers import apply_rotary_emb, split_qkv


def rotate_write_reference(
    qkv: jax.Array, cos_TK: jax.Array, sin_TK: jax.Array, pages: KVPages, at_T: jax.Array
) -> tuple[jax.Array, KVPages]:
    """Rotated queries (T, H, K), and the pages with the tokens' rotated keys and their values.

    Args:
      qkv: (T, G, R' + 2, K) of `layers.project_qkv`.
      cos_TK, sin_TK: float32 (T, K/2), see `layers.apply_rotary_emb`.
      pages: one device's part.
      at_T: int32, where each token goes in the pages, see `KVPages.write`; beyond: nowhere.
    """
    q_THK, k_TGK, v_TGK = split_qkv(qkv)
    q_THK, k_TGK = apply_rotary_emb(q_THK, cos_TK, sin_TK), apply_rotary_emb(k_TGK, cos_TK, sin_TK)
    return q_THK, pages.write(k_TGK, v_TGK, at_T)


def rotate_write(
    qkv: jax.Array,
    cos_TK: jax.Array,
    sin_TK: jax.Array,
    pages: KVPages,
    at_T: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, KVPages]:
    """`rotate_write_reference` for pages of qkv's type, a program for each kv head of each token."""
    n_tokens, kv_heads, rows, width = qkv.shape
    kv_NPGK = pages.kv_NPGK
    kernel = functools.partial(_rotate_write, kv_heads=kv_heads, n_queries=rows - 2, half=width // 2)
    q_RK, kv_RK = pl.pallas_call(
        kernel,
        grid=(n_tokens, kv_heads),  # only the first axis may be longer than 65,535
        out_shape=(
            jax.ShapeDtypeStruct((n_tokens * kv_heads * (rows - 2), width), qkv.dtype),
            jax.ShapeDtypeStruct((kv_NPGK.size // width, width), kv_NPGK.dtype),
        ),
        input_output_aliases={0: 1},
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="rotate_write",
    )(kv_NPGK.reshape(-1, width), qkv.reshape(-1, width), cos_TK, sin_TK, at_T)
    return q_RK.reshape(n_tokens, -1, width), KVPages(kv_RK.reshape(kv_NPGK.shape))


def _rotate_write(
    _: jax.Ref,  # (N * P * 2G, K), the pages, which are also an output
    qkv_ref: jax.Ref,  # (T * G * (R' + 2), K)
    cos_ref: jax.Ref,  # (T, K/2)
    sin_ref: jax.Ref,
    at_ref: jax.Ref,  # (T,)
    q_ref: jax.Ref,  # (T * H, K)
    kv_ref: jax.Ref,  # (N * P * 2G, K)
    *,
    kv_heads: int,
    n_queries: int,
    half: int,
) -> None:
    """One program: the queries, key and value of a kv head x a token."""
    token, head = pl.program_id(0), pl.program_id(1)
    row_M = jnp.arange(1 << (n_queries + 1).bit_length(), dtype=jnp.int32)
    column_K = jnp.arange(1 << (half - 1).bit_length(), dtype=jnp.int32)
    shape = (row_M.shape[0], column_K.shape[0])
    is_column_MK = jnp.broadcast_to((column_K < half)[None], shape)
    is_row_MK = jnp.broadcast_to((row_M < n_queries + 2)[:, None], shape) & is_column_MK
    from_M = (token * kv_heads + head) * (n_queries + 2) + row_M

    a_MK, b_MK = (
        plgpu.load(qkv_ref.at[from_M[:, None], first + column_K[None]], mask=is_row_MK, other=0).astype(jnp.float32)
        for first in (0, half)
    )
    cos_K = plgpu.load(cos_ref.at[token, column_K], mask=column_K < half, other=0)[None]
    sin_K = plgpu.load(sin_ref.at[token, column_K], mask=column_K < half, other=0)[None]
    is_value_MK = jnp.broadcast_to((row_M == n_queries + 1)[:, None], shape)
    rotated_MK = (
        jnp.where(is_value_MK, a_MK, a_MK * cos_K - b_MK * sin_K),
        jnp.where(is_value_MK, b_MK, b_MK * cos_K + a_MK * sin_K),
    )
    is_query_MK = jnp.broadcast_to((row_M < n_queries)[:, None], shape) & is_column_MK
    to_M = (token * kv_heads + head) * n_queries + row_M
    place = at_ref[token]
    # Places beyond the pool would overflow; nothing is written there.
    kept = place < kv_ref.shape[0] // (2 * kv_heads)
    page_M = jnp.where(kept, place, 0) * (2 * kv_heads) + 2 * head + row_M - n_queries
    is_kept_MK = is_row_MK & jnp.logical_not(is_query_MK) & jnp.broadcast_to(kept, shape)
    for first, x_MK in zip((0, half), rotated_MK, strict=True):
        x_MK = x_MK.astype(q_ref.dtype)
        plgpu.store(q_ref.at[to_M[:, None], first + column_K[None]], x_MK, mask=is_query_MK)
        finite_MK = jnp.where(jnp.abs(x_MK.astype(jnp.float32)) < jnp.inf, x_MK, jnp.zeros((), x_MK.dtype))
        plgpu.store(kv_ref.at[page_M[:, None], first + column_K[None]], finite_MK, mask=is_kept_MK)
