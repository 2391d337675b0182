"""Attention through cuDNN's fused kernels (NVIDIA GPUs, half precision), by way of `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp

MAX_HEAD_DIM = 256  # on Hopper, 128 before; a head width must also be a multiple of 8


def supports(dtype: jnp.dtype, head_dim: int, capability: str = "9.0") -> bool:
    """Whether cuDNN has a kernel for this type and head width on a GPU of this compute capability (Ampere is 8.0)."""
    try:
        generation = float(capability)
    except ValueError:  # AMD's are names such as gfx942
        return False
    widest = MAX_HEAD_DIM if generation >= 9 else 128
    half = jnp.dtype(dtype) in (jnp.float16, jnp.bfloat16)
    return half and generation >= 8 and head_dim % 8 == 0 and head_dim <= widest


def prefill_attn(q_BLHK: jax.Array, k_BLGK: jax.Array, v_BLGK: jax.Array) -> jax.Array:
    """Causal attention of a prompt to itself, all rows starting at position 0. Returns (B, L, H, K)."""
    return jax.nn.dot_product_attention(q_BLHK, k_BLGK, v_BLGK, is_causal=True, implementation="cudnn")


def decode_attn(q_B1HK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, q_pos_B1: jax.Array) -> jax.Array:
    """Attention of one new token per row to the cache up to and including its own position. Returns (B, 1, H, K)."""
    lengths_B = q_pos_B1[:, 0] + 1
    return jax.nn.dot_product_attention(
        q_B1HK,
        k_BSGK,
        v_BSGK,
        query_seq_lengths=jnp.ones_like(lengths_B),
        key_value_seq_lengths=lengths_B,
        implementation="cudnn",
    )
