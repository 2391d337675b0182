"""What sampling keeps of slots, as it is set and counted on every part of the mesh."""

import functools

import jax
import numpy as np
import pytest
from sampling import sampler_spec as spec

from sharded_llama.mesh import make_mesh
from sharded_llama.sampling import SamplingParams
from sharded_llama.sampling.entropy_settings import N_SETTINGS, EntropySettings, pack_settings
from sharded_llama.sampling.params import MAX_BIAS
from sharded_llama.sampling.slots import (
    KNOWN_TOKENS,
    SLOT_SPECS,
    SlotSampling,
    abstract_slots,
    count_tokens,
    n_words,
    new_slots,
    pack_known,
    pack_slot,
    set_counts,
    set_slots,
)
from sharded_llama.sharding import SPECS, padded

VOCAB, SLOTS = 131, 4  # slots of each data shard
MESHES = [(1, 1), (2, 4), (1, 8), (4, 2)]
NOTHING = SLOTS  # a slot that is not there


@functools.cache
def on_mesh(function, mesh_shape):
    """A jitted function of one device's part."""
    by_row, by_vocab = SPECS["tokens"], SPECS["last_logits"]
    ins, outs = {
        set_slots: ((SLOT_SPECS, by_row), SLOT_SPECS),
        set_counts: ((by_vocab, by_row), by_vocab),
        count_tokens: ((by_vocab, by_row, by_row), by_vocab),
    }[function]
    mesh = make_mesh(*mesh_shape)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False))


def fresh(mesh_shape):
    mesh = make_mesh(*mesh_shape)
    abstract = abstract_slots(mesh, SLOTS, VOCAB, padded(VOCAB, mesh_shape[1]))
    made = jax.jit(lambda: new_slots(abstract))()
    assert [(x.shape, x.dtype) for x in made] == [(x.shape, x.dtype) for x in abstract]
    return SlotSampling(*(np.asarray(x) for x in made))


def assert_equal(ours, theirs):
    for name, x, y in zip(SlotSampling._fields, ours, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(x), y, name)


@pytest.mark.parametrize("mesh_shape", MESHES, ids=str)
def test_new_slots_are_neutral(mesh_shape):
    slots = fresh(mesh_shape)
    n = mesh_shape[0] * SLOTS
    assert_equal(slots, spec.slot_arrays([{}] * n, VOCAB, padded(VOCAB, mesh_shape[1])))
    assert slots.allowed_SW.shape == (n, 5)


@pytest.mark.parametrize("mesh_shape", MESHES, ids=str)
def test_changes_reach_their_slots_and_no_others(mesh_shape):
    data = mesh_shape[0]
    params = SamplingParams(seed=0, logit_bias={7: 1.5, 130: -100.0}, entropy=EntropySettings(top_k=9, pause_token=3))
    allowed = [0, 31, 32, 64, 130]
    change = pack_slot(VOCAB, spec.mask_words(allowed, VOCAB), params.logit_bias, pack_settings(params.entropy))
    none = np.concatenate([[NOTHING], pack_slot(VOCAB, spec.mask_words([5], VOCAB), {9: 9.0})])
    changes = np.stack([none, np.concatenate([[2], change]), none] + [none] * 3 * (data - 1)).astype(np.int32)
    before = fresh(mesh_shape)
    counted = before._replace(counts_SV=before.counts_SV + 5)
    after = on_mesh(set_slots, mesh_shape)(counted, changes)
    settings = [{}] * (data * SLOTS)
    settings[2] = {"params": params, "allowed": allowed}
    expected = spec.slot_arrays(settings, VOCAB, padded(VOCAB, mesh_shape[1]))
    assert_equal(after, expected._replace(counts_SV=counted.counts_SV))
    # The neutral settings undo it.
    changes[1, 1:] = pack_slot(VOCAB)
    assert_equal(on_mesh(set_slots, mesh_shape)(after, changes), counted)


def test_a_packed_slot_has_the_bits_of_its_parts():
    words = np.array([1, 2**31, 2**32 - 1, 0, 7], np.uint32)
    bias, settings = {130: -0.0, 2: 0.1}, pack_settings(EntropySettings(top_p=0.3))
    packed = pack_slot(VOCAB, words, bias, settings)
    assert packed.dtype == np.int32
    assert len(packed) == n_words(VOCAB) + 2 * MAX_BIAS + N_SETTINGS
    mask, ids, values, rest = np.split(packed, np.cumsum([5, MAX_BIAS, MAX_BIAS]))
    np.testing.assert_array_equal(mask.view(np.uint32), words)
    assert ids[:3].tolist() == [130, 2, -1]
    np.testing.assert_array_equal(values[:2].view(np.float32), np.float32([-0.0, 0.1]))
    assert np.signbit(values.view(np.float32)[0])
    np.testing.assert_array_equal(rest.view(np.float32), settings)


class TestKnownTokens:
    @pytest.mark.parametrize("mesh_shape", MESHES, ids=str)
    def test_a_prompt_counts_once_and_an_answer_every_time(self, mesh_shape):
        rng = np.random.default_rng(0)
        data = mesh_shape[0]
        prompt, generated = rng.integers(0, VOCAB, 90).tolist(), [0, 130, 130, *rng.integers(0, VOCAB, 50).tolist()]
        (change,) = pack_known(1, prompt, generated)
        (none,) = pack_known(NOTHING, [1, 2], [3])
        before = np.full((data * SLOTS, padded(VOCAB, mesh_shape[1])), 77, np.int32)
        after = np.asarray(on_mesh(set_counts, mesh_shape)(before, np.stack([none] * (data - 1) + [change])))
        slot = (data - 1) * SLOTS + 1  # of the last shard
        settings = [{}] * (data * SLOTS)
        settings[slot] = {"prompt": prompt, "generated": generated}
        expected = spec.slot_arrays(settings, VOCAB, before.shape[1]).counts_SV
        np.testing.assert_array_equal(after[slot], expected[slot])
        np.testing.assert_array_equal(np.delete(after, slot, 0), np.delete(before, slot, 0))

    @pytest.mark.parametrize("n_generated", [0, 1, KNOWN_TOKENS - 7, KNOWN_TOKENS, 3 * KNOWN_TOKENS])
    def test_long_answers_come_in_parts(self, n_generated):
        rng = np.random.default_rng(1)
        prompt, generated = [5, 5, 6, 130], rng.integers(0, VOCAB, n_generated).tolist()
        parts = pack_known(3, prompt, generated)
        assert len(parts) == -(-(3 + n_generated) // KNOWN_TOKENS)
        assert all(part.shape == (2 + KNOWN_TOKENS,) and part.dtype == np.int32 for part in parts)
        counts = np.full((SLOTS, VOCAB), 9, np.int32)
        for part in parts:
            counts = on_mesh(set_counts, (1, 1))(counts, part[None])
        expected = spec.slot_arrays([{"prompt": prompt, "generated": generated}], VOCAB, VOCAB).counts_SV
        np.testing.assert_array_equal(np.asarray(counts)[3], expected[0])
        np.testing.assert_array_equal(np.asarray(counts)[:3], 9)

    def test_nothing_known_still_begins_anew(self):
        (part,) = pack_known(0, [], [])
        counts = on_mesh(set_counts, (1, 1))(np.full((SLOTS, VOCAB), 9, np.int32), part[None])
        assert np.asarray(counts).sum(1).tolist() == [0, 9 * VOCAB, 9 * VOCAB, 9 * VOCAB]


@pytest.mark.parametrize("mesh_shape", MESHES, ids=str)
def test_new_tokens_are_counted(mesh_shape):
    """First and last ones of each part of the vocabulary; rows without a slot count nothing."""
    data, width = mesh_shape[0], padded(VOCAB, mesh_shape[1])
    n_local = width // mesh_shape[1]
    tokens = sorted({0, n_local - 1, min(n_local, VOCAB - 1), VOCAB - 1})
    rng = np.random.default_rng(2)
    before = rng.integers(0, 9, (data * SLOTS, width)).astype(np.int32)
    for token in tokens:
        tokens_R = np.full(data * (SLOTS + 1), token, np.int32)
        slot_R = np.tile(np.array([3, NOTHING, 0, 2**31 - 1, 2], np.int32), data)
        after = on_mesh(count_tokens, mesh_shape)(before, slot_R, tokens_R)
        expected = before.copy()
        expected.reshape(data, SLOTS, width)[:, [0, 2, 3], token] += 2
        np.testing.assert_array_equal(after, expected)
