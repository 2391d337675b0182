"""What changes logits before anything is chosen: bias, penalties for what was said before, and what is not allowed.

What a request's tokens were, which of them it allows and which it favours is kept on the device, for every slot that a
sequence can run in. It is set when a sequence gets the slot and asks for any of it; other rows have parameters that
make all of it without effect.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..sharding import MODEL
from .params import MAX_BIAS
from .rows import RowParams

IN_PROMPT, GENERATED = 1, 2  # units of the counts: in the prompt or not, and how often generated


class SlotSampling(NamedTuple):
    """Per slot, on the device."""

    counts_SV: jax.Array  # int32, IN_PROMPT if so plus GENERATED for each time, P('data', 'model')
    allowed_SW: jax.Array  # uint32, bit v % 32 of word v // 32: token v may be chosen, P('data')
    bias_ids_SB: jax.Array  # int32, tokens with a bias; -1: none, P('data')
    bias_SB: jax.Array  # float32, P('data')
    entropy_SE: jax.Array  # float32, settings of the entropy sampler, P('data')


N_BIAS = MAX_BIAS


def n_words(vocab_size: int) -> int:
    """Words of one slot's mask."""
    return -(-vocab_size // 32)


def process_logits(logits_RV: jax.Array, slots: SlotSampling, slot_R: jax.Array, rows: RowParams) -> jax.Array:
    """Logits (R, V) as they are chosen from: bias, then repetition, frequency and presence penalty, then the mask.

    One device's part of a vocabulary that is split over `model`. Formulas as in vLLM's documentation of its sampling
    parameters; the repetition penalty is that of https://arxiv.org/abs/1909.05858.
    """
    n_local = logits_RV.shape[-1]
    first_id = jax.lax.axis_index(MODEL) * n_local
    at = {"mode": "clip"}
    counts_RV = slots.counts_SV.at[slot_R].get(**at)

    def penalised(logits: jax.Array, counts: jax.Array) -> jax.Array:
        """Of rows by any number of their tokens."""
        times = counts // GENERATED
        repeated = jnp.where(logits > 0, logits / rows.repetition_R[:, None], logits * rows.repetition_R[:, None])
        logits = jnp.where(counts > 0, repeated, logits)
        return logits - rows.frequency_R[:, None] * times - rows.presence_R[:, None] * (times > 0)

    out_RV = penalised(logits_RV, counts_RV)
    # Few tokens have a bias: these are computed again.
    ids_RB = slots.bias_ids_SB.at[slot_R].get(**at) - first_id
    mine_RB = (ids_RB >= 0) & (ids_RB < n_local)
    near_RB = jnp.clip(ids_RB, 0, n_local - 1)
    biased_RB = jnp.take_along_axis(logits_RV, near_RB, axis=1) + slots.bias_SB.at[slot_R].get(**at)
    biased_RB = penalised(biased_RB, jnp.take_along_axis(counts_RV, near_RB, axis=1))
    row_R1 = jnp.arange(logits_RV.shape[0])[:, None]
    out_RV = out_RV.at[row_R1, jnp.where(mine_RB, ids_RB, n_local)].set(biased_RB, mode="drop")
    return jnp.where(_bits(slots.allowed_SW.at[slot_R].get(**at), first_id, n_local), out_RV, -jnp.inf)


def count_tokens(counts_SV: jax.Array, slot_R: jax.Array, tokens_R: jax.Array) -> jax.Array:
    """The counts with one more of each row's token; slots beyond the last: nothing. One device's part."""
    n_local = counts_SV.shape[-1]
    local_R = tokens_R - jax.lax.axis_index(MODEL) * n_local
    column_R = jnp.where((local_R >= 0) & (local_R < n_local), local_R, n_local)
    return counts_SV.at[slot_R, column_R].add(GENERATED, mode="drop")


def _bits(words_RW: jax.Array, first_id: jax.Array, n_local: int) -> jax.Array:
    """Booleans (R, n_local): the bits of ids `first_id`.. of the mask; ids beyond it: False."""
    bits_RV = ((words_RW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1).reshape(words_RW.shape[0], -1) > 0
    beyond = -bits_RV.shape[1] % n_local  # the last shards' ids may all be padding
    return jax.lax.dynamic_slice_in_dim(jnp.pad(bits_RV, ((0, 0), (0, beyond + n_local))), first_id, n_local, axis=1)
