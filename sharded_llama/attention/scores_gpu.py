"""Scores of queries with cached keys on NVIDIA GPUs, for `metrics.py`: a Pallas kernel in the Triton dialect."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..kv_cache import KVPages
from .paged_gpu import MIN_TILE

BLOCK = 64  # positions of one step
POSITIONS = 256  # of a program


def paged_scores(
    q_RHK: jax.Array,
    pages: KVPages,
    tables_RW: jax.Array,
    length_R: jax.Array,
    first: jax.Array,
    n_positions: int,
    nothing: float,
    *,
    interpret: bool = False,
) -> jax.Array:
    """q . k / sqrt(K) at the cached positions first <= j < first + n_positions: (R, H, n_positions) float32.

    Reads each live key in its page, once. `nothing` where j is not below the row's length.

    Args:
      q_RHK: bfloat16, float16 or float32.
      pages: one device's part, of any type.
      tables_RW: int32; numbers beyond the pool may stand where no position is live.
      first: int32 (), a multiple of `BLOCK`, like n_positions.
    """
    n_rows, heads, width = q_RHK.shape
    n_pages, page_size = pages.kv_NPGK.shape[:2]
    kv_heads = pages.kv_NPGK.shape[2] // 2
    of_program = min(POSITIONS, n_positions)
    while n_positions % of_program:
        of_program //= 2
    kernel = functools.partial(
        _score,
        n_pages=n_pages,
        page_size=page_size,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        width=width,
        table=tables_RW.shape[1],
        of_program=of_program,
        nothing=nothing,
    )
    return pl.pallas_call(
        kernel,
        grid=(kv_heads, n_positions // of_program, n_rows),
        out_shape=jax.ShapeDtypeStruct((n_rows * heads, n_positions), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="paged_scores",
    )(
        q_RHK.reshape(-1, width),
        pages.kv_NPGK.reshape(-1, width),
        None if pages.scale_NPG is None else pages.scale_NPG.reshape(-1),
        tables_RW.reshape(-1),
        length_R,
        first.reshape(1),
    ).reshape(n_rows, heads, n_positions)


def _score(
    q_ref: jax.Ref,  # (R * H, K)
    kv_ref: jax.Ref,  # (N * P * 2G, K)
    scale_ref: jax.Ref | None,  # (N * P * 2G,)
    table_ref: jax.Ref,  # (R * W,)
    length_ref: jax.Ref,  # (R,)
    first_ref: jax.Ref,  # (1,)
    out_ref: jax.Ref,  # (R * H, positions)
    *,
    n_pages: int,
    page_size: int,
    kv_heads: int,
    group: int,
    width: int,
    table: int,
    of_program: int,
    nothing: float,
) -> None:
    """One program: kv head x some positions x row."""
    head, part, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    block = min(BLOCK, of_program)
    length = length_ref[row]
    query_M = jnp.arange(max(MIN_TILE, 1 << (group - 1).bit_length()), dtype=jnp.int32)
    column_K = jnp.arange(1 << (width - 1).bit_length(), dtype=jnp.int32)
    is_column_K = column_K < width
    at_M = (row * kv_heads + head) * group + query_M
    q_MK = plgpu.load(
        q_ref.at[at_M[:, None], column_K[None]], mask=(query_M < group)[:, None] & is_column_K[None], other=0
    )
    precision = lax.Precision.HIGHEST if q_MK.dtype == jnp.float32 else None

    def step(i: jax.Array, _: None) -> None:
        local_S = part * of_program + i * block + jnp.arange(block, dtype=jnp.int32)
        position_S = first_ref[0] + local_S
        live_S = position_S < length
        page_S = plgpu.load(table_ref.at[row * table + lax.div(position_S, page_size)], mask=live_S, other=0)
        page_S = jnp.minimum(jnp.maximum(page_S, 0), n_pages - 1)
        key_S = (page_S * page_size + lax.rem(position_S, page_size)) * (2 * kv_heads) + 2 * head
        k_SK = plgpu.load(
            kv_ref.at[key_S[:, None], column_K[None]],
            mask=live_S[:, None] & is_column_K[None],
            other=jnp.zeros((), kv_ref.dtype),
        )
        scores_MS = plgpu.dot(q_MK, k_SK.astype(q_MK.dtype), trans_b=True, precision=precision) * width**-0.5
        if scale_ref is not None:
            scores_MS *= plgpu.load(scale_ref.at[key_S], mask=live_S, other=0)[None]
        scores_MS = jnp.where(live_S[None], scores_MS, nothing)
        is_query_MS = jnp.broadcast_to((query_M < group)[:, None], scores_MS.shape)
        plgpu.store(out_ref.at[at_M[:, None], local_S[None]], scores_MS, mask=is_query_MS)

    lax.fori_loop(0, of_program // block, step, None)
