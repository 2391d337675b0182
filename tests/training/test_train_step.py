"""One step: the optimizer's rules, the layout of its state, and that the loss falls."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_reference import distance
from tiny_model import CONFIG, SETTINGS, batch_of, compiled_step, random_state, run_steps

from sharded_llama.errors import MeshError, TrainingError
from sharded_llama.mesh import make_mesh
from sharded_llama.training.data import put_batch
from sharded_llama.training.settings import TrainSettings
from sharded_llama.training.step import (
    abstract_train_state,
    check_trainable,
    init_train_state,
    make_optimizer,
)

PADDED = CONFIG.replace(vocab_size=263, ffn_dim=23)  # on model:4


@functools.cache
def trained_from_scratch():
    """The initial state (donated, but its layout is there to see), the state after 40 steps, and their losses."""
    settings = dataclasses.replace(SETTINGS, steps=40, dropout=0.0)
    initial = init_train_state(PADDED, settings, make_mesh(2, 4))
    return initial, *run_steps(initial, range(1, 41), (2, 4), PADDED, settings)


@functools.cache
def trained(mesh_shape, settings=SETTINGS):
    return run_steps(random_state(mesh_shape), range(1, 7), mesh_shape, settings=settings)


def test_the_loss_falls():
    *_, losses = trained_from_scratch()
    assert losses[0] == pytest.approx(np.log(263), rel=0.02)
    assert losses[-1] < losses[0] - 1.5


def test_padding_stays_zero():
    _, state, _ = trained_from_scratch()
    moments = state.opt_state[1][0]
    for weights in (state.weights, moments.mu, moments.nu):
        layer = weights.layers[0]
        assert weights.tok_embeddings.shape[0] == 264
        assert layer.w2.shape[1] == 24
        for padding in (weights.tok_embeddings[263:], layer.w13[:, 23:], layer.w2[:, 23:]):
            assert not np.asarray(padding).any()
        assert np.asarray(weights.tok_embeddings[262]).any()


def test_state_is_laid_out_like_the_weights():
    def layout(tree):
        return [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(tree)]

    initial, trained, _ = trained_from_scratch()
    abstract = abstract_train_state(PADDED, SETTINGS, make_mesh(2, 4))
    for state in (initial, trained):
        assert jax.tree.structure(state) == jax.tree.structure(abstract)
        assert layout(state) == layout(abstract)
        moments = state.opt_state[1][0]
        assert layout(moments.mu) == layout(moments.nu) == layout(state.weights)
    assert int(trained.step) == 40


def test_every_mesh_trains_the_same_model():
    (state, losses), (other, other_losses) = trained((1, 1)), trained((2, 4))
    np.testing.assert_allclose(losses, other_losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.weights), jax.tree.leaves(other.weights), strict=True):
        assert distance(a, b) < 1e-3  # Adam divides rounding errors by small second moments


def test_bfloat16_compute_keeps_float32_weights():
    half = dataclasses.replace(SETTINGS, compute_dtype="bfloat16")
    state, losses = trained((1, 1), half)
    _, expected = trained((1, 1))
    assert {x.dtype for x in jax.tree.leaves((state.weights, state.opt_state[1][0][1:]))} == {jnp.dtype("float32")}
    assert losses != expected
    np.testing.assert_allclose(losses, expected, rtol=5e-3)


def first_update(settings, grads, weights):
    optimizer = make_optimizer(settings)
    return jax.jit(lambda g, w: optimizer.update(g, optimizer.init(w), w))(grads, weights)


def test_only_matrices_decay():
    weights = {"matrix": jnp.ones((2, 3)), "fused": jnp.ones((2, 2, 2, 2)), "norm": jnp.ones((3,))}
    nothing = jax.tree.map(jnp.zeros_like, weights)
    updates, _ = first_update(dataclasses.replace(SETTINGS, weight_decay=0.5), nothing, weights)
    assert not updates["norm"].any()
    expected = -0.5 * SETTINGS.learning_rate / 3  # the first of two warm-up steps
    for name in ("matrix", "fused"):
        np.testing.assert_allclose(updates[name], expected, rtol=1e-5)


def test_gradients_are_clipped_together():
    weights = {"a": jnp.ones((2, 2)), "b": jnp.ones((2,))}
    settings = dataclasses.replace(SETTINGS, grad_clip=1.0)
    grads = {"a": jnp.full((2, 2), 30.0), "b": jnp.full((2,), 40.0)}
    _, state = first_update(settings, grads, weights)
    norm = (4 * 30**2 + 2 * 40**2) ** 0.5
    np.testing.assert_allclose(state[1][0].mu["b"], (1 - settings.beta1) * 40 / norm, rtol=1e-5)


@pytest.mark.parametrize("warmup", [0, 10])
def test_learning_rate(warmup):
    """A first step above zero, the peak after the warm-up, a tenth at the end."""
    settings = TrainSettings(steps=50, warmup_steps=warmup, learning_rate=0.5, weight_decay=0.0)
    optimizer, weight = make_optimizer(settings), jnp.zeros(())
    update, state, rates = jax.jit(optimizer.update), optimizer.init(weight), []
    for _ in range(51):  # Adam's update by a constant gradient is the learning rate itself
        change, state = update(jnp.ones(()), state, weight)
        rates.append(-float(change))
    assert rates[warmup] == pytest.approx(0.5, rel=1e-4)
    assert rates[-1] == pytest.approx(0.05, rel=1e-4)
    assert rates[0] == pytest.approx(0.5 / (warmup + 1), rel=1e-4)
    rising, falling = np.diff(rates[: warmup + 1]), np.diff(rates[warmup:])
    assert (rising > 0).all()
    assert (falling < 0).all()


def test_what_does_not_fit():
    mesh = make_mesh(4, 2)
    cases = [
        (CONFIG, {"batch": 6}, "batch=6 does not divide over data=4: use a multiple of 4"),
        (CONFIG, {"length": 33}, "length=33 is longer than the model's context, max_seq_len=32"),
        (CONFIG.replace(n_kv_heads=1), {}, "model=2 would train 2 copies of each of the 1 kv heads apart"),
    ]
    for config, changes, message in cases:
        with pytest.raises(TrainingError, match=re.escape(message)):
            check_trainable(config, dataclasses.replace(SETTINGS, **changes), mesh)
    with pytest.raises(MeshError, match="model=3 does not fit"):
        check_trainable(CONFIG, SETTINGS, make_mesh(1, 3))


def test_a_step_is_pure():
    """The same state and batch give the same bits, dropout included; the next step drops something else."""
    mesh, step = make_mesh(2, 4), compiled_step(CONFIG, SETTINGS, (2, 4))
    batch, state = put_batch(batch_of(1), mesh), random_state((2, 4))
    later = random_state((2, 4))._replace(step=jax.device_put(np.int32(1), state.step.sharding))
    losses = [float(step(s, batch)[1]["loss"]) for s in (state, random_state((2, 4)), later)]
    assert losses[0] == losses[1] != losses[2]
    assert state.weights.norm.is_deleted()  # donated
