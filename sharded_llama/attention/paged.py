"""Attention over the paged cache in plain JAX: the specification of every kernel, and the form that runs everywhere.

Row b has L queries at positions start_B[b].. of one sequence, whose pages its block table names. The rows of a step are
of two kinds with one function: decoding has L = 1, a chunk of a prompt is as many rows as it takes.
"""

import jax
import jax.numpy as jnp

from ..kv_cache import KVPages
from .reference import finish, grouped_query_attn, merge, softmax_parts

BLOCK = 128  # cached positions that are scored at a time
RUN = 4  # rows that are scored as one on CPUs, if they can be


def paged_attn_reference(q_BLHK: jax.Array, pages: KVPages, tables_BW: jax.Array, start_B: jax.Array) -> jax.Array:
    """Causal attention of each row to its pages, up to each query's own position. Returns (B, L, H, K) in q's dtype.

    Args:
      q_BLHK: query l of row b is at position start_B[b] + l. The keys and values of these positions are in the pages.
      pages: one device's part; H is a multiple of its kv heads.
      tables_BW: int32, the row's pages. Numbers beyond the pool may stand after the last page that is needed.
      start_B: int32. Rows that are not used have any start within the table; what comes out of them is not looked at.

    What is not visible is not touched: pages may hold anything there, NaN included.
    """
    k_BSGK, v_BSGK = (_joined(x) for x in pages.read(tables_BW, q_BLHK.dtype))
    positions_BL = start_B[:, None] + jnp.arange(q_BLHK.shape[1])
    seen_BS = jnp.arange(k_BSGK.shape[1]) <= positions_BL[:, -1:]
    v_BSGK = jnp.where(seen_BS[..., None, None], v_BSGK, 0)  # zero times NaN would be NaN
    return grouped_query_attn(q_BLHK, k_BSGK, v_BSGK, positions_BL)


def paged_attn_blockwise(q_BLHK: jax.Array, pages: KVPages, tables_BW: jax.Array, start_B: jax.Array) -> jax.Array:
    """`paged_attn_reference` with BLOCK positions in memory at a time, as far as the longest row needs.

    Blocks beyond a row's own length leave its sums as they are, bit for bit: what a row gives does not depend on how
    long others are that are scored with it. On CPUs rows of several queries are taken one after the other, or a few at
    a time where they are parts of one sequence, each as far as it needs itself: all together they would score twice
    as much of a prompt.
    """
    if q_BLHK.shape[0] == 1 or q_BLHK.shape[1] == 1:
        return _together(q_BLHK, pages, tables_BW, start_B)
    args = (q_BLHK, pages, tables_BW, start_B)
    return jax.lax.platform_dependent(*args, cpu=_in_runs, default=_together)


def _in_runs(q_BLHK: jax.Array, pages: KVPages, tables_BW: jax.Array, start_B: jax.Array) -> jax.Array:
    """RUN rows at a time as one, whose products are faster, where they follow one another in a sequence; else each."""
    rows, length = q_BLHK.shape[:2]

    def one_row(row: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q_LHK, table_W, start = row
        return _together(q_LHK[None], pages, table_W[None], start[None])[0]

    def run(of_run: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q_RLHK, tables_RW, start_R = of_run
        follow = (start_R == start_R[0] + length * jnp.arange(RUN)).all() & (tables_RW == tables_RW[0]).all()

        def as_one() -> jax.Array:
            q_BLHK = q_RLHK.reshape(1, -1, *q_RLHK.shape[2:])
            return _together(q_BLHK, pages, tables_RW[:1], start_R[:1]).reshape(q_RLHK.shape)

        return jax.lax.cond(follow, as_one, lambda: jax.lax.map(one_row, of_run))

    in_runs = rows // RUN * RUN
    results = []
    if in_runs:
        runs = [x[:in_runs].reshape(-1, RUN, *x.shape[1:]) for x in (q_BLHK, tables_BW, start_B)]
        results.append(jax.lax.map(run, tuple(runs)).reshape(in_runs, *q_BLHK.shape[1:]))
    if in_runs < rows:
        results.append(jax.lax.map(one_row, (q_BLHK[in_runs:], tables_BW[in_runs:], start_B[in_runs:])))
    return jnp.concatenate(results) if len(results) > 1 else results[0]


def _together(q_BLHK: jax.Array, pages: KVPages, tables_BW: jax.Array, start_B: jax.Array) -> jax.Array:
    """All rows, as far as the longest needs."""
    length, page_size = q_BLHK.shape[1], pages.kv_NPGK.shape[1]
    n_kv_heads = pages.kv_NPGK.shape[2] // 2
    q_BLGRK = q_BLHK.reshape(*q_BLHK.shape[:2], n_kv_heads, -1, q_BLHK.shape[-1])
    positions_BL = start_B[:, None] + jnp.arange(length)
    per_block = min(max(1, BLOCK // page_size), tables_BW.shape[1])
    n_blocks = -(-tables_BW.shape[1] // per_block)
    tables_BW = jnp.pad(tables_BW, [(0, 0), (0, n_blocks * per_block - tables_BW.shape[1])])
    block = per_block * page_size

    def attend(i: jax.Array | int) -> tuple[jax.Array, jax.Array, jax.Array]:
        pages_BW = jax.lax.dynamic_slice_in_dim(tables_BW, i * per_block, per_block, axis=1)
        k, v = (_joined(x) for x in pages.read(pages_BW, q_BLHK.dtype))
        seen_BS = i * block + jnp.arange(block) <= positions_BL[:, -1:]
        v = jnp.where(seen_BS[..., None, None], v, 0)
        # Without the barrier a compiler may want all pages in the layout that suits the products, and copies them.
        k, v = jax.lax.optimization_barrier((k, v))
        return softmax_parts(q_BLGRK, k, v, positions_BL, i * block)

    # The first block holds position 0, which every query sees: its peak is finite, and so is every later one.
    total = attend(0)
    if n_blocks > 1:
        needed = jnp.minimum((jnp.max(start_B) + length - 1) // block + 1, n_blocks)
        total = jax.lax.fori_loop(1, needed, lambda i, t: merge(t, attend(i)), total)
    return finish(total, q_BLHK)


def _joined(x_BWPGK: jax.Array) -> jax.Array:
    """Pages side by side: (B, W, P, G, K) to (B, S, G, K)."""
    return x_BWPGK.reshape(x_BWPGK.shape[0], -1, *x_BWPGK.shape[3:])
