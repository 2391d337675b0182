"""How the heads of a layer spread their attention over the paged cache, as a few numbers for each row.

Everything is read a block of positions at a time, as far as the longest row needs. Two passes: the first gives the
normaliser and the entropy of each head, the second compares the heads position by position. The scores of the first
KEPT positions are kept between them, so that rows of up to as many are read once.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..kv_cache import KVPages
from ..layers import dot
from ..sharding import DATA, MODEL

BLOCK = 128  # cached positions that are scored at a time
KERNEL_BLOCK = 256  # the same, of a kernel that leaves out what is not live
KEPT = 2048
# Below every score, and finite: no difference of peaks is NaN.
NOTHING = -1e30
LOWEST = -200.0  # exponent whose exponential is 0 in float32; finite, so that 0 times it is 0


class _Sums(NamedTuple):
    """Sums over the positions of every head so far, float32 (R, H)."""

    peak: jax.Array  # largest score
    total: jax.Array  # of exp(score - peak)
    weighted: jax.Array  # of exp(score - peak) (score - peak)
    size: jax.Array  # of |score|


def attention_metrics(
    q_RHK: jax.Array,
    pages: KVPages,
    tables_RW: jax.Array,
    length_R: jax.Array,
    kernel: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """Attention entropy, varentropy, agreement and interaction of each row's query: (R, 4) float32.

    With s_hj = q_h . k_j / sqrt(K), A_h = softmax_j(s_h) and E_h = -sum_j A_hj log2 A_hj, over the heads h of the whole
    model and the cached positions j < length_R:

      mean_h E_h (bits), var_h E_h (bits^2), mean_hj |A_hj - mean_h A_hj|, mean_hj |s_hj|

    (xjdr-alt/entropix; there over positions that are not live too). One device's part, inside `shard_map`; the result
    is the same on all `model` shards. Rows of length 0 give zeros. Memory does not grow with the context.

    Args:
      q_RHK: one rotated query for each row; H is a multiple of the kv heads of `pages`.
      pages: of the layer, one device's part.
      tables_RW: int32, the row's pages. Numbers beyond the pool may stand after the last page that is needed.
      length_R: int32, positions that count, the newest included; at most those of the table.
      kernel: `scores_gpu.paged_scores` where it runs; default: plain JAX.
    """
    # float32 is enough for what is only compared with thresholds.
    q_RHK = q_RHK.astype(jnp.float32) if q_RHK.dtype == jnp.float64 else q_RHK
    page_size, n_kv_heads = pages.kv_NPGK.shape[1], pages.kv_NPGK.shape[2] // 2
    per_block = KERNEL_BLOCK // page_size if kernel else min(max(1, BLOCK // page_size), tables_RW.shape[1])
    n_blocks = -(-tables_RW.shape[1] // per_block)
    tables_RW = jnp.pad(tables_RW, [(0, 0), (0, n_blocks * per_block - tables_RW.shape[1])])
    block = per_block * page_size
    q_RGMK = q_RHK.reshape(q_RHK.shape[0], n_kv_heads, -1, q_RHK.shape[-1])

    def scores(i: jax.Array | int) -> jax.Array:
        """Of block i: (R, H, S) float32, NOTHING where a position is not live."""
        if kernel:
            return kernel(q_RHK, pages, tables_RW, length_R, jnp.int32(i * block), block, NOTHING)
        pages_RW = jax.lax.dynamic_slice_in_dim(tables_RW, i * per_block, per_block, axis=1)
        k_RSGK = pages.read(pages_RW, q_RHK.dtype)[0].reshape(q_RHK.shape[0], block, n_kv_heads, -1)
        # In the order that the product takes, so that reading the pages makes the only copy. Without the barrier a
        # compiler may want all pages in that order.
        k_RGSK = jax.lax.optimization_barrier(jnp.swapaxes(k_RSGK, 1, 2))
        s_RGMS = dot("rgmk,rgsk->rgms", q_RGMK, k_RGSK, out_dtype=jnp.float32) * q_RHK.shape[-1] ** -0.5
        live_RS = i * block + jnp.arange(block) < length_R[:, None]
        return jnp.where(live_RS[:, None], s_RGMS.reshape(*q_RHK.shape[:2], block), NOTHING)

    n_needed = jnp.clip(-(-jnp.max(length_R) // block), 1, n_blocks)
    n_kept = min(n_blocks, KEPT // block)  # blocks whose scores the second pass has from the first
    n_first = jnp.minimum(n_needed, n_kept)

    def keep(i: jax.Array, carry: tuple[_Sums, jax.Array]) -> tuple[_Sums, jax.Array]:
        sums, kept_JRHS = carry
        s_RHS = scores(i)
        return _merge(sums, _sums(s_RHS)), jax.lax.dynamic_update_index_in_dim(kept_JRHS, s_RHS, i, 0)

    nothing_RH = jnp.zeros(q_RHK.shape[:2], jnp.float32)
    sums = _Sums(nothing_RH + NOTHING, nothing_RH, nothing_RH, nothing_RH)
    sums = jax.tree.map(lambda x: jax.lax.pcast(x, (DATA, MODEL), to="varying"), sums)
    kept_JRHS = jnp.zeros((n_kept, *q_RHK.shape[:2], block), jnp.float32)
    kept_JRHS = jax.lax.pcast(kept_JRHS, (DATA, MODEL), to="varying")
    sums, kept_JRHS = jax.lax.fori_loop(0, n_first, keep, (sums, kept_JRHS))
    if n_blocks > n_kept:
        sums = jax.lax.fori_loop(n_kept, n_needed, lambda i, t: _merge(t, _sums(scores(i))), sums)
    n_heads = q_RHK.shape[1] * jax.lax.axis_size(MODEL)
    used_R = jnp.maximum(length_R, 1).astype(jnp.float32)
    # Rows of length 0 have total 0: anything finite will do for them.
    log_total_RH = jnp.log(jnp.maximum(sums.total, 1))
    entropy_RH = (log_total_RH - sums.weighted / jnp.maximum(sums.total, 1)) * math.log2(math.e)
    normalizer_RH1 = (sums.peak + log_total_RH)[..., None]

    def differences(s_RHS: jax.Array) -> jax.Array:
        """Sum (R,) over this device's heads and the positions of a block of |A_hj - mean_h A_hj|."""
        probs_RHS = jnp.where(s_RHS > NOTHING, jnp.exp(s_RHS - normalizer_RH1), 0)
        mean_RS = jax.lax.psum(jnp.sum(probs_RHS, axis=1), MODEL) / n_heads
        return jnp.sum(jnp.abs(probs_RHS - mean_RS[:, None]), axis=(1, 2))

    apart_R = jax.lax.pcast(jnp.zeros(q_RHK.shape[:1], jnp.float32), (DATA, MODEL), to="varying")
    apart_R = jax.lax.fori_loop(0, n_first, lambda i, t: t + differences(kept_JRHS[i]), apart_R)
    if n_blocks > n_kept:
        apart_R = jax.lax.fori_loop(n_kept, n_needed, lambda i, t: t + differences(scores(i)), apart_R)

    of_heads_3R = jnp.stack([jnp.sum(entropy_RH, axis=1), apart_R / used_R, jnp.sum(sums.size, axis=1) / used_R])
    mean_R, agreement_R, interaction_R = jax.lax.psum(of_heads_3R, MODEL) / n_heads
    variance_R = jax.lax.psum(jnp.sum(jnp.square(entropy_RH - mean_R[:, None]), axis=1), MODEL) / n_heads
    metrics_R4 = jnp.stack([mean_R, variance_R, agreement_R, interaction_R], axis=-1)
    return jnp.where(length_R[:, None] > 0, metrics_R4, 0)


def _sums(s_RHS: jax.Array) -> _Sums:
    """Of the live positions of one block of scores."""
    live = s_RHS > NOTHING
    peak = jnp.max(s_RHS, axis=-1)
    log = jnp.maximum(s_RHS - peak[..., None], LOWEST)
    weight = jnp.where(live, jnp.exp(log), 0)
    size = jnp.sum(jnp.where(live, jnp.abs(s_RHS), 0), axis=-1)
    return _Sums(peak, jnp.sum(weight, axis=-1), jnp.sum(weight * log, axis=-1), size)


def _merge(a: _Sums, b: _Sums) -> _Sums:
    """The sums of two blocks as those of one. A block without live positions changes no bit of the other."""
    peak = jnp.maximum(a.peak, b.peak)

    def moved(x: _Sums) -> tuple[jax.Array, jax.Array]:
        """Total and weighted sum relative to the common peak."""
        shift = jnp.maximum(x.peak - peak, LOWEST)
        scale = jnp.exp(shift)
        return x.total * scale, (x.weighted + x.total * shift) * scale

    (total_a, weighted_a), (total_b, weighted_b) = moved(a), moved(b)
    return _Sums(peak, total_a + total_b, weighted_a + weighted_b, a.size + b.size)
