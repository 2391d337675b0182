"""Attention, chosen by backend: cuDNN where it has a kernel, plain JAX everywhere else."""

import jax

from ..config import LlamaConfig
from ..errors import ConfigError
from . import cudnn
from .reference import attention_weights, blockwise_attn, grouped_query_attn

BACKENDS = ("cudnn", "blockwise", "reference")

__all__ = ["BACKENDS", "attend", "attention_weights", "blockwise_attn", "choose_backend", "grouped_query_attn"]


def choose_backend(config: LlamaConfig, device: jax.Device, requested: str | None = None) -> str:
    """The attention backend of a model on devices like `device`, once and for all its steps.

    Raises ConfigError when `requested` is unknown or cannot run this model.
    """
    capability = getattr(device, "compute_capability", "9.0")
    fits_cudnn = device.platform == "gpu" and cudnn.supports(config.jnp_dtype, config.head_dim, capability)
    if requested is None:
        return "cudnn" if fits_cudnn else "blockwise"
    if requested not in BACKENDS:
        raise ConfigError(f"attention backend {requested!r} is not one of {', '.join(BACKENDS)}.")
    if requested == "cudnn" and not fits_cudnn:
        raise ConfigError(
            f"cuDNN attention needs an NVIDIA GPU (Ampere or later), float16 or bfloat16 and a head width that is a "
            f"multiple of 8 up to {cudnn.MAX_HEAD_DIM} (128 before Hopper); here: {device.device_kind}, "
            f"{config.dtype}, {config.head_dim}."
        )
    return requested


def attend(
    backend: str,
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    q_pos_BL: jax.Array,
    *,
    from_zero: bool,
) -> jax.Array:
    """Causal attention of one device's heads. Returns (B, L, H, K).

    Key j is at position j; a query sees keys up to its own position. `from_zero` says (statically) that k and v
    are the step's own tokens and every row starts at position 0.
    """
    if backend == "cudnn" and from_zero:
        return cudnn.prefill_attn(q_BLHK, k_BSGK, v_BSGK)
    if backend == "cudnn" and q_BLHK.shape[1] == 1:
        return cudnn.decode_attn(q_BLHK, k_BSGK, v_BSGK, q_pos_BL)
    if backend == "reference":
        return grouped_query_attn(q_BLHK, k_BSGK, v_BSGK, q_pos_BL)
    # Chunks that continue a cached prompt come here on every platform: cuDNN has no causal mask with an offset.
    return blockwise_attn(q_BLHK, k_BSGK, v_BSGK, q_pos_BL)
