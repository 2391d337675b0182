"""The sampler that ends every step: logits in, one token per row out, nothing but that leaves the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..sharding import DATA, MODEL, SPECS
from .params import MAX_LOGPROBS, RowParams


class Sampled(NamedTuple):
    """What was sampled for every row, readable by every process. Log-probabilities are of the raw logits."""

    tokens_R: jax.Array  # int32
    logprobs_R: jax.Array  # float32
    ranks_R: jax.Array  # int32, 1 for the most likely token
    top_tokens_RJ: jax.Array | None  # int32, the most likely tokens in order; None when every row is greedy
    top_logprobs_RJ: jax.Array | None  # float32


def log_normalizer(logits_RV: jax.Array, *, mesh: Mesh) -> jax.Array:
    """Logarithm (R,) of the sum of exponentials of rows of logits that are split over the mesh."""

    def local(logits_RV: jax.Array) -> jax.Array:
        peak_R = jax.lax.pmax(jnp.max(logits_RV, axis=-1), MODEL)
        return peak_R + jnp.log(jax.lax.psum(jnp.sum(jnp.exp(logits_RV - peak_R[:, None]), axis=-1), MODEL))

    return jax.shard_map(local, mesh=mesh, in_specs=SPECS["last_logits"], out_specs=SPECS["tokens"])(logits_RV)


def sample(
    logits_RV: jax.Array,
    normalizer_R: jax.Array,
    rows: RowParams | None,
    positions_R: jax.Array,
    *,
    vocab_size: int,
    mesh: Mesh,
) -> Sampled:
    """The next token of every row.

    Args:
      logits_RV: padded logits, split over the mesh, -inf in the padding.
      normalizer_R: from `log_normalizer`.
      rows: sampling parameters, or None when every row is greedy and nobody asks for other tokens' probabilities: then
        only one candidate per shard is exchanged.
      positions_R: position that the new token takes in its sequence. The noise is a function of seed, position
        and token id, so a row's draw does not depend on the batch, its slot or the mesh.
    """

    def local(logits: jax.Array, normalizer: jax.Array, rows: RowParams | None, positions: jax.Array) -> Sampled:
        top_tokens, top_logprobs = None, None
        if rows is None:
            tokens = _sharded_argmax(logits)
        else:
            whole = jax.lax.all_gather(logits, MODEL, axis=1, tiled=True)[:, :vocab_size]
            tokens = sample_rows(whole, rows, positions)
            top_logits, top_tokens = jax.lax.top_k(whole, min(MAX_LOGPROBS, vocab_size))
            top_logprobs = top_logits - normalizer[:, None]
        chosen = _logit_of(logits, tokens)
        ranks = 1 + jax.lax.psum(jnp.sum(logits > chosen[:, None], axis=-1, dtype=jnp.int32), MODEL)
        sampled = Sampled(tokens, chosen - normalizer, ranks, top_tokens, top_logprobs)
        return jax.tree.map(lambda x: jax.lax.all_gather(x, DATA, tiled=True), sampled)

    row_specs = None if rows is None else RowParams(*[SPECS["tokens"]] * len(RowParams._fields))
    top = None if rows is None else SPECS["replicated"]
    # The result is the same everywhere after the gathers, which the checker of varying axes cannot know.
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(SPECS["last_logits"], SPECS["tokens"], row_specs, SPECS["tokens"]),
        out_specs=Sampled(*[SPECS["replicated"]] * 3, top, top),
        check_vma=False,
    )(logits_RV, normalizer_R, rows, positions_R)


def _logit_of(logits_RV: jax.Array, tokens_R: jax.Array) -> jax.Array:
    """The logit (R,) of one token per row, from the shard that has it."""
    n_local = logits_RV.shape[-1]
    local_R = tokens_R - jax.lax.axis_index(MODEL) * n_local
    mine_R = (local_R >= 0) & (local_R < n_local)
    logit_R = jnp.take_along_axis(logits_RV, jnp.clip(local_R, 0, n_local - 1)[:, None], axis=-1)[:, 0]
    return jax.lax.psum(jnp.where(mine_R, logit_R, 0), MODEL)


def _sharded_argmax(logits_BV: jax.Array) -> jax.Array:
    """Global argmax over a split vocabulary; the lowest id wins ties, as on one device."""
    first_id = jax.lax.axis_index(MODEL) * logits_BV.shape[-1]
    ids_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32) + first_id
    peaks_MB = jax.lax.all_gather(jnp.max(logits_BV, axis=-1), MODEL)
    ids_MB = jax.lax.all_gather(ids_B, MODEL)
    winner_B = jnp.argmax(peaks_MB, axis=0)
    return jnp.take_along_axis(ids_MB, winner_B[None], axis=0)[0]


def sample_rows(logits_BV: jax.Array, rows: RowParams, positions_B: jax.Array) -> jax.Array:
    """Draws from whole rows of logits (true vocabulary). Temperature 0 is greedy. Returns (B,) int32."""
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    temperature_B = jnp.where(rows.temperature_B > 0, rows.temperature_B, 1.0)
    # Relative to the largest, so that no temperature, however small, overflows.
    logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature_B[:, None]

    # Every filter keeps a prefix of the tokens in order of likelihood; equal ones stand in order of their id.
    ids = jnp.broadcast_to(jnp.arange(logits_BV.shape[-1], dtype=jnp.int32), logits_BV.shape)
    negated, ids_BV = jax.lax.sort((-logits_BV, ids), dimension=-1, is_stable=True, num_keys=1)
    sorted_BV = -negated
    kept_B = _count_kept(jax.nn.softmax(sorted_BV, axis=-1), rows)
    candidates_BV = jnp.where(jnp.arange(ids.shape[-1]) < kept_B[:, None], sorted_BV, -jnp.inf)

    # Gumbel-max: the argmax of logits plus this noise is a draw from their softmax.
    noise_BV = jax.vmap(_gumbel, in_axes=(0, 0, None))(rows.seed_B2, positions_B, ids.shape[-1])
    choice_B = jnp.argmax(candidates_BV + jnp.take_along_axis(noise_BV, ids_BV, axis=-1), axis=-1)
    drawn_B = jnp.take_along_axis(ids_BV, choice_B[:, None], axis=-1)[:, 0]
    return jnp.where(rows.temperature_B > 0, drawn_B, greedy_B)


def _count_kept(probs_BV: jax.Array, rows: RowParams) -> jax.Array:
    """How many of the descending `probs_BV` pass min_p, top_k and top_p; at least one."""
    vocab_size = probs_BV.shape[-1]
    kept_B = jnp.sum(probs_BV >= rows.min_p_B[:, None] * probs_BV[:, :1], axis=-1)
    kept_B = jnp.minimum(kept_B, jnp.where(rows.top_k_B > 0, rows.top_k_B, vocab_size))
    probs_BV = jnp.where(jnp.arange(vocab_size) < kept_B[:, None], probs_BV, 0)
    mass_before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    total_B = jnp.sum(probs_BV, axis=-1, keepdims=True)
    in_nucleus_BV = mass_before_BV < rows.top_p_B[:, None] * total_B
    # Without top_p nothing is cut: rounding of the running sum must not drop the tail.
    kept_B = jnp.where(rows.top_p_B < 1, jnp.minimum(kept_B, jnp.sum(in_nucleus_BV, axis=-1)), kept_B)
    return jnp.maximum(kept_B, 1)


def _gumbel(seed_2: jax.Array, position: jax.Array, vocab_size: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.wrap_key_data(seed_2, impl="threefry2x32"), position)
    return jax.random.gumbel(key, (vocab_size,), jnp.float32)
