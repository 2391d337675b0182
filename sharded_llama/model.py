"""The forward pass over the mesh. `xfmr` is the one `shard_map`; everything below it is one device's part.

Each layer communicates twice: one `psum` over `model` after attention and one after the MLP. The embedding adds
one, because the vocabulary is split too. No weight ever moves.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from .attention import attend, choose_backend
from .config import LlamaConfig
from .kv_cache import KVCache
from .layers import Probe, apply_rotary_emb, dot, feed_forward, project_qkv, rms_norm, rope_angles, unprobed
from .mesh import check_mesh
from .sharding import DATA, MODEL, SPECS
from .weights import LayerWeights, XfmrWeights


class Dropout(NamedTuple):
    """Dropout of a training step: each residual branch and the embedding, with the mask of a row's own key."""

    rate: float
    key: jax.Array


def xfmr(
    weights: XfmrWeights,
    config: LlamaConfig,
    tokens_BL: jax.Array,
    cur_pos_B: jax.Array | None = None,
    kv_cache: tuple[KVCache, ...] | None = None,
    *,
    mesh: Mesh,
    logits_at_B: jax.Array | None = None,
    first_row: jax.Array | int = 0,
    backend: str | None = None,
    dropout: Dropout | None = None,
) -> tuple[jax.Array, tuple[KVCache, ...] | None]:
    """Logits of `tokens_BL`, and the cache with them written into it. Pure; call it under `jax.jit`.

    Args:
      weights: from `init_weights` or a checkpoint, laid out for `mesh`.
      tokens_BL: int32; B a multiple of the mesh's data size. Rows may be padded on the right.
      cur_pos_B: int32, the position of each row's first token, which attends to the cache before it. None: all
        rows start at position 0 and attend to one another's own tokens only, which is the fast way to prefill.
      kv_cache: one per layer, or None to run without one (training, scoring); then cur_pos_B must be None.
      logits_at_B: index into L; only this token's logits are computed for each row.
      first_row: with cur_pos_B=None, the first row of each data shard's cache that is written (the rows after it
        follow); the batch may be smaller than the cache's.
      backend: attention backend; default: chosen from the model and the mesh's platform.
      dropout: for training.

    Returns:
      logits (B, L, V'), or (B, V') with logits_at_B: float32 (float64 for a float64 model), V' the vocabulary padded
      to a multiple of the model size, -inf in the padding; and the updated caches (None without).
    """
    check_mesh(config, mesh)
    if kv_cache is None and cur_pos_B is not None:
        raise ValueError("cur_pos_B needs a kv_cache: without one every row starts at position 0")
    backend = choose_backend(config, mesh.devices.flat[0], backend)
    optional = {
        "cur_pos_B": (cur_pos_B, SPECS["tokens"]),
        "kv_cache": (kv_cache, SPECS["kv_cache"]),
        "logits_at_B": (logits_at_B, SPECS["tokens"]),
        "dropout_key": (None if dropout is None else dropout.key, SPECS["replicated"]),
    }
    given = {name: array for name, (array, _) in optional.items() if array is not None}
    # Only arrays pass through shard_map; what is absent stays absent.
    in_specs = (
        _weight_pspecs(weights),
        SPECS["tokens"],
        SPECS["replicated"],
        {name: spec for name, (_, spec) in optional.items() if name in given},
    )
    logits_spec = SPECS["logits"] if logits_at_B is None else SPECS["last_logits"]
    out_specs = (logits_spec, None if kv_cache is None else SPECS["kv_cache"])
    run = functools.partial(_forward, config=config, backend=backend, dropout_rate=dropout.rate if dropout else 0.0)
    # cuDNN's custom call does not say over which axes its result varies, so the check has to be off there.
    sharded = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=backend != "cudnn")
    return sharded(weights, tokens_BL, jnp.asarray(first_row, jnp.int32), given)


LAYER_PSPECS = LayerWeights(
    attention_norm=SPECS["norm"],
    wqkv=SPECS["wqkv"],
    wo=SPECS["wo"],
    ffn_norm=SPECS["norm"],
    w13=SPECS["w13"],
    w2=SPECS["w2"],
)


def _weight_pspecs(weights: XfmrWeights) -> XfmrWeights:
    return XfmrWeights(
        tok_embeddings=SPECS["tok_embeddings"],
        layers=(LAYER_PSPECS,) * len(weights.layers),
        norm=SPECS["norm"],
        output=None if weights.output is None else SPECS["output"],
    )


def _forward(
    weights: XfmrWeights,
    tokens_BL: jax.Array,
    first_row: jax.Array,
    given: dict[str, jax.Array | tuple[KVCache, ...]],
    *,
    config: LlamaConfig,
    backend: str,
    dropout_rate: float,
) -> tuple[jax.Array, tuple[KVCache, ...] | None]:
    """One device's forward pass; the letters mean its local part."""
    cur_pos_B, caches = given.get("cur_pos_B"), given.get("kv_cache")
    dropout = Dropout(dropout_rate, given["dropout_key"]) if "dropout_key" in given else None
    rotary = rotary_positions(config, tokens_BL.shape, cur_pos_B)

    with jax.named_scope("embedding"):
        h_BLD = embed(weights.tok_embeddings, tokens_BL)
    h_BLD = _drop(h_BLD, dropout, 0)

    new_caches = []
    for i, layer_weights in enumerate(weights.layers):
        h_BLD, cache = _layer(
            layer_weights,
            h_BLD,
            rotary,
            None if caches is None else caches[i],
            cur_pos_B,
            first_row,
            None if dropout is None else dropout.key,
            jnp.int32(i),
            config=config,
            backend=backend,
            dropout_rate=dropout_rate,
        )
        new_caches.append(cache)

    if "logits_at_B" in given:
        h_BLD = jnp.take_along_axis(h_BLD, given["logits_at_B"][:, None, None], axis=1)[:, 0]
    with jax.named_scope("logits"):
        logits = head(h_BLD, weights.norm, weights.tok_embeddings if weights.output is None else weights.output, config)
    return logits, None if caches is None else tuple(new_caches)


def rotary_positions(
    config: LlamaConfig, shape: tuple[int, int], cur_pos_B: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Positions (B, L) of a step's tokens, and cos and sin (B, L, K/2) of their rotary angles."""
    positions_BL = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    if cur_pos_B is not None:
        positions_BL = positions_BL + cur_pos_B[:, None]
    return positions_BL, *rope_angles(config, positions_BL)


def transformer_layer(
    w: LayerWeights,
    h_BLD: jax.Array,
    rotary: tuple[jax.Array, jax.Array, jax.Array],
    cache: KVCache | None,
    cur_pos_B: jax.Array | None,
    first_row: jax.Array | int,
    dropout_key: jax.Array | None,
    layer: jax.Array | int,
    *,
    config: LlamaConfig,
    backend: str,
    dropout_rate: float = 0.0,
    probe: Probe = unprobed,
) -> tuple[jax.Array, KVCache | None]:
    """One device's part of a layer: h (B, L, D) to h (B, L, D), and the updated cache.

    `rotary` comes from `rotary_positions`; the other arguments are those of `xfmr`. `probe` is given every component
    that has a name in `parity.components`.
    """
    positions_BL, cos, sin = rotary
    dropout = None if dropout_key is None else Dropout(dropout_rate, dropout_key)

    with jax.named_scope("attention"):
        x_BLD = probe("attention_norm", rms_norm(h_BLD, w.attention_norm, config.norm_eps))
        q_BLHK, k_BLGK, v_BLGK = project_qkv(x_BLD, w.wqkv)
        q_BLHK, k_BLGK, v_BLGK = probe("q", q_BLHK), probe("k", k_BLGK), probe("v", v_BLGK)
        q_BLHK = probe("q_rotated", apply_rotary_emb(q_BLHK, cos, sin))
        k_BLGK = probe("k_rotated", apply_rotary_emb(k_BLGK, cos, sin))
        if cache is not None:
            cache = cache.update(k_BLGK, v_BLGK, cur_pos_B, first_row)
        from_zero = cur_pos_B is None
        keys, values = (k_BLGK, v_BLGK) if from_zero else cache
        attn_BLHK = probe("attn", attend(backend, q_BLHK, keys, values, positions_BL, from_zero=from_zero))
        attn_BLD = probe("attn_wo", jax.lax.psum(dot("...hk,dhk->...d", attn_BLHK, w.wo), MODEL))
        h_BLD = probe("attn_residual", h_BLD + _drop(attn_BLD, dropout, 2 * layer + 1))

    with jax.named_scope("feed_forward"):
        x_BLD = probe("ffn_norm", rms_norm(h_BLD, w.ffn_norm, config.norm_eps))
        down_BLD = probe("down", jax.lax.psum(feed_forward(x_BLD, w.w13, w.w2, probe), MODEL))
        h_BLD = probe("ffn_residual", h_BLD + _drop(down_BLD, dropout, 2 * layer + 2))
    return h_BLD, cache


# One jitted function for all layers: it is traced once, not once per layer, and inlined by the compiler.
_layer = jax.jit(transformer_layer, static_argnames=("config", "backend", "dropout_rate"))


def embed(tok_embeddings_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """Each shard looks up the tokens of its part of the vocabulary; the others contribute zero."""
    n_local = tok_embeddings_VD.shape[0]
    local_BL = tokens_BL - jax.lax.axis_index(MODEL) * n_local
    mine_BL = (local_BL >= 0) & (local_BL < n_local)
    x_BLD = tok_embeddings_VD[jnp.clip(local_BL, 0, n_local - 1)]
    return jax.lax.psum(jnp.where(mine_BL[..., None], x_BLD, 0), MODEL)


def head(
    h: jax.Array, norm_D: jax.Array, output_VD: jax.Array, config: LlamaConfig, probe: Probe = unprobed
) -> jax.Array:
    """h (.., D) to this shard's logits (.., V), -inf for the padding of the vocabulary."""
    x = probe("norm", rms_norm(h, norm_D, config.norm_eps))
    acc = jnp.promote_types(x.dtype, jnp.float32)
    logits = dot("...d,vd->...v", x, output_VD, out_dtype=acc)
    ids_V = jax.lax.axis_index(MODEL) * output_VD.shape[0] + jnp.arange(output_VD.shape[0])
    return jnp.where(ids_V < config.vocab_size, logits, -jnp.inf)


def _drop(x_BLD: jax.Array, dropout: Dropout | None, site: jax.Array | int) -> jax.Array:
    """Dropout whose mask is a function of the key, the site and the row of the global batch: equal on all `model`
    shards, different for every row and so over `data`, and the same on every mesh."""
    if dropout is None:
        return x_BLD
    batch = x_BLD.shape[0]
    rows_B = jax.lax.axis_index(DATA) * batch + jnp.arange(batch)
    key = jax.random.fold_in(dropout.key, site)
    keep = 1.0 - dropout.rate
    mask_BLD = jax.vmap(lambda row: jax.random.bernoulli(jax.random.fold_in(key, row), keep, x_BLD.shape[1:]))(rows_B)
    return jnp.where(mask_BLD, x_BLD / keep, 0).astype(x_BLD.dtype)
