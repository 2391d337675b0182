"""Scores of queries with cached keys on NVIDIA GPUs, for `metrics.py`: a Pallas kernel in the Triton dialect."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..kv_cache import KVPages
from .paged_gpu import find_keys, power_of_two

BLOCK = 64  # positions of one step
POSITIONS = 256  # of a program


class _Sizes(NamedTuple):
    """Everything static that the kernel needs."""

    kv_heads: int  # G
    n_pages: int
    page_size: int
    table: int  # W
    group: int  # queries of a kv head
    width: int  # K
    of_program: int  # positions
    nothing: float


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
    sizes = _Sizes(
        kv_heads=kv_heads,
        n_pages=n_pages,
        page_size=page_size,
        table=tables_RW.shape[1],
        group=heads // kv_heads,
        width=width,
        of_program=of_program,
        nothing=nothing,
    )
    return pl.pallas_call(
        functools.partial(_score, sizes=sizes),
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
    sizes: _Sizes,
) -> None:
    """One program: kv head x some positions x row."""
    head, part, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    block = min(BLOCK, sizes.of_program)
    length = length_ref[row]
    query_M = jnp.arange(power_of_two(sizes.group), dtype=jnp.int32)
    column_K = jnp.arange(power_of_two(sizes.width), dtype=jnp.int32)
    is_column_K = column_K < sizes.width
    at_M = (row * sizes.kv_heads + head) * sizes.group + query_M
    q_MK = plgpu.load(
        q_ref.at[at_M[:, None], column_K[None]], mask=(query_M < sizes.group)[:, None] & is_column_K[None], other=0
    )
    precision = lax.Precision.HIGHEST if q_MK.dtype == jnp.float32 else None

    def step(i: jax.Array, _: None) -> None:
        local_S = part * sizes.of_program + i * block + jnp.arange(block, dtype=jnp.int32)
        position_S = first_ref[0] + local_S
        live_S = position_S < length
        key_S = find_keys(table_ref, row, head, position_S, live_S, sizes)
        k_SK = plgpu.load(
            kv_ref.at[key_S[:, None], column_K[None]],
            mask=live_S[:, None] & is_column_K[None],
            other=jnp.zeros((), kv_ref.dtype),
        )
        scores_MS = plgpu.dot(q_MK, k_SK.astype(q_MK.dtype), trans_b=True, precision=precision) * sizes.width**-0.5
        if scale_ref is not None:
            scores_MS *= plgpu.load(scale_ref.at[key_S], mask=live_S, other=0)[None]
        scores_MS = jnp.where(live_S[None], scores_MS, sizes.nothing)
        is_query_MS = jnp.broadcast_to((query_M < sizes.group)[:, None], scores_MS.shape)
        plgpu.store(out_ref.at[at_M[:, None], local_S[None]], scores_MS, mask=is_query_MS)

    lax.fori_loop(0, sizes.of_program // block, step, None)
