"""The sampler that ends every step: logits in, one token per row out, nothing but that leaves the device."""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..sharding import DATA, MODEL, SPECS
from .filters import Filters, K, is_kept, last_kept, top_tokens
from .noise import gumbel
from .params import MAX_LOGPROBS, SamplingParams
from .penalties import process_logits
from .rows import RowParams
from .slots import SLOT_SPECS, SlotSampling


class Mode(enum.IntEnum):
    """How much a step's sampler does: what the most demanding of its rows asks for."""

    GREEDY = 0  # the most likely token of the raw logits
    SAMPLE = 1  # everything but what follows
    LOGPROBS = 2  # also the most likely tokens' log-probabilities


def mode_of(params: SamplingParams) -> Mode:
    """What a request asks for."""
    if params.logprobs or params.prompt_logprobs:
        return Mode.LOGPROBS
    changes = (params.presence_penalty, params.frequency_penalty, params.logit_bias, params.allowed_token_ids)
    changes += (params.bad_words, params.min_tokens, params.structured_outputs, params.repetition_penalty != 1)
    return Mode.SAMPLE if params.temperature > 0 or any(changes) else Mode.GREEDY


class Sampled(NamedTuple):
    """What was sampled for every row, readable by every process. Log-probabilities are of the raw logits."""

    tokens_R: jax.Array  # int32
    logprobs_R: jax.Array  # float32; NaN where the logits were not numbers
    ranks_R: jax.Array  # int32, 1 for the most likely token
    top_tokens_RJ: jax.Array | None  # int32, the most likely tokens in order; None unless asked for
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
    rows: RowParams,
    slots: SlotSampling | None,
    slot_R: jax.Array,
    positions_R: jax.Array,
    forced_R: jax.Array,
    *,
    mode: Mode,
    vocab_size: int,
    mesh: Mesh,
) -> Sampled:
    """The next token of every row.

    Args:
      logits_RV: padded logits, split over the mesh, -inf in the padding.
      normalizer_R: from `log_normalizer`.
      rows: sampling parameters.
      slots, slot_R: what is kept of the slots, and each row's.
      positions_R: position that the new token takes in its sequence. The noise is a function of seed, position
        and token id, so a row's draw does not depend on the batch, its slot or the mesh.
      forced_R: a token that is taken in place of a choice, for its log-probability; -1: none.
      mode: static; in GREEDY mode only one candidate per shard is exchanged and `slots` may be None.
    """

    def local(
        logits: jax.Array,
        normalizer: jax.Array,
        rows: RowParams,
        slots: SlotSampling | None,
        slot: jax.Array,
        positions: jax.Array,
        forced: jax.Array,
    ) -> Sampled:
        top_ids, top_logprobs = None, None
        if mode == Mode.GREEDY:
            tokens = sharded_argmax(logits)
        else:
            processed = process_logits(logits.astype(jnp.float32), slots, slot, rows)
            tokens = draw(processed, rows, positions, vocab_size)
        tokens = jnp.where(forced >= 0, forced, tokens)
        if mode >= Mode.LOGPROBS:
            top = top_tokens(logits, min(MAX_LOGPROBS, vocab_size))
            top_ids, top_logprobs = top.ids_RK, top.logits_RK - normalizer[:, None]
        chosen = _logit_of(logits, tokens)
        ranks = 1 + jax.lax.psum(jnp.sum(logits > chosen[:, None], axis=-1, dtype=jnp.int32), MODEL)
        sampled = Sampled(tokens, chosen - normalizer, ranks, top_ids, top_logprobs)
        return jax.tree.map(lambda x: jax.lax.all_gather(x, DATA, tiled=True), sampled)

    by_row, top = SPECS["tokens"], None if mode < Mode.LOGPROBS else SPECS["replicated"]
    by_slot = None if slots is None else SLOT_SPECS
    # The result is the same everywhere after the gathers, which the checker of varying axes cannot know.
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(SPECS["last_logits"], by_row, RowParams(*[by_row] * len(RowParams._fields)), by_slot, *[by_row] * 3),
        out_specs=Sampled(*[SPECS["replicated"]] * 3, top, top),
        check_vma=False,
    )(logits_RV, normalizer_R, rows, slots, slot_R, positions_R, forced_R)


def draw(logits_RV: jax.Array, rows: RowParams, positions_R: jax.Array, vocab_size: int) -> jax.Array:
    """Draws (R,) from one device's part of processed logits, with the filters of each row; temperature 0 is greedy."""
    is_greedy_R = rows.temperature_R <= 0
    filters = Filters(
        jnp.where(is_greedy_R, 1.0, jnp.maximum(rows.temperature_R, 1e-30)),
        jnp.where(is_greedy_R, 0, rows.top_k_R),
        jnp.where(is_greedy_R, 1.0, rows.top_p_R),
        jnp.where(is_greedy_R, 0.0, rows.min_p_R),
    )
    peak_R = jax.lax.pmax(jnp.max(logits_RV, axis=-1), MODEL)
    cut = last_kept(logits_RV, peak_R, top_tokens(logits_RV, min(K, vocab_size)), filters, vocab_size)
    n_local = logits_RV.shape[-1]
    ids_RV = jnp.broadcast_to(jax.lax.axis_index(MODEL) * n_local + jnp.arange(n_local), logits_RV.shape)
    # Relative to the largest, so that no temperature, however small, overflows.
    scaled_RV = (logits_RV - peak_R[:, None]) / filters.temperature_R[:, None]
    noisy_RV = scaled_RV + gumbel(rows.seed_R2, positions_R, ids_RV)
    noisy_RV = jnp.where(is_kept(logits_RV, ids_RV, peak_R, cut, filters), noisy_RV, -jnp.inf)
    return sharded_argmax(jnp.where(is_greedy_R[:, None], logits_RV, noisy_RV))


def sharded_argmax(logits_RV: jax.Array) -> jax.Array:
    """Global argmax over a split vocabulary; the lowest id wins ties, as on one device."""
    first_id = jax.lax.axis_index(MODEL) * logits_RV.shape[-1]
    ids_R = jnp.argmax(logits_RV, axis=-1).astype(jnp.int32) + first_id
    peaks_MR = jax.lax.all_gather(jnp.max(logits_RV, axis=-1), MODEL)
    ids_MR = jax.lax.all_gather(ids_R, MODEL)
    winner_R = jnp.argmax(peaks_MR, axis=0)
    return jnp.take_along_axis(ids_MR, winner_R[None], axis=0)[0]


def _logit_of(logits_RV: jax.Array, tokens_R: jax.Array) -> jax.Array:
    """The logit (R,) of one token per row, from the shard that has it."""
    n_local = logits_RV.shape[-1]
    local_R = tokens_R - jax.lax.axis_index(MODEL) * n_local
    mine_R = (local_R >= 0) & (local_R < n_local)
    logit_R = jnp.take_along_axis(logits_RV, jnp.clip(local_R, 0, n_local - 1)[:, None], axis=-1)[:, 0]
    return jax.lax.psum(jnp.where(mine_R, logit_R, 0), MODEL)
