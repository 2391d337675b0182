"""A residual's sum and the norm that follows it as one kernel, for NVIDIA GPUs: Pallas in the Triton dialect."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..layers import rms_norm

BYTES_OF_WARP = 1 << 11  # of a row of float32 that one warp holds


def add_norm_reference(
    h_TD: jax.Array, x_TD: jax.Array | None, weight_D: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """h + x, and its norm (see `layers.rms_norm`), both (T, D) in h's type.

    x_TD: what a block adds to h; None: nothing.
    """
    h_TD = h_TD if x_TD is None else h_TD + x_TD
    return h_TD, rms_norm(h_TD, weight_D, eps)


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))  # traced and lowered once, not once per call
def add_norm(
    h_TD: jax.Array, x_TD: jax.Array, weight_D: jax.Array, eps: float, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """`add_norm_reference` in one kernel, a program for each row; half types and float32."""
    n_rows, width = h_TD.shape
    padded = 1 << (width - 1).bit_length()
    out = jax.ShapeDtypeStruct(h_TD.shape, h_TD.dtype)
    kernel = functools.partial(_add_norm, width=width, padded=padded, eps=eps)
    return pl.pallas_call(
        kernel,
        grid=(n_rows,),
        out_shape=(out, out),
        compiler_params=plgpu.CompilerParams(num_warps=max(1, min(16, 4 * padded // BYTES_OF_WARP)), num_stages=1),
        interpret=interpret,
        name="add_norm",
    )(weight_D, h_TD, x_TD)


def _add_norm(
    weight_ref: jax.Ref,  # (D,)
    h_ref: jax.Ref,  # (T, D)
    x_ref: jax.Ref,
    sum_ref: jax.Ref,
    norm_ref: jax.Ref,
    *,
    width: int,
    padded: int,
    eps: float,
) -> None:
    """One program: a row."""
    row, at_D = pl.program_id(0), jnp.arange(padded, dtype=jnp.int32)
    load = functools.partial(plgpu.load, mask=at_D < width, other=0) if padded != width else plgpu.load
    store = functools.partial(plgpu.store, mask=at_D < width) if padded != width else plgpu.store
    h_D = load(h_ref.at[row, at_D])
    h_D = (h_D.astype(jnp.float32) + load(x_ref.at[row, at_D]).astype(jnp.float32)).astype(h_D.dtype)
    store(sum_ref.at[row, at_D], h_D)
    y_D = h_D.astype(jnp.float32)
    y_D *= lax.rsqrt(jnp.sum(y_D * y_D) / width + eps)
    y_D = y_D.astype(h_D.dtype).astype(jnp.float32) * load(weight_ref.at[at_D]).astype(jnp.float32)
    store(norm_ref.at[row, at_D], y_D.astype(h_D.dtype))
