"""The kernel of a sum and its norm, interpreted, against plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharded_llama.fused.add_norm import add_norm, add_norm_reference


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("n_rows", "width"), [(1, 64), (5, 96), (17, 4096), (3, 5120)])
def test_equals_the_reference(dtype, n_rows, width):
    keys = jax.random.split(jax.random.key(n_rows), 3)
    h_TD, x_TD = (3 * jax.random.normal(key, (n_rows, width), dtype) for key in keys[:2])
    weight_D = jax.random.normal(keys[2], (width,), dtype)
    ours = add_norm(h_TD, x_TD, weight_D, 1e-5, interpret=True)
    theirs = add_norm_reference(h_TD, x_TD, weight_D, 1e-5)
    np.testing.assert_array_equal(np.float32(ours[0]), np.float32(theirs[0]))
    # A sum in another order moves a half type's value to its neighbour now and then.
    tolerance = 1e-6 if dtype == "float32" else 2 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.float32(ours[1]), np.float32(theirs[1]), rtol=tolerance, atol=1e-7)
    assert np.mean(np.float32(ours[1]) != np.float32(theirs[1])) < (1 if dtype == "float32" else 0.02)


def test_rows_that_overflow_stay_alone():
    h_TD = jnp.ones((3, 64), jnp.bfloat16).at[1, 7].set(jnp.inf)
    _, y_TD = add_norm(h_TD, jnp.ones_like(h_TD), jnp.ones(64, jnp.bfloat16), 1e-5, interpret=True)
    assert np.isnan(np.float32(y_TD)[1, 7])
    np.testing.assert_array_equal(np.float32(y_TD)[[0, 2]], 1)
