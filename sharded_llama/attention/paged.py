"""Attention over the paged cache in plain JAX: the specification of every kernel, and the form that runs everywhere.

Row b has L queries at positions start_B[b].. of one sequence, whose pages its block table names. The rows of a step are
of two kinds with one function: decoding has L = 1, a chunk of a prompt is as many rows as it takes.
"""

import jax
import jax.numpy as jnp

from ..kv_cache import KVPages
from ..layers import accumulator
from .reference import by_kv_head, finish, grouped_query_attn, head_first, merge, softmax_parts

BLOCK = 128  # cached positions that are scored at a time
# Rows that CPUs score as one where they follow one another in a sequence, and the positions of a block beside many. XLA
# leaves a product to one core unless it has some 64 million multiplications: what is smaller is half as fast or less.
FEW_ROWS, MANY_ROWS, MANY_BLOCK = 4, 16, 256


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
    """`paged_attn_reference` with a block of positions in memory at a time, as far as the longest row needs.

    Blocks beyond a row's own length leave its sums as they are, bit for bit: what a row gives does not depend on how
    long others are that are scored with it. On CPUs rows of several queries are scored as one where they are parts of
    one sequence, and others one after the other, each as far as it needs itself: all together they would score twice
    as much of a prompt. For rows that start at -L nothing is scored.
    """
    args = (q_BLHK, pages, tables_BW, start_B)
    if q_BLHK.shape[0] == 1 or q_BLHK.shape[1] == 1:
        return _together(*args)
    return jax.lax.platform_dependent(*args, cpu=_in_runs, default=_together)


def _together(q_BLHK: jax.Array, pages: KVPages, tables_BW: jax.Array, start_B: jax.Array) -> jax.Array:
    """All rows, as far as the longest needs."""
    return _score(q_BLHK, pages, tables_BW, start_B, start_B + q_BLHK.shape[1], BLOCK)


def _in_runs(q_BLHK: jax.Array, pages: KVPages, tables_BW: jax.Array, start_B: jax.Array) -> jax.Array:
    """Rows that follow one another in a sequence as one row: MANY_ROWS at a time, and of the rest FEW_ROWS.

    A run with fewer rows than that has any others beside it, whose results are dropped.
    """
    rows, length = q_BLHK.shape[:2]
    row_B, used_B = jnp.arange(rows), start_B >= 0
    follows_B = (start_B[1:] == start_B[:-1] + length) & (tables_BW[1:] == tables_BW[:-1]).all(axis=1)
    follows_B = jnp.append(False, follows_B & used_B[1:] & used_B[:-1])
    # Of each row's chain, the rows that follow one another: where it starts and ends, and the row's place in it.
    first_B = jax.lax.cummax(jnp.where(follows_B, 0, row_B))
    end_B = jax.lax.cummin(jnp.where(jnp.append(follows_B[1:], False), rows, row_B + 1), reverse=True)
    place_B, size_B = row_B - first_B, end_B - first_B
    in_many_B = size_B // MANY_ROWS * MANY_ROWS + jnp.where(size_B % MANY_ROWS > 2 * FEW_ROWS, MANY_ROWS, 0)
    begins_many_B = used_B & (place_B < in_many_B) & (place_B % MANY_ROWS == 0)
    begins_few_B = used_B & (place_B >= in_many_B) & (place_B % FEW_ROWS == 0)

    def score(out_BLHK: jax.Array, begins_B: jax.Array, most: int, block: int) -> jax.Array:
        """out with the results of all runs of up to `most` rows, which begin where begins_B says."""
        most = min(most, rows)
        begins_N = jnp.nonzero(begins_B, size=rows, fill_value=0)[0]

        def run(i: jax.Array, out_BLHK: jax.Array) -> jax.Array:
            begin = begins_N[i]
            end = jnp.minimum(begin + most, end_B[begin])
            at = jnp.minimum(begin, rows - most)  # near the end the other rows stand before those of the run
            q_RLHK, old_RLHK = (jax.lax.dynamic_slice_in_dim(x, at, most) for x in (q_BLHK, out_BLHK))
            start = start_B[begin] - (begin - at) * length
            live = start_B[begin] + (end - begin) * length
            as_one = q_RLHK.reshape(1, -1, *q_RLHK.shape[2:])
            new = _score(as_one, pages, tables_BW[begin][None], start[None], live[None], block)
            row_R = at + jnp.arange(most)
            mine_R = (row_R >= begin) & (row_R < end)
            new_RLHK = jnp.where(mine_R[:, None, None, None], new.reshape(q_RLHK.shape), old_RLHK)
            return jax.lax.dynamic_update_slice_in_dim(out_BLHK, new_RLHK, at, axis=0)

        return jax.lax.fori_loop(0, begins_B.sum(), run, out_BLHK)

    out_BLHK = score(q_BLHK, begins_few_B, FEW_ROWS, BLOCK)
    return score(out_BLHK, begins_many_B, MANY_ROWS, MANY_BLOCK) if rows > 2 * FEW_ROWS else out_BLHK


def _score(
    q_BLHK: jax.Array, pages: KVPages, tables_BW: jax.Array, start_B: jax.Array, live_B: jax.Array, block: int
) -> jax.Array:
    """Attention of rows to `block` positions at a time, as far as the longest needs: of each the first live_B count."""
    page_size, n_kv_heads = pages.kv_NPGK.shape[1], pages.kv_NPGK.shape[2] // 2
    per_block = min(max(1, block // page_size), tables_BW.shape[1])
    block = per_block * page_size
    n_blocks = -(-tables_BW.shape[1] // per_block)
    tables_BW = jnp.pad(tables_BW, [(0, 0), (0, n_blocks * per_block - tables_BW.shape[1])])
    positions_BL = start_B[:, None] + jnp.arange(q_BLHK.shape[1])
    q_BGRLK = by_kv_head(q_BLHK, n_kv_heads)
    if many := q_BLHK.shape[1] > 1:
        q_BGRLK = jax.lax.optimization_barrier(q_BGRLK)

    def attend(i: jax.Array | int, total: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
        pages_BW = jax.lax.dynamic_slice_in_dim(tables_BW, i * per_block, per_block, axis=1)
        k, v = (_joined(x) for x in pages.read(pages_BW, q_BLHK.dtype))
        live_BS = i * block + jnp.arange(block) < live_B[:, None]
        v = jnp.where(live_BS[..., None, None], v, 0)  # zero times NaN would be NaN
        # Without a barrier a compiler may want all pages in the layout that suits the products, and copies them.
        k, v = head_first(k, v) if many else jax.lax.optimization_barrier((k, v))
        return merge(total, softmax_parts(q_BGRLK, k, v, positions_BL, i * block))

    needed = jnp.minimum(-(-jnp.max(live_B) // block), n_blocks)
    # What was seen before the first block: nothing, with a peak that is finite, so that no difference of peaks is NaN.
    # Taken from the queries, because in a shard_map it has to differ from shard to shard as they do.
    zeros_BGRLK = jnp.where(False, q_BGRLK, 0).astype(accumulator(q_BLHK.dtype))
    zeros_BGRL = zeros_BGRLK[..., 0]
    nothing = (zeros_BGRL + jnp.finfo(zeros_BGRL.dtype).min, zeros_BGRL, zeros_BGRLK)
    return finish(jax.lax.fori_loop(0, needed, attend, nothing), q_BLHK)


def _joined(x_BWPGK: jax.Array) -> jax.Array:
    """Pages side by side: (B, W, P, G, K) to (B, S, G, K)."""
    return x_BWPGK.reshape(x_BWPGK.shape[0], -1, *x_BWPGK.shape[3:])
