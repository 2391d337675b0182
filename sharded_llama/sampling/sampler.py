"""The sampler that ends every step: logits in, one token per row out, nothing but that leaves the device."""

import enum
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..sharding import DATA, MODEL, SPECS, local_ids
from .entropy import best_candidate, choose_strategy, logit_metrics, stack_metrics
from .entropy_settings import MAX_CANDIDATES, unpack_settings
from .filters import Candidates, Filters, K, is_kept, last_kept, top_tokens
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
    ENTROPY = 3  # also the entropy sampler


def mode_of(params: SamplingParams) -> Mode:
    """What a request asks for."""
    if params.entropy:
        return Mode.ENTROPY
    if params.logprobs or params.prompt_logprobs:
        return Mode.LOGPROBS
    changes_logits = params.has_penalties or params.has_mask or params.logit_bias
    return Mode.SAMPLE if params.temperature > 0 or changes_logits else Mode.GREEDY


class Sampled(NamedTuple):
    """What was sampled for every row, readable by every process. Log-probabilities are of the raw logits."""

    tokens_R: jax.Array  # int32
    logprobs_R: jax.Array  # float32; NaN where the logits were not numbers
    ranks_R: jax.Array  # int32, 1 for the most likely token
    top_tokens_RJ: jax.Array | None  # int32, the most likely tokens in order; None unless asked for
    top_logprobs_RJ: jax.Array | None  # float32
    metrics_RE: jax.Array | None = None  # float32, of `entropy.stack_metrics`; None unless the entropy sampler runs


def log_normalizer(logits_RV: jax.Array, *, mesh: Mesh) -> jax.Array:
    """Logarithm (R,) of the sum of exponentials of rows of logits that are split over the mesh."""

    def local(logits_RV: jax.Array) -> jax.Array:
        peak_R = jax.lax.pmax(jnp.max(logits_RV, axis=-1), MODEL)
        return peak_R + jnp.log(jax.lax.psum(jnp.sum(jnp.exp(logits_RV - peak_R[:, None]), axis=-1), MODEL))

    return jax.shard_map(local, mesh=mesh, in_specs=SPECS["last_logits"], out_specs=SPECS["tokens"])(logits_RV)


def sample(
    logits_RV: jax.Array,
    normalizer_R: jax.Array,
    attention_R4: jax.Array | None,
    last_R: jax.Array | None,
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
      attention_R4, last_R: in ENTROPY mode the metrics of the last layer's attention, and each row's last token.
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
        attention: jax.Array | None,
        last: jax.Array | None,
        rows: RowParams,
        slots: SlotSampling | None,
        slot: jax.Array,
        positions: jax.Array,
        forced: jax.Array,
    ) -> Sampled:
        top_ids, top_logprobs, metrics = None, None, None
        if mode == Mode.GREEDY:
            tokens = sharded_argmax(logits)
        else:
            processed = process_logits(logits.astype(jnp.float32), slots, slot, rows)
            if mode == Mode.ENTROPY:
                settings = slots.entropy_SE.at[slot].get(mode="clip")
                tokens, metrics = draw_by_entropy(
                    logits, normalizer, processed, attention, last, rows, settings, positions, vocab_size
                )
            else:
                tokens, _ = draw(processed, rows, positions, vocab_size)
        tokens = jnp.where(forced >= 0, forced, tokens)
        if mode >= Mode.LOGPROBS:
            top = top_tokens(logits, min(MAX_LOGPROBS, vocab_size))
            top_ids, top_logprobs = top.ids_RK, top.logits_RK - normalizer[:, None]
        chosen = logits_of(logits, tokens[:, None])[:, 0]
        ranks = 1 + jax.lax.psum(jnp.sum(logits > chosen[:, None], axis=-1, dtype=jnp.int32), MODEL)
        sampled = Sampled(tokens, chosen - normalizer, ranks, top_ids, top_logprobs, metrics)
        return jax.tree.map(lambda x: jax.lax.all_gather(x, DATA, tiled=True), sampled)

    by_row, whole = SPECS["tokens"], SPECS["replicated"]
    given = (attention_R4, last_R, rows, slots, slot_R, positions_R, forced_R)
    specs = jax.tree.map(lambda _: by_row, given)
    specs = (*specs[:3], None if slots is None else SLOT_SPECS, *specs[4:])
    top = whole if mode >= Mode.LOGPROBS else None
    # The result is the same everywhere after the gathers, which the checker of varying axes cannot know.
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(SPECS["last_logits"], by_row, *specs),
        out_specs=Sampled(*[whole] * 3, top, top, whole if mode == Mode.ENTROPY else None),
        check_vma=False,
    )(logits_RV, normalizer_R, *given)


class Drawn(NamedTuple):
    """What further draws of the same rows need."""

    candidates: Candidates
    noisy: Callable[[jax.Array, jax.Array, int], jax.Array]  # of logits, their ids and the number of the draw


def draw(logits_RV: jax.Array, rows: RowParams, positions_R: jax.Array, vocab_size: int) -> tuple[jax.Array, Drawn]:
    """Draws (R,) from one device's part of processed logits, with the filters of each row; temperature 0 is greedy."""
    is_greedy_R = rows.temperature_R <= 0
    filters = Filters(
        jnp.where(is_greedy_R, 1.0, jnp.maximum(rows.temperature_R, 1e-30)),
        jnp.where(is_greedy_R, 0, rows.top_k_R),
        jnp.where(is_greedy_R, 1.0, rows.top_p_R),
        jnp.where(is_greedy_R, 0.0, rows.min_p_R),
    )
    peak_R = jax.lax.pmax(jnp.max(logits_RV, axis=-1), MODEL)
    candidates = top_tokens(logits_RV, min(K, vocab_size))
    cut = last_kept(logits_RV, peak_R, candidates, filters, vocab_size)

    def noisy(logits: jax.Array, ids: jax.Array, number: int = 0) -> jax.Array:
        """Logits with the noise of a draw, of which the largest is drawn; -inf for what the filters drop."""
        # Relative to the largest, so that no temperature, however small, overflows.
        scaled = (logits - peak_R[:, None]) / filters.temperature_R[:, None]
        with_noise = scaled + gumbel(rows.seed_R2, positions_R, ids, draw=number)
        return jnp.where(is_kept(logits, ids, peak_R, cut, filters), with_noise, -jnp.inf)

    n_local = logits_RV.shape[-1]
    ids_RV = jnp.broadcast_to(jax.lax.axis_index(MODEL) * n_local + jnp.arange(n_local), logits_RV.shape)
    tokens_R = sharded_argmax(jnp.where(is_greedy_R[:, None], logits_RV, noisy(logits_RV, ids_RV)))
    return tokens_R, Drawn(candidates, noisy)


def draw_by_entropy(
    logits_RV: jax.Array,
    normalizer_R: jax.Array,
    processed_RV: jax.Array,
    attention_R4: jax.Array,
    last_R: jax.Array,
    rows: RowParams,
    settings_RE: jax.Array,
    positions_R: jax.Array,
    vocab_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Draws (R,) and what `entropy.token_metrics` reads (R, 12); rows without settings are drawn as by `draw`."""
    settings = unpack_settings(settings_RE)
    uses_R = settings.top_k > 0
    entropy_R, varentropy_R = logit_metrics(logits_RV)
    pause_R = settings.pause_token.astype(jnp.int32)
    may_pause_R = logits_of(processed_RV, pause_R[:, None])[:, 0] > -jnp.inf
    choice = choose_strategy(entropy_R, varentropy_R, attention_R4, settings, last_R, may_pause_R)
    rows = rows._replace(
        temperature_R=jnp.where(uses_R, choice.temperature_R, rows.temperature_R),
        top_k_R=jnp.where(uses_R, choice.top_k_R, rows.top_k_R),
        top_p_R=jnp.where(uses_R, choice.top_p_R, rows.top_p_R),
        min_p_R=jnp.where(uses_R, choice.min_p_R, rows.min_p_R),
    )
    tokens_R, drawn = draw(processed_RV, rows, positions_R, vocab_size)

    # More draws of the same distribution: with top_k at most MAX_TOP_K all of it is among the candidates.
    candidates, others = drawn.candidates, []
    for i in range(1, MAX_CANDIDATES):
        at_R = jnp.argmax(drawn.noisy(candidates.logits_RK, candidates.ids_RK, i), axis=1)
        others.append(jnp.take_along_axis(candidates.ids_RK, at_R[:, None], axis=1)[:, 0])
    tokens_RN = jnp.stack([tokens_R, *others], axis=1)
    logprobs_RN = logits_of(logits_RV, tokens_RN) - normalizer_R[:, None]
    best_R = best_candidate(logprobs_RN, jnp.maximum(choice.n_candidates_R, 1))
    best_R = jnp.take_along_axis(tokens_RN, best_R[:, None], axis=1)[:, 0]
    draws_several_R = uses_R & (choice.n_candidates_R > 1)
    tokens_R = jnp.where(draws_several_R, best_R, tokens_R)
    tokens_R = jnp.where(uses_R & (choice.forced_R >= 0), choice.forced_R, tokens_R)
    return tokens_R, stack_metrics(entropy_R, varentropy_R, attention_R4, choice)


def sharded_argmax(logits_RV: jax.Array) -> jax.Array:
    """Global argmax over a split vocabulary; the lowest id wins ties, as on one device."""
    first_id = jax.lax.axis_index(MODEL) * logits_RV.shape[-1]
    ids_R = jnp.argmax(logits_RV, axis=-1).astype(jnp.int32) + first_id
    peaks_MR = jax.lax.all_gather(jnp.max(logits_RV, axis=-1), MODEL)
    ids_MR = jax.lax.all_gather(ids_R, MODEL)
    winner_R = jnp.argmax(peaks_MR, axis=0)
    return jnp.take_along_axis(ids_MR, winner_R[None], axis=0)[0]


def logits_of(logits_RV: jax.Array, tokens_RN: jax.Array) -> jax.Array:
    """The logits (R, N) of some tokens of each row, from the shards that have them; 0 for ids that none has."""
    n_local = logits_RV.shape[-1]
    local_RN, mine_RN = local_ids(tokens_RN, n_local)
    logits_RN = jnp.take_along_axis(logits_RV, jnp.clip(local_RN, 0, n_local - 1), axis=-1)
    return jax.lax.psum(jnp.where(mine_RN, logits_RN, 0), MODEL)
