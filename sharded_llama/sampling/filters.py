"""min_p, top_k and top_p without sorting the vocabulary.

Tokens are in order of likelihood, those with equal logits in order of their id. Each filter keeps the first so many of
them, so all that is to be found is the last token that is kept. It is found

- among the K most likely tokens, where top_k <= K, or where these already have the mass that top_p asks for. The K most
  likely tokens lie in the K blocks of the vocabulary with the largest maxima, because each of these has one token
  before any token of the other blocks;
- else by a search over all tokens: for the value of the last token, four intervals at a time, then for its id among
  equal values.

A token's mass is a whole number, `MASS` for the most likely one, so that sums are exact in any order: the same tokens
are kept on every mesh. Less than half of 2**-24 of the most likely token's probability counts as nothing for top_p.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..sharding import DATA, MODEL

K = 128  # candidates
BLOCK = 32  # tokens
MASS = 2**24
BITS = 2  # of a key that one pass of the search finds
PASSES = 32 // BITS


class Cut(NamedTuple):
    """The last token that is kept, of each row."""

    value_R: jax.Array  # its processed logit
    id_R: jax.Array  # int32


class Filters(NamedTuple):
    """Of each row; see `SamplingParams`."""

    temperature_R: jax.Array  # above 0
    top_k_R: jax.Array
    top_p_R: jax.Array
    min_p_R: jax.Array


class Candidates(NamedTuple):
    """The most likely tokens in order, the same on all shards of the vocabulary."""

    logits_RK: jax.Array
    ids_RK: jax.Array  # int32


def top_tokens(logits_RV: jax.Array, k: int) -> Candidates:
    """The `k` largest of rows that are split over `model`, the lowest id first among equals; all if there are fewer."""
    n_rows, n_local = logits_RV.shape
    n_blocks = -(-n_local // BLOCK)
    logits_RV = jnp.where(logits_RV == 0, 0.0, logits_RV)  # top_k has -0 behind 0
    if n_blocks > 2 * k:
        blocks_RNB = _blocks(logits_RV, -jnp.inf)
        chosen_RK = jnp.sort(jax.lax.top_k(blocks_RNB.max(-1), k)[1], axis=-1)  # in order of ids again
        inner_RX = jnp.take_along_axis(blocks_RNB, chosen_RK[:, :, None], axis=1).reshape(n_rows, k * BLOCK)
        values_RK, at_RK = jax.lax.top_k(inner_RX, k)
        ids_RK = jnp.take_along_axis(chosen_RK, at_RK // BLOCK, axis=1) * BLOCK + at_RK % BLOCK
    else:
        values_RK, ids_RK = jax.lax.top_k(logits_RV, min(k, n_local))
    ids_RK = ids_RK.astype(jnp.int32) + jax.lax.axis_index(MODEL) * n_local
    if jax.lax.axis_size(MODEL) == 1:
        return Candidates(values_RK, ids_RK)
    # Shards are in order of their ids, so equal values stay in order.
    values_RX = jax.lax.all_gather(values_RK, MODEL, axis=1, tiled=True)
    ids_RX = jax.lax.all_gather(ids_RK, MODEL, axis=1, tiled=True)
    values_RK, at_RK = jax.lax.top_k(values_RX, min(k, values_RX.shape[1]))
    return Candidates(values_RK, jnp.take_along_axis(ids_RX, at_RK, axis=1))


def last_kept(logits_RV: jax.Array, peak_R: jax.Array, candidates: Candidates, filters: Filters, vocab: int) -> Cut:
    """The last token of each row that passes all filters.

    Args:
      logits_RV: one device's part of the processed logits.
      peak_R: the largest of each row.
      candidates: from `top_tokens` with K.
      vocab: size of the true vocabulary.
    """
    k_R = jnp.where(filters.top_k_R > 0, jnp.minimum(filters.top_k_R, vocab), vocab)
    n_candidates = candidates.ids_RK.shape[1]
    mass_RK = _mass(candidates.logits_RK, peak_R, filters)
    total_RK = jnp.cumsum(mass_RK.astype(jnp.uint32), axis=1)  # at most K * MASS = 2**31
    all_R = _sums([_mass(logits_RV, peak_R, filters)])[0]
    in_k_R = jnp.minimum(k_R, n_candidates) - 1
    of_k_R = jnp.take_along_axis(total_RK, in_k_R[:, None], axis=1)[:, 0].astype(jnp.float32)
    target_R = filters.top_p_R * jnp.where(k_R < vocab, of_k_R, all_R)
    enough_RK = total_RK.astype(jnp.float32) >= target_R[:, None]
    last_R = jnp.where(filters.top_p_R < 1, jnp.minimum(jnp.argmax(enough_RK, axis=1), in_k_R), in_k_R)
    last_RK = last_R[:, None]
    found = Cut(
        jnp.take_along_axis(candidates.logits_RK, last_RK, axis=1)[:, 0],
        jnp.take_along_axis(candidates.ids_RK, last_RK, axis=1)[:, 0],
    )
    everything_R = (k_R == vocab) & (filters.top_p_R >= 1)
    is_found_R = (k_R <= n_candidates) | (k_R == vocab) & jnp.any(enough_RK, axis=1) | everything_R
    if n_candidates == vocab:
        return Cut(jnp.where(everything_R, -jnp.inf, found.value_R), jnp.where(everything_R, vocab, found.id_R))
    searched = _search(logits_RV, peak_R, filters, k_R, vocab, ~is_found_R)
    found = Cut(*(jnp.where(is_found_R, f, s) for f, s in zip(found, searched, strict=True)))
    return Cut(jnp.where(everything_R, -jnp.inf, found.value_R), jnp.where(everything_R, vocab, found.id_R))


def is_kept(logits_RV: jax.Array, ids_RV: jax.Array, peak_R: jax.Array, cut: Cut, filters: Filters) -> jax.Array:
    """Which tokens, given with their ids, pass all filters."""
    value_R1 = cut.value_R[:, None]
    before_RV = (logits_RV > value_R1) | (logits_RV == value_R1) & (ids_RV <= cut.id_R[:, None])
    return before_RV & (_weight(logits_RV, peak_R, filters) >= filters.min_p_R[:, None]) & (logits_RV > -jnp.inf)


def _weight(logits_RV: jax.Array, peak_R: jax.Array, filters: Filters) -> jax.Array:
    """Probability relative to the most likely token's."""
    return jnp.exp((logits_RV - peak_R[:, None]) / filters.temperature_R[:, None])


def _mass(logits_RV: jax.Array, peak_R: jax.Array, filters: Filters) -> jax.Array:
    """Whole numbers (R, V), int32, in proportion to the probability; 0 where min_p drops a token."""
    weight_RV = _weight(logits_RV, peak_R, filters)
    kept_RV = jnp.where(weight_RV >= filters.min_p_R[:, None], weight_RV, 0)
    return jnp.round(kept_RV * MASS).astype(jnp.int32)


def _blocks(x_RV: jax.Array, value: float) -> jax.Array:
    """The vocabulary in blocks: (R, N, BLOCK)."""
    padded_RV = jnp.pad(x_RV, ((0, 0), (0, -x_RV.shape[1] % BLOCK)), constant_values=value)
    return padded_RV.reshape(x_RV.shape[0], -1, BLOCK)


def _sums(parts: Sequence[jax.Array]) -> list[jax.Array]:
    """Exact sums (R,) over the whole vocabulary of whole numbers up to MASS (R, V), rounded once, to float32."""
    of_block = [_blocks(x_RV, 0).sum(-1, dtype=jnp.int32) for x_RV in parts]  # at most 2**29
    halves = [((x >> 12).sum(-1, dtype=jnp.int32), (x & 0xFFF).sum(-1, dtype=jnp.int32)) for x in of_block]
    return [high.astype(jnp.float32) * 4096 + low.astype(jnp.float32) for high, low in jax.lax.psum(halves, MODEL)]


def _key(logits_RV: jax.Array) -> jax.Array:
    """uint32 in the opposite order of float32 values: the smaller, the more likely. Both zeros have one key."""
    bits = jax.lax.bitcast_convert_type(jnp.where(logits_RV == 0, 0.0, logits_RV), jnp.uint32)
    return jnp.where(bits >> 31 == 1, bits, ~bits & jnp.uint32(0x7FFFFFFF))


def _value(key_R: jax.Array) -> jax.Array:
    """The float32 value of a key."""
    bits = jnp.where(key_R >> 31 == 1, key_R, ~key_R & jnp.uint32(0x7FFFFFFF))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


class _Search(NamedTuple):
    """Where a search stands. Sums of weights are of the tokens with smaller keys."""

    number: jax.Array  # of the pass
    low_R: jax.Array  # uint32, the key that is searched is not below this
    below_R: jax.Array  # float32, the weights below it
    mass_R: jax.Array  # target of the second stage
    kth_R: jax.Array  # uint32, key of the last of top_k tokens
    below_kth_R: jax.Array  # tokens
    last_R: jax.Array  # uint32, key of the last token that is kept
    below_last_R: jax.Array  # in tokens where top_p is off, else mass


def _search(
    logits_RV: jax.Array, peak_R: jax.Array, filters: Filters, k_R: jax.Array, vocab: int, wanted_R: jax.Array
) -> Cut:
    """`last_kept` by looking at all tokens, where any row of the mesh wants it.

    Three stages, each a search for the smallest key up to which weights reach a target: the key of the k-th token, that
    of the last one of the mass, and the id of the last one among tokens with that key. A loop rather than a
    conditional: an accelerator runs it without asking the host.
    """
    n_local = logits_RV.shape[1]
    ids_V = (jax.lax.axis_index(MODEL) * n_local + jnp.arange(n_local)).astype(jnp.uint32)
    id_passes = -(-(vocab - 1).bit_length() // BITS)
    axes = (DATA, MODEL)
    any_wanted = jax.lax.pmax(jnp.any(wanted_R).astype(jnp.int32), axes) > 0
    any_k = jax.lax.pmax(jnp.any(wanted_R & (k_R < vocab)).astype(jnp.int32), axes) > 0
    k_R = k_R.astype(jnp.float32)
    uses_mass_R = filters.top_p_R < 1

    def mass_of(key_R: jax.Array) -> jax.Array:
        return _mass(_value(key_R)[:, None], peak_R, filters)[:, 0].astype(jnp.float32)

    def one_pass(s: _Search) -> _Search:
        stage = jnp.minimum(s.number // PASSES, 2)
        step = s.number - stage * PASSES
        key_RV, mass_RV = _key(logits_RV), _mass(logits_RV, peak_R, filters)
        is_last_RV = (key_RV == s.last_R[:, None]).astype(jnp.int32)
        weight_RV = jnp.where(stage == 0, 1, jnp.where(stage == 1, mass_RV, is_last_RV))
        searched_RV = jnp.where(stage < 2, key_RV, ids_V)
        shift = (BITS * (jnp.where(stage < 2, PASSES, id_passes) - step - 1)).astype(jnp.uint32)
        low_R, below_R = jnp.where(step == 0, 0, s.low_R), jnp.where(step == 0, 0, s.below_R)
        limits = [low_R + (jnp.uint32(j) << shift) for j in range(1, 2**BITS)]
        parts = [jnp.where(searched_RV < limit_R[:, None], weight_RV, 0) for limit_R in limits]
        parts.append(jnp.where(key_RV < s.kth_R[:, None], mass_RV, 0))
        *sums, below_mass_R = _sums(parts)

        in_k_R = k_R - s.below_kth_R  # tokens that top_k keeps of those with the k-th one's key
        mass_R = filters.top_p_R * (below_mass_R + in_k_R * mass_of(s.kth_R))
        ties_R = jnp.ceil((s.mass_R - s.below_last_R) / jnp.maximum(mass_of(s.last_R), 1))
        ties_R = jnp.where(s.last_R == s.kth_R, jnp.minimum(ties_R, in_k_R), ties_R)
        ties_R = jnp.where(uses_mass_R, jnp.maximum(ties_R, 1), in_k_R)
        target_R = jnp.where(stage == 0, k_R, jnp.where(stage == 1, mass_R, ties_R))
        for limit_R, sum_R in zip(limits, sums, strict=True):
            low_R, below_R = (
                jnp.where(sum_R < target_R, limit_R, low_R),
                jnp.where(sum_R < target_R, sum_R, below_R),
            )

        ends_0, ends_1 = s.number == PASSES - 1, s.number == 2 * PASSES - 1
        return _Search(
            number=s.number + 1,
            low_R=low_R,
            below_R=below_R,
            mass_R=jnp.where(stage == 1, mass_R, s.mass_R),
            kth_R=jnp.where(ends_0, low_R, s.kth_R),
            below_kth_R=jnp.where(ends_0, below_R, s.below_kth_R),
            last_R=jnp.where(ends_1, jnp.where(uses_mass_R, low_R, s.kth_R), s.last_R),
            below_last_R=jnp.where(ends_1, below_R, s.below_last_R),
        )

    # Where no row has a top_k of its own its stage is left out: the largest key, which no token has, is beyond all.
    zeros_R, keys_R = jnp.zeros_like(peak_R, jnp.float32), jnp.zeros_like(peak_R, jnp.uint32)
    start = _Search(
        number=jnp.where(any_k, 0, PASSES),
        low_R=keys_R,
        below_R=zeros_R,
        mass_R=zeros_R,
        kth_R=~keys_R,
        below_kth_R=zeros_R,
        last_R=keys_R,
        below_last_R=zeros_R,
    )
    n_passes = 2 * PASSES + id_passes
    found = jax.lax.while_loop(lambda s: any_wanted & (s.number < n_passes), one_pass, start)
    return Cut(_value(found.last_R), found.low_R.astype(jnp.int32))
