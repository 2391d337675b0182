"""What sampling keeps on the device of every slot that a sequence can run in.

It is set when a sequence gets the slot and asks for any of it. For others masks and biases are made neutral, and the
counts are without effect, because their rows have no penalties.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..sharding import DATA, SPECS, local_ids, named_sharding
from .entropy_settings import N_SETTINGS
from .params import MAX_BIAS

IN_PROMPT, GENERATED = 1, 2  # units of the counts: in the prompt or not, and how often generated
KNOWN_TOKENS = 1024  # tokens that one call counts


class SlotSampling(NamedTuple):
    """Per slot, on the device."""

    counts_SV: jax.Array  # int32, IN_PROMPT if so plus GENERATED for each time
    allowed_SW: jax.Array  # uint32, bit v % 32 of word v // 32: token v may be chosen
    bias_ids_SB: jax.Array  # int32, tokens with a bias; -1: none
    bias_SB: jax.Array  # float32
    entropy_SE: jax.Array  # float32, settings of the entropy sampler


SLOT_SPECS = SlotSampling(
    counts_SV=SPECS["last_logits"],
    allowed_SW=SPECS["tokens"],
    bias_ids_SB=SPECS["tokens"],
    bias_SB=SPECS["tokens"],
    entropy_SE=SPECS["tokens"],
)


def n_words(vocab_size: int) -> int:
    """Words of one slot's mask."""
    return -(-vocab_size // 32)


def abstract_slots(mesh: Mesh, slots: int, vocab_size: int, padded_size: int) -> SlotSampling:
    """Shapes, types and shardings for `slots` slots on each data shard."""
    n = mesh.shape[DATA] * slots

    def array(width: int, dtype: jnp.dtype, name: str = "tokens") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((n, width), dtype, sharding=named_sharding(mesh, name))

    return SlotSampling(
        counts_SV=array(padded_size, jnp.int32, "last_logits"),
        allowed_SW=array(n_words(vocab_size), jnp.uint32),
        bias_ids_SB=array(MAX_BIAS, jnp.int32),
        bias_SB=array(MAX_BIAS, jnp.float32),
        entropy_SE=array(N_SETTINGS, jnp.float32),
    )


def new_slots(abstract: SlotSampling) -> SlotSampling:
    """Slots that allow everything and favour nothing. Call it under `jax.jit`."""
    full = {"allowed_SW": np.uint32(0xFFFFFFFF), "bias_ids_SB": -1}
    return SlotSampling(*(jnp.full(x.shape, full.get(n, 0), x.dtype) for n, x in abstract._asdict().items()))


def pack_slot(
    vocab_size: int,
    allowed_W: np.ndarray | None = None,
    bias: Mapping[int, float] | None = None,
    entropy_E: np.ndarray | None = None,
) -> np.ndarray:
    """One slot's settings as int32 (X,), bit for bit: mask, ids with a bias, biases, the entropy sampler's settings."""
    mask_W = np.full(n_words(vocab_size), 0xFFFFFFFF, np.uint32) if allowed_W is None else allowed_W
    ids_B, bias_B = np.full(MAX_BIAS, -1, np.int32), np.zeros(MAX_BIAS, np.float32)
    if bias:
        ids_B[: len(bias)], bias_B[: len(bias)] = list(bias), list(bias.values())
    settings_E = np.zeros(N_SETTINGS, np.float32) if entropy_E is None else entropy_E
    return np.concatenate([x.view(np.int32) for x in (mask_W, ids_B, bias_B, settings_E)])


def set_slots(slots: SlotSampling, changes_UX: jax.Array) -> SlotSampling:
    """Changes: a slot, then its `pack_slot`; slots beyond the last: nothing. One device's part."""
    slot_U, rest_UX = changes_UX[:, 0], changes_UX[:, 1:]
    changed = {}
    for name, array in list(slots._asdict().items())[1:]:
        part, rest_UX = rest_UX[:, : array.shape[1]], rest_UX[:, array.shape[1] :]
        changed[name] = array.at[slot_U].set(jax.lax.bitcast_convert_type(part, array.dtype), mode="drop")
    return slots._replace(**changed)


def pack_known(slot: int, prompt: Sequence[int], generated: Sequence[int]) -> list[np.ndarray]:
    """The tokens that a slot begins with as changes (2 + KNOWN_TOKENS,) for `set_counts`, in order."""
    units = np.concatenate([2 * np.unique(np.asarray(prompt, np.int32)), 2 * np.asarray(generated, np.int32) + 1])
    changes = []
    for first in range(0, max(1, len(units)), KNOWN_TOKENS):
        part = units[first : first + KNOWN_TOKENS]
        padding = np.full(KNOWN_TOKENS - len(part), -1, np.int32)
        changes.append(np.concatenate([[slot, first == 0], part, padding]).astype(np.int32))
    return changes


def set_counts(counts_SV: jax.Array, changes_UX: jax.Array) -> jax.Array:
    """Changes: a slot, whether its counts begin anew, tokens as in `pack_known`. One device's part."""
    n_slots, n_local = counts_SV.shape
    slot_U = changes_UX[:, 0]
    anew_U = jnp.where(changes_UX[:, 1] > 0, slot_U, n_slots)
    counts_SV = counts_SV.at[anew_U].set(0, mode="drop")
    units_UN = changes_UX[:, 2:]
    local_UN, mine_UN = local_ids(units_UN // 2, n_local)
    column_UN = jnp.where((units_UN >= 0) & mine_UN, local_UN, n_local)
    return counts_SV.at[slot_U[:, None], column_UN].add(jnp.where(units_UN % 2 > 0, GENERATED, IN_PROMPT), mode="drop")


def count_tokens(counts_SV: jax.Array, slot_R: jax.Array, tokens_R: jax.Array) -> jax.Array:
    """The counts with one more of each row's token; slots beyond the last: nothing. One device's part."""
    n_local = counts_SV.shape[-1]
    local_R, mine_R = local_ids(tokens_R, n_local)
    return counts_SV.at[slot_R, jnp.where(mine_R, local_R, n_local)].add(GENERATED, mode="drop")
