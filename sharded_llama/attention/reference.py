"""Attention in plain JAX. `grouped_query_attn` is the specification that every faster form is tested against."""

import jax
import jax.numpy as jnp

from ..layers import accumulator, dot

BLOCK = 512  # cached positions that the blockwise form scores at a time


def grouped_query_attn(q_BLHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, q_pos_BL: jax.Array) -> jax.Array:
    """Causal attention in which H/G query heads share each kv head (Ainslie et al., 2023).

    Key j is at position j; a query at position p sees keys 0..p. Scores and softmax are float32
    (float64 for a float64 model). Returns (B, L, H, K) in q's dtype.
    """
    weights_BGRLS = attention_weights(q_BLHK, k_BSGK, q_pos_BL).astype(v_BSGK.dtype)
    return dot("bgrls,bsgk->blgrk", weights_BGRLS, v_BSGK).reshape(q_BLHK.shape)


def attention_weights(q_BLHK: jax.Array, k_BSGK: jax.Array, q_pos_BL: jax.Array) -> jax.Array:
    """Softmax (B, G, R, L, S) of the causal scores, float32 (float64 for a float64 model); rows over S sum to 1."""
    q_BGRLK = by_kv_head(q_BLHK, k_BSGK.shape[2])
    return jax.nn.softmax(_masked_scores(q_BGRLK, k_BSGK, q_pos_BL, first_key=0), axis=-1)


def by_kv_head(q_BLHK: jax.Array, n_kv_heads: int) -> jax.Array:
    """Queries as the products of attention take them: (B, G, R, L, K), R to each kv head."""
    return jnp.moveaxis(q_BLHK.reshape(*q_BLHK.shape[:2], n_kv_heads, -1, q_BLHK.shape[-1]), 1, 3)


def blockwise_attn(q_BLHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, q_pos_BL: jax.Array) -> jax.Array:
    """`grouped_query_attn` with memory that does not grow with S: keys are scored BLOCK at a time.

    Online softmax (Milakov and Gimelshein, 2018): a running maximum, denominator and weighted sum per query.
    """
    length, n_kv_heads = k_BSGK.shape[1:3]
    q_BGRLK = by_kv_head(q_BLHK, n_kv_heads)

    def attend(first_key: jax.Array | int, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        k, v = (jax.lax.dynamic_slice_in_dim(x, first_key, size, axis=1) for x in (k_BSGK, v_BSGK))
        # Without the barrier the TPU compiler wants the whole of k in the layout that suits the products.
        k, v = head_first(k, v)
        return softmax_parts(q_BGRLK, k, v, q_pos_BL, first_key)

    # The first block holds key 0, which every query sees: its peak is finite, and so is every later one.
    n_blocks, rest = divmod(length, BLOCK)
    if n_blocks == 0:
        total = attend(0, rest)
    else:
        total = jax.lax.fori_loop(1, n_blocks, lambda i, t: merge(t, attend(i * BLOCK, BLOCK)), attend(0, BLOCK))
        if rest:
            total = merge(total, attend(n_blocks * BLOCK, rest))
    return finish(total, q_BLHK)


def head_first(k_BSGK: jax.Array, v_BSGK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values as they are, made in memory as (B, G, S, K): what many queries read best."""
    k_BGSK, v_BGSK = jax.lax.optimization_barrier((jnp.swapaxes(k_BSGK, 1, 2), jnp.swapaxes(v_BSGK, 1, 2)))
    return jnp.swapaxes(k_BGSK, 1, 2), jnp.swapaxes(v_BGSK, 1, 2)


def softmax_parts(
    q_BGRLK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, q_pos_BL: jax.Array, first_key: jax.Array | int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a block of keys at positions first_key.. adds to an online softmax: peak and denominator (B, G, R, L), and
    the weighted sum of values (B, G, R, L, K)."""
    scores = _masked_scores(q_BGRLK, k_BSGK, q_pos_BL, first_key)
    peak = jnp.max(scores, axis=-1)
    # A block with no visible key has peak -inf; the shift must stay finite.
    probs = jnp.exp(scores - jnp.maximum(peak, jnp.finfo(peak.dtype).min)[..., None])
    weighted = dot("bgrls,bsgk->bgrlk", probs.astype(v_BSGK.dtype), v_BSGK, out_dtype=probs.dtype)
    return peak, jnp.sum(probs, axis=-1), weighted


def merge(a: tuple, b: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The parts of two blocks as those of one. The first peak must be finite."""
    peak = jnp.maximum(a[0], b[0])
    scale_a, scale_b = jnp.exp(a[0] - peak), jnp.exp(b[0] - peak)
    return peak, a[1] * scale_a + b[1] * scale_b, a[2] * scale_a[..., None] + b[2] * scale_b[..., None]


def finish(total: tuple, q_BLHK: jax.Array) -> jax.Array:
    """What all keys together give the queries: (B, L, H, K) in q's dtype; of no keys 0."""
    _, denominator, weighted = total
    denominator = jnp.where(denominator == 0, 1, denominator)  # else at least 1, that of the largest score
    out_BGRLK = (weighted / denominator[..., None]).astype(q_BLHK.dtype)
    return jnp.moveaxis(out_BGRLK, 3, 1).reshape(q_BLHK.shape)


def _masked_scores(q_BGRLK: jax.Array, k_BSGK: jax.Array, q_pos_BL: jax.Array, first_key: jax.Array | int) -> jax.Array:
    """Scaled scores (B, G, R, L, S) of keys at positions first_key.., -inf where the query must not look."""
    acc = accumulator(q_BGRLK.dtype)
    if q_BGRLK.shape[3] == 1:  # the same numbers; in this order XLA's CPU compiler reads the keys as they lie
        scores = dot("blgrk,bsgk->bgrls", jnp.moveaxis(q_BGRLK, 3, 1), k_BSGK, out_dtype=acc)
    else:
        scores = dot("bgrlk,bsgk->bgrls", q_BGRLK, k_BSGK, out_dtype=acc)
    scores *= q_BGRLK.shape[-1] ** -0.5
    k_pos_S = first_key + jnp.arange(k_BSGK.shape[1])
    visible_BLS = k_pos_S <= q_pos_BL[..., None]
    return jnp.where(visible_BLS[:, None, None], scores, -jnp.inf)
