"""The entropy sampler: how sure the model is decides how each token is chosen.

Pure functions of one device's part, inside `shard_map`. The idea is that of the quadrant sampler of xjdr-alt/entropix
in its first published form, with its faults corrected: every row by itself, and every filter really applied.
"""

import enum
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..sharding import MODEL
from .entropy_settings import NO_TOKEN, SettingColumns

LOWEST = -200.0  # exponent whose exponential is 0 in float32; finite, so that 0 times it is 0


class Strategy(enum.IntEnum):
    """How a token was chosen."""

    GREEDY = 0
    PAUSE = 1
    EXPLORE = 2
    RESAMPLE = 3
    ADAPTIVE = 4


class Choice(NamedTuple):
    """What is done for every row: a draw from the filtered distribution, unless a token is forced."""

    strategy_R: jax.Array  # int32, of Strategy
    temperature_R: jax.Array  # float32; 0: the most likely token, or the forced one
    top_p_R: jax.Array  # float32
    top_k_R: jax.Array  # int32, at least 1
    min_p_R: jax.Array  # float32
    n_candidates_R: jax.Array  # int32, draws of which `best_candidate` keeps one
    forced_R: jax.Array  # int32, the pause token where it is chosen, else NO_TOKEN
    confidence_R: jax.Array  # float32, what a candidate's score has beside its log-probability


class TokenMetrics(NamedTuple):
    """What the entropy sampler saw and did for one token. Effective settings: those that it was drawn with."""

    entropy: float  # bits
    varentropy: float  # bits^2
    attention_entropy: float  # bits, mean over the heads of the last layer
    attention_varentropy: float  # bits^2, variance over heads of their entropy
    agreement: float  # 0 where all heads look at the same place
    interaction: float  # mean size of the attention scores
    strategy: int  # of Strategy
    temperature: float  # effective; 0: not drawn
    top_p: float
    top_k: int
    min_p: float
    score: float  # confidence of the step, the part of a candidate's score that all candidates share


def logit_metrics(logits_RV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Entropy (bits) and varentropy (bits^2) of softmax(logits), each (R,) float32, the same on all `model` shards.

    H = -sum p log2 p and V = sum p (log2 p + H)^2. logits_RV is this shard's part of the vocabulary; tokens with
    -inf, as the padding has, count nothing. Rows need at least one finite logit.
    """
    logits_RV = logits_RV.astype(jnp.float32)
    peak_R = jax.lax.pmax(jnp.max(logits_RV, axis=-1), MODEL)
    # Relative to the peak: what is added up is small where the distribution is sharp.
    log_RV = jnp.maximum(logits_RV - peak_R[:, None], LOWEST)
    weight_RV = jnp.exp(log_RV)
    sums_2R = jnp.stack([jnp.sum(weight_RV, axis=-1), jnp.sum(weight_RV * log_RV, axis=-1)])
    total_R, weighted_R = jax.lax.psum(sums_2R, MODEL)
    mean_R = weighted_R / total_R
    squares_R = jnp.sum(weight_RV * jnp.square(log_RV - mean_R[:, None]), axis=-1)
    varentropy_R = jax.lax.psum(squares_R, MODEL) / total_R
    to_bits = math.log2(math.e)
    return (jnp.log(total_R) - mean_R) * to_bits, varentropy_R * to_bits**2


def choose_strategy(
    entropy_R: jax.Array,
    varentropy_R: jax.Array,
    attention_R4: jax.Array,
    settings: SettingColumns,
    last_token_R: jax.Array,
    pause_allowed_R: jax.Array,
) -> Choice:
    """The first strategy that fits each row, and what it does. Nothing is exchanged between devices.

    GREEDY where H and V are low, or T is 0; PAUSE where H is high and V low; EXPLORE where H is not high and V is;
    RESAMPLE where H is above medium and V is high; else ADAPTIVE. `EntropySettings` has the formulas.

    Args:
      entropy_R, varentropy_R: from `logit_metrics`, of the raw logits.
      attention_R4: from `attention_metrics`.
      settings: columns (R,) float32, from `unpack_settings`. A row of zeros is greedy.
      last_token_R: int32, the token before the one to be chosen; NO_TOKEN: none.
      pause_allowed_R: bool, whether the row may choose its pause token; what it says of rows without one is not used.
    """
    s, h_R, v_R = settings, entropy_R, varentropy_R
    ah_R, av_R, agree_R, inter_R = attention_R4.T
    conditions = {
        Strategy.GREEDY: (s.temperature == 0) | ((h_R < s.low_entropy) & (v_R < s.low_varentropy)),
        Strategy.PAUSE: (h_R > s.high_entropy) & (v_R < s.low_varentropy),
        Strategy.EXPLORE: (h_R < s.high_entropy) & (v_R > s.high_varentropy),
        Strategy.RESAMPLE: (h_R > s.medium_entropy) & (v_R > s.high_varentropy),
    }
    strategy_R = jnp.select(list(conditions.values()), [jnp.int32(x) for x in conditions], jnp.int32(Strategy.ADAPTIVE))
    is_greedy_R, is_pause_R, is_explore_R, is_resample_R, is_adaptive_R = (strategy_R == x for x in Strategy)

    pause_token_R = s.pause_token.astype(jnp.int32)
    pauses_R = is_pause_R & (pause_token_R != NO_TOKEN) & (pause_token_R != last_token_R) & pause_allowed_R

    # A token without a draw, greedy or forced, has temperature 0 and the filters that were set.
    temperature_R = jnp.select(
        [is_greedy_R | pauses_R, is_pause_R, is_explore_R, is_resample_R],
        [
            jnp.zeros_like(h_R),
            _hotter(s, s.pause_temperature + s.pause_attention_entropy * ah_R, s.pause_max_temperature),
            _hotter(s, s.explore_temperature + s.explore_interaction * inter_R, s.explore_max_temperature),
            _hotter(s, s.resample_temperature + s.resample_attention_varentropy * av_R, s.resample_max_temperature),
        ],
        s.temperature
        * (
            1
            + s.adaptive_uncertainty * (h_R + v_R)
            + s.adaptive_attention_uncertainty * (ah_R + av_R)
            - s.adaptive_agreement * agree_R
        ),
    )

    explore_top_k_R = jnp.floor(s.top_k * (1 + s.explore_disagreement * (1 - agree_R)))
    adaptive_top_k_R = jnp.round(
        s.top_k * (1 + s.adaptive_top_k_interaction * inter_R - s.adaptive_top_k_agreement * agree_R)
    )
    top_k_R = jnp.select(
        [is_explore_R, is_adaptive_R],
        [
            jnp.maximum(s.explore_min_top_k, explore_top_k_R),
            jnp.clip(adaptive_top_k_R, s.adaptive_min_top_k, s.adaptive_max_top_k),
        ],
        s.top_k,
    )
    adaptive_top_p_R = s.top_p * (1 + s.adaptive_top_p_attention_varentropy * av_R)
    top_p_R = jnp.select(
        [is_resample_R, is_adaptive_R],
        [
            jnp.maximum(s.resample_min_top_p, s.top_p - s.resample_attention_entropy * ah_R),
            jnp.clip(adaptive_top_p_R, s.adaptive_min_top_p, s.adaptive_max_top_p),
        ],
        s.top_p,
    )
    adaptive_min_p_R = s.min_p * (1 - s.adaptive_min_p_uncertainty * (h_R + v_R))
    min_p_R = jnp.where(is_adaptive_R, jnp.clip(adaptive_min_p_R, s.adaptive_min_min_p, s.adaptive_max_min_p), s.min_p)

    return Choice(
        strategy_R=strategy_R,
        temperature_R=temperature_R,
        top_p_R=top_p_R,
        top_k_R=top_k_R.astype(jnp.int32),
        min_p_R=min_p_R,
        n_candidates_R=jnp.where(is_adaptive_R, s.candidates, 1).astype(jnp.int32),
        forced_R=jnp.where(pauses_R, pause_token_R, NO_TOKEN),
        confidence_R=s.score_entropy * (1 - h_R)
        + s.score_attention_entropy * (1 - ah_R)
        + s.score_varentropy * (1 - v_R)
        + s.score_attention_varentropy * (1 - av_R)
        + s.score_agreement * agree_R
        + s.score_interaction * inter_R,
    )


def best_candidate(logprobs_RN: jax.Array, n_candidates_R: jax.Array) -> jax.Array:
    """Which of a row's first n_candidates_R draws is kept, (R,) int32: the one with the highest score, of equals the
    first.

    Scores differ by log p(token) alone, so that this is all that is compared: adding the confidence would round.

    Args:
      logprobs_RN: float32, log p of each drawn token in the distribution before temperature and filters.
      n_candidates_R: int32, from `choose_strategy`; at least 1.
    """
    counts_RN = jnp.arange(logprobs_RN.shape[-1]) < n_candidates_R[:, None]
    return jnp.argmax(jnp.where(counts_RN, logprobs_RN, -jnp.inf), axis=-1).astype(jnp.int32)


def stack_metrics(entropy_R: jax.Array, varentropy_R: jax.Array, attention_R4: jax.Array, choice: Choice) -> jax.Array:
    """What `token_metrics` reads of every row: (R, 12) float32, in the order of TokenMetrics."""
    c = choice
    effective = [c.strategy_R, c.temperature_R, c.top_p_R, c.top_k_R, c.min_p_R, c.confidence_R]
    columns = [entropy_R, varentropy_R, *attention_R4.T, *effective]
    return jnp.stack([x.astype(jnp.float32) for x in columns], axis=-1)


def token_metrics(row: np.ndarray) -> TokenMetrics:
    """One row (12,) of `stack_metrics`, on the host."""
    metrics = TokenMetrics(*(float(x) for x in row))
    return metrics._replace(strategy=int(metrics.strategy), top_k=int(metrics.top_k))


def _hotter(settings: SettingColumns, factor_R: jax.Array, most_R: jax.Array) -> jax.Array:
    return jnp.minimum(most_R, settings.temperature * factor_R)
