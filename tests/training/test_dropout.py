"""Dropout is a function of key, place and global row: one model on every mesh, other masks for other rows."""

import functools

import jax
import numpy as np
import pytest
from hf_reference import distance
from tiny_model import CONFIG, QUICK, random_weights

from sharded_llama.mesh import make_mesh
from sharded_llama.model import Dropout, _drop, xfmr
from sharded_llama.sharding import named_sharding

TOKENS = np.tile(np.arange(1, 9, dtype=np.int32), (8, 1))  # equal rows: only dropout tells them apart
MESHES = [(1, 1), (1, 4), (2, 2), (8, 1)]


@functools.cache
def logits(mesh_shape, rate, seed=0):
    mesh = make_mesh(*mesh_shape)
    weights = random_weights(CONFIG, mesh_shape)
    tokens = jax.device_put(TOKENS, named_sharding(mesh, "tokens"))

    def run(weights, tokens, key):
        return xfmr(weights, CONFIG, tokens, mesh=mesh, dropout=None if rate is None else Dropout(rate, key))

    return np.asarray(jax.jit(run, compiler_options=QUICK)(weights, tokens, jax.random.key(seed)))


@pytest.mark.parametrize("mesh_shape", MESHES[1:], ids=str)
def test_the_mesh_does_not_matter(mesh_shape):
    assert distance(logits(mesh_shape, 0.3), logits((1, 1), 0.3)) < 1e-6


@pytest.mark.parametrize("mesh_shape", MESHES, ids=str)
def test_rows_have_masks_of_their_own(mesh_shape):
    rows = logits(mesh_shape, 0.3).reshape(8, -1)
    apart = [distance(rows[i], rows[j]) for i in range(8) for j in range(i)]
    assert min(apart) > 0.1
    plain = logits(mesh_shape, None).reshape(8, -1)
    assert max(distance(row, plain[0]) for row in plain) < 1e-6


def test_rate_zero_is_off():
    np.testing.assert_array_equal(logits((2, 2), 0.0), logits((2, 2), None))


def test_the_key_decides():
    assert distance(logits((1, 1), 0.3, seed=1), logits((1, 1), 0.3)) > 0.1


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_what_is_dropped(rate):
    """Kept values are scaled so that the mean stays; positions and channels are dropped independently."""
    mesh = make_mesh(2, 2)
    spec = named_sharding(mesh, "hidden").spec
    drop = jax.shard_map(
        lambda x, key: _drop(x, Dropout(rate, key), 3), mesh=mesh, in_specs=(spec, jax.P()), out_specs=spec
    )
    out = np.asarray(jax.jit(drop)(np.ones((4, 50, 60), np.float32), jax.random.key(0)))
    assert set(np.unique(out)) == {np.float32(0), np.float32(1) / np.float32(1 - rate)}
    deviation = (rate / (1 - rate)) ** 0.5
    assert abs(out.mean() - 1) < 4 * deviation / out.size**0.5
    for axis in (0, 1, 2):  # no row, position or channel stands out
        others = tuple(i for i in range(3) if i != axis)
        n = out.size / out.shape[axis]
        assert abs(out.mean(axis=others) - 1).max() < 5 * deviation / n**0.5
