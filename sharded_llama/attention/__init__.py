"""Attention, chosen by backend: kernels where there are some, plain JAX everywhere else."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from ..config import LlamaConfig
from ..errors import ConfigError
from ..kv_cache import KVPages
from ..sharding import kv_head_layout
from . import cudnn, paged_tpu
from .paged import paged_attn_blockwise, paged_attn_reference
from .paged_gpu import MIN_TILE, paged_attn_gpu, paged_rows_gpu
from .reference import attention_weights, blockwise_attn, grouped_query_attn

# "gpu": cuDNN for whole sequences and our kernel over pages; "tpu": a kernel over pages.
BACKENDS = ("gpu", "tpu", "blockwise", "reference")

__all__ = [
    "BACKENDS",
    "Runs",
    "attend",
    "attend_pages",
    "attention_weights",
    "blockwise_attn",
    "choose_backend",
    "grouped_query_attn",
    "paged_attn_blockwise",
    "paged_attn_reference",
    "run_length",
]


def _paged_attn_tpu(q_BLHK: jax.Array, pages: KVPages, tables_BW: jax.Array, start_B: jax.Array) -> jax.Array:
    """The TPU kernel where it can serve the shapes, which are static; else plain JAX."""
    kv, heads = pages.kv_NPGK, q_BLHK.shape[2]
    why_not = paged_tpu.supports(
        q_BLHK.dtype, kv.dtype, heads, kv.shape[2] // 2, kv.shape[3], kv.shape[1], *tables_BW.shape
    )
    if why_not is None:
        return paged_tpu.paged_attn_tpu(q_BLHK, pages, tables_BW, start_B)
    logging.log_first_n(logging.INFO, "attention in plain JAX: %s", 1, why_not)
    return paged_attn_blockwise(q_BLHK, pages, tables_BW, start_B)


_KERNELS = {
    "gpu": paged_attn_gpu,
    "tpu": _paged_attn_tpu,
    "blockwise": paged_attn_blockwise,
    "reference": paged_attn_reference,
}


def choose_backend(config: LlamaConfig, device: jax.Device, requested: str | None = None) -> str:
    """The attention backend of a model on devices like `device`, once and for all its steps.

    Raises ConfigError when `requested` is unknown or cannot run this model.
    """
    fits = {"gpu": _fits_gpu(config, device), "tpu": device.platform == "tpu" and config.dtype != "float64"}
    if requested is None:
        return next((backend for backend, good in fits.items() if good), "blockwise")
    if requested not in BACKENDS:
        raise ConfigError(f"attention backend {requested!r} is not one of {', '.join(BACKENDS)}.")
    if not fits.get(requested, True):
        needs = "an NVIDIA GPU (Ampere or later)" if requested == "gpu" else "a TPU"
        raise ConfigError(
            f"attention={requested!r} needs {needs} and a type other than float64; here: {device.device_kind}, "
            f"{config.dtype}. {', '.join(BACKENDS[2:])} run everywhere."
        )
    return requested


def _fits_gpu(config: LlamaConfig, device: jax.Device) -> bool:
    if device.platform != "gpu" or config.dtype == "float64" or config.head_dim % 8:
        return False
    try:
        return float(getattr(device, "compute_capability", "0")) >= 8
    except ValueError:  # AMD's are names such as gfx942
        return False


def attend(backend: str, q_BLHK: jax.Array, k_BLGK: jax.Array, v_BLGK: jax.Array) -> jax.Array:
    """Causal attention of whole sequences to themselves, on one device's heads. Returns (B, L, H, K)."""
    if backend == "gpu" and cudnn.supports(q_BLHK.dtype, q_BLHK.shape[-1]):
        return cudnn.prefill_attn(q_BLHK, k_BLGK, v_BLGK)
    positions_BL = jnp.broadcast_to(jnp.arange(q_BLHK.shape[1]), q_BLHK.shape[:2])
    dense = grouped_query_attn if backend == "reference" else blockwise_attn
    return dense(q_BLHK, k_BLGK, v_BLGK, positions_BL)


class Runs(NamedTuple):
    """Which tokens of a step attention takes together: consecutive ones of a sequence. There are at most T runs."""

    token_RL: jax.Array  # int32, the tokens of each run
    run_T: jax.Array  # int32, each token's run
    place_T: jax.Array  # int32, its place in it


def run_length(backend: str, config: LlamaConfig, model: int) -> int:
    """How many consecutive tokens of a sequence a kernel takes at the price of one, on `model` shards."""
    _, heads_per_kv_head = kv_head_layout(config, model)
    return max(1, MIN_TILE // heads_per_kv_head) if backend == "gpu" else 1


def attend_pages(
    backend: str,
    q_THK: jax.Array,
    pages: KVPages,
    tables_RW: jax.Array,
    start_R: jax.Array,
    n_single: int,
    runs: Runs | None = None,
    used_R: jax.Array | None = None,
) -> jax.Array:
    """Attention of a step's tokens (see `model.StepRows`) to the pages of their rows, or runs. Returns (T, H, K).

    used_R: bool, the rows whose results are looked at. Default: all.
    """
    kernel = _KERNELS[backend]
    if runs is not None:
        # Where a token stands in its run must not change a bit: the GPU kernel splits at fixed positions.
        kernel = functools.partial(paged_attn_gpu, fixed_splits=True) if backend == "gpu" else kernel
        return kernel(q_THK[runs.token_RL], pages, tables_RW, start_R)[runs.run_T, runs.place_T]
    if backend == "gpu":
        return paged_rows_gpu(q_THK, pages, tables_RW, start_R, n_single)

    def of_rows(rows: slice, q_THK: jax.Array) -> jax.Array:
        tables_BW, start_B = tables_RW[rows], start_R[rows]
        q_BLHK = q_THK.reshape(len(start_B), -1, *q_THK.shape[1:])
        if backend == "blockwise" and used_R is not None:
            start_B = jnp.where(used_R[rows], start_B, -q_BLHK.shape[1])
        return kernel(q_BLHK, pages, tables_BW, start_B).reshape(q_THK.shape)

    singles = [of_rows(slice(n_single), q_THK[:n_single])] if n_single else []
    chunks = [of_rows(slice(n_single, None), q_THK[n_single:])] if len(start_R) > n_single else []
    return jnp.concatenate(singles + chunks) if singles and chunks else (singles or chunks)[0]
