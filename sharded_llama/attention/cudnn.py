"""Attention of whole sequences through cuDNN's fused kernels, by way of `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp

MAX_HEAD_DIM = 128  # 256 on Hopper and later, which no Llama needs; a head width must also be a multiple of 8


def supports(dtype: jnp.dtype, head_dim: int) -> bool:
    """Whether cuDNN has a kernel for this type and head width on NVIDIA GPUs from Ampere on."""
    return jnp.dtype(dtype) in (jnp.float16, jnp.bfloat16) and head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM


def prefill_attn(q_BLHK: jax.Array, k_BLGK: jax.Array, v_BLGK: jax.Array) -> jax.Array:
    """Causal attention of a prompt to itself, all rows starting at position 0. Returns (B, L, H, K)."""
    return jax.nn.dot_product_attention(q_BLHK, k_BLGK, v_BLGK, is_causal=True, implementation="cudnn")
