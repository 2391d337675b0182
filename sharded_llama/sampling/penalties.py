"""What changes logits before anything is chosen: bias, penalties for what was said before, and what is not allowed."""

import jax
import jax.numpy as jnp

from ..sharding import MODEL, local_ids
from .rows import RowParams
from .slots import GENERATED, SlotSampling


def process_logits(logits_RV: jax.Array, slots: SlotSampling, slot_R: jax.Array, rows: RowParams) -> jax.Array:
    """Logits (R, V) as they are chosen from: bias, then repetition, frequency and presence penalty, then the mask.

    One device's part of a vocabulary that is split over `model`. Formulas as in vLLM's documentation of its sampling
    parameters; the repetition penalty is that of https://arxiv.org/abs/1909.05858.
    """
    n_local = logits_RV.shape[-1]
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
    ids_RB, mine_RB = local_ids(slots.bias_ids_SB.at[slot_R].get(**at), n_local)
    near_RB = jnp.clip(ids_RB, 0, n_local - 1)
    biased_RB = jnp.take_along_axis(logits_RV, near_RB, axis=1) + slots.bias_SB.at[slot_R].get(**at)
    biased_RB = penalised(biased_RB, jnp.take_along_axis(counts_RV, near_RB, axis=1))
    row_R1 = jnp.arange(logits_RV.shape[0])[:, None]
    out_RV = out_RV.at[row_R1, jnp.where(mine_RB, ids_RB, n_local)].set(biased_RB, mode="drop")
    return jnp.where(_bits(slots.allowed_SW.at[slot_R].get(**at), n_local), out_RV, -jnp.inf)


def _bits(words_RW: jax.Array, n_local: int) -> jax.Array:
    """Booleans (R, n_local): the bits of this shard's ids of the mask; ids beyond it: False."""
    first_id = jax.lax.axis_index(MODEL) * n_local
    bits_RV = ((words_RW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1).reshape(words_RW.shape[0], -1) > 0
    beyond = -bits_RV.shape[1] % n_local  # the last shards' ids may all be padding
    return jax.lax.dynamic_slice_in_dim(jnp.pad(bits_RV, ((0, 0), (0, beyond + n_local))), first_id, n_local, axis=1)
