"""Stopping and going on changes nothing: bitwise on the same mesh, within rounding on another."""

import jax
import numpy as np
import pytest
from hf_reference import distance
from tiny_model import CONFIG, SETTINGS, random_state, run_steps

from sharded_llama.errors import TrainingError
from sharded_llama.mesh import make_mesh
from sharded_llama.training.checkpointing import StateStore
from sharded_llama.training.step import abstract_train_state


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A store with the states after steps 1, 2 and 3; the state after 6 uninterrupted steps; their losses."""
    store = StateStore(tmp_path_factory.mktemp("state"))
    state, losses = random_state((2, 4)), []
    for i in range(1, 7):
        state, loss = run_steps(state, [i], (2, 4))
        losses += loss
        if i <= 3:
            store.save(state)
    yield store, state, losses
    store.close()


def test_the_last_two_are_kept(saved):
    store = saved[0]
    assert store.latest_step == 3
    assert {path.name for path in store.folder.iterdir()} == {"2", "3"}


def test_exactly_on_the_same_mesh(saved):
    store, expected, losses = saved
    again = StateStore(store.folder)
    state = again.restore(abstract_train_state(CONFIG, SETTINGS, make_mesh(2, 4)))
    again.close()
    assert int(state.step) == 3
    state, resumed = run_steps(state, range(4, 7), (2, 4))
    assert resumed == losses[3:]
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_on_another_mesh(saved):
    store, expected, losses = saved
    state = store.restore(abstract_train_state(CONFIG, SETTINGS, make_mesh(1, 1)))
    assert len(state.weights.tok_embeddings.devices()) == 1
    state, resumed = run_steps(state, range(4, 7), (1, 1))
    np.testing.assert_allclose(resumed, losses[3:], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.weights), jax.tree.leaves(expected.weights), strict=True):
        assert distance(a, b) < 1e-3


def test_a_mesh_that_pads_otherwise(tmp_path):
    config = CONFIG.replace(vocab_size=263)
    store = StateStore(tmp_path)
    store.save(random_state((1, 4)))  # 264 rows: what `config` has on meshes with an even model size
    with pytest.raises(TrainingError, match=r"tok_embeddings has the shape \(264, 16\), .* needs \(263, 16\).*alike"):
        store.restore(abstract_train_state(config, SETTINGS, make_mesh(1, 1)))
    assert int(store.restore(abstract_train_state(config, SETTINGS, make_mesh(1, 2))).step) == 0
    store.close()


def test_another_model(saved):
    store = saved[0]
    deeper = abstract_train_state(CONFIG.replace(n_layers=2), SETTINGS, make_mesh(2, 4))
    with pytest.raises(TrainingError, match=r"weights\.layers\.1\.\w+ has the shape None"):
        store.restore(deeper)


def test_nothing_saved(tmp_path):
    store = StateStore(tmp_path)
    assert store.latest_step is None
    with pytest.raises(TrainingError, match="holds no saved state"):
        store.restore(abstract_train_state(CONFIG, SETTINGS, make_mesh()))
    store.close()
