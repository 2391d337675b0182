"""Next-token cross-entropy of logits whose vocabulary is split over the mesh."""

import jax
import jax.numpy as jnp


def token_nll(logits_BLV: jax.Array, targets_BL: jax.Array) -> jax.Array:
    """-log p(target) of every token, (B, L), in nats and in the type of the logits.

    Only sums and maxima run over V: they cost each device a few bytes per token, where indexing a split
    vocabulary would gather all of it. The padding of the vocabulary, -inf, has probability and gradient zero.
    """
    is_target_BLV = jnp.arange(logits_BLV.shape[-1]) == targets_BL[..., None]
    target_logit_BL = jnp.sum(jnp.where(is_target_BLV, logits_BLV, 0), axis=-1)
    return jax.nn.logsumexp(logits_BLV, axis=-1) - target_logit_BL


def mean_over(valid_BL: jax.Array, nll_BL: jax.Array) -> jax.Array:
    """Mean of `nll_BL` over the tokens that `valid_BL` (bool) marks; 0 when it marks none."""
    return jnp.sum(jnp.where(valid_BL, nll_BL, 0)) / jnp.maximum(jnp.sum(valid_BL), 1)
