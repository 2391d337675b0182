"""The randomness of sampling: a function of seed, position and token id, and of nothing else.

The token with the largest sum of logit and Gumbel noise is a draw from the softmax of the logits. Because a token's
noise does not depend on which other tokens are there, the draw among some of them is the largest sum among those.
"""

import jax
import jax.numpy as jnp


def gumbel(seed_R2: jax.Array, position_R: jax.Array, ids_RV: jax.Array, draw: int = 0) -> jax.Array:
    """Gumbel noise (R, V), float32, of each row's tokens `ids_RV` at its position. Seeds: uint32, high and low word.

    draw: which of several independent draws at one position.
    """

    def of_row(seed_2: jax.Array, position: jax.Array, ids_V: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed_2, impl="threefry2x32"), position)
        if draw:
            key = jax.random.fold_in(key, 2**32 - draw)  # no token has such an id
        # The words of a key folded with an id are a hash of all three.
        return jax.random.key_data(jax.vmap(lambda i: jax.random.fold_in(key, i))(ids_V))[:, 0]

    bits_RV = jax.vmap(of_row)(seed_R2, position_R, ids_RV)
    # Uniform in (0, 1), finest at 0, so that the largest noise, which decides, is resolved to 2**-32.
    uniform_RV = jnp.minimum((bits_RV.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform_RV))
