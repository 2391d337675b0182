"""The forward pass over the mesh: `xfmr` for whole sequences, `xfmr_step` over the paged cache.

Both are one `shard_map` around the same layers; everything below them is one device's part. Each layer communicates
twice: one `psum` over `model` after attention and one after the MLP. The embedding adds one, because the vocabulary is
split too. No weight ever moves.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from .attention import Runs, attend, attend_pages, choose_backend
from .attention.metrics import attention_metrics
from .attention.scores_gpu import paged_scores
from .config import LlamaConfig
from .fused import swiglu as swiglu_kernel  # to import it also registers what runs it, for steps from the disk
from .fused.add_norm import add_norm, add_norm_reference
from .fused.rotate_write import rotate_write
from .kv_cache import KVPages
from .layers import (
    Probe,
    apply_rotary_emb,
    linear,
    project_qkv,
    rms_norm,
    rope_angles,
    split_qkv,
    swiglu,
    unprobed,
)
from .mesh import check_mesh, hopper_processors
from .sharding import DATA, MODEL, SPECS, local_ids
from .weights import LayerWeights, XfmrWeights


class Dropout(NamedTuple):
    """Dropout of a training step: each residual branch and the embedding, with the mask of a row's own key."""

    rate: float
    key: jax.Array


class StepRows(NamedTuple):
    """What one step runs: R rows of tokens, on each data shard B rows of one token and then C rows of up to Q tokens.

    The tokens of a shard are flat, T = B + C Q: first those of the B rows, then Q for each of the C rows.
    """

    tokens_T: jax.Array  # int32
    start_R: jax.Array  # int32, the position of each row's first token
    length_R: jax.Array  # int32, how many of its tokens are real; 0: the row is not used
    tables_RW: jax.Array  # int32, the pages of each row's sequence, numbered within the data shard's pool
    # int32, only where all rows have one token: a row's number within its run, the rows of consecutive tokens of one
    # sequence that attention takes together. None: every row for itself.
    run_place_R: jax.Array | None = None
    # int32, the rows whose logits are wanted; beyond the rows: some row's, which nobody looks at. None: all rows.
    chosen_E: jax.Array | None = None


class RowPlaces(NamedTuple):
    """One device's view of `StepRows` for attention."""

    at_T: jax.Array  # int32, where each token's key and value go in the pages; beyond the pool: nowhere
    start_R: jax.Array  # of the rows, or of the runs
    tables_RW: jax.Array
    runs: Runs | None = None
    used_R: jax.Array | None = None  # bool; None: as far as is known all


def xfmr(
    weights: XfmrWeights,
    config: LlamaConfig,
    tokens_BL: jax.Array,
    *,
    mesh: Mesh,
    backend: str | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Logits of whole sequences, which start at position 0 and keep nothing: training and scoring. Pure; jit it.

    Args:
      weights: from `init_weights` or a checkpoint, laid out for `mesh`.
      tokens_BL: int32; B a multiple of the mesh's data size. Rows may be padded on the right.
      backend: attention backend; default: chosen from the model and the mesh's platform.
      dropout: for training.

    Returns logits (B, L, V'): float32 (float64 for a float64 model), V' the vocabulary padded to a multiple of the
    model size, -inf in the padding.
    """
    check_mesh(config, mesh)
    backend = choose_backend(config, mesh.devices.flat[0], backend)
    run = functools.partial(_forward, config=config, backend=backend, dropout_rate=dropout.rate if dropout else 0.0)
    sharded = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(_weight_pspecs(weights), SPECS["tokens"], None if dropout is None else SPECS["replicated"]),
        out_specs=SPECS["logits"],
        check_vma=check_vma(backend),
    )
    return sharded(weights, tokens_BL, None if dropout is None else dropout.key)


def xfmr_step(
    weights: XfmrWeights,
    config: LlamaConfig,
    rows: StepRows,
    pages: tuple[KVPages, ...],
    *,
    mesh: Mesh,
    n_single: int,
    run_length: int = 1,
    backend: str | None = None,
    all_logits: bool = False,
    with_metrics: bool = False,
) -> tuple[jax.Array, tuple[KVPages, ...]] | tuple[jax.Array, tuple[KVPages, ...], jax.Array]:
    """Logits of a step's rows, and the pages with its tokens written into them. Pure; call it under `jax.jit`.

    Every token attends to the pages of its row up to its own position: to what was there, and to the tokens before it
    in this step, whichever row of it they stand in. So a chunk of a prompt may span several rows, and decoding,
    chunks of prompts and checking of drafts are the same function of different shapes.

    Args:
      weights: laid out for `mesh`.
      rows: global arrays; each data shard has its own part and its own pool.
      pages: one per layer.
      n_single: B, the rows of one token on each data shard.
      run_length: rows in a run at most, where rows.run_place_R says which there are.
      backend: attention backend; default: chosen from the model and the mesh's platform.
      all_logits: give the logits of all tokens, not only of each row's last.
      with_metrics: also give the metrics of the last layer's attention at each of these rows' last token (R, 4), see
        `attention.metrics`.

    Returns logits (R, V') of each row's last token, of the rows that rows.chosen_E names or of all, or (T, V'): float32
    (float64 for a float64 model), -inf in the padding of the vocabulary; and the updated pages. What comes out for
    padding and unused rows means nothing.
    """
    check_mesh(config, mesh)
    backend = choose_backend(config, mesh.devices.flat[0], backend)
    run = functools.partial(
        _forward_step,
        config=config,
        backend=backend,
        hopper_processors=hopper_processors(mesh.devices.flat[0]),
        n_single=n_single,
        run_length=run_length,
        all_logits=all_logits,
        with_metrics=with_metrics,
    )
    row_specs = jax.tree.map(lambda _: SPECS["tokens"], rows)
    sharded = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(_weight_pspecs(weights), row_specs, SPECS["kv_pages"]),
        out_specs=(SPECS["last_logits"], SPECS["kv_pages"], *([SPECS["tokens"]] if with_metrics else [])),
        check_vma=check_vma(backend),
    )
    return sharded(weights, rows, pages)


def check_vma(backend: str) -> bool:
    """Custom calls do not say over which axes their results vary, so the check has to be off with them."""
    return backend not in ("gpu", "tpu")


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
    dropout_key: jax.Array | None,
    *,
    config: LlamaConfig,
    backend: str,
    dropout_rate: float,
) -> jax.Array:
    """One device's part of `xfmr`; the letters mean its local part."""
    dropout = None if dropout_key is None else Dropout(dropout_rate, dropout_key)
    rotary = rope_angles(config, jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape))
    with jax.named_scope("embedding"):
        h_BLD = _drop(embed(weights.tok_embeddings, tokens_BL), dropout, 0)
    for i, layer_weights in enumerate(weights.layers):
        h_BLD, *_ = _layer(
            layer_weights,
            h_BLD,
            rotary,
            dropout_key=dropout_key,
            layer=jnp.int32(i),
            config=config,
            backend=backend,
            dropout_rate=dropout_rate,
        )
    return _logits(weights, h_BLD, config)


def _forward_step(
    weights: XfmrWeights,
    rows: StepRows,
    pages: tuple[KVPages, ...],
    *,
    config: LlamaConfig,
    backend: str,
    hopper_processors: int,
    n_single: int,
    run_length: int,
    all_logits: bool,
    with_metrics: bool,
) -> tuple[jax.Array, ...]:
    """One device's part of `xfmr_step`; the letters mean its local part."""
    n_pages, page_size = pages[0].kv_NPGK.shape[:2]
    positions_T, places = row_places(rows, n_single, n_pages, page_size, run_length)
    rotary = rope_angles(config, positions_T)
    with jax.named_scope("embedding"):
        h_TD, added = embedding_part(weights.tok_embeddings, rows.tokens_T), None
        if backend == "gpu":  # like what a layer leaves: so the first one is traced and compiled as the others are
            h_TD, added = jnp.zeros_like(h_TD), h_TD
        else:
            h_TD = jax.lax.psum(h_TD, MODEL)
    new_pages, metrics, seen = [], [], {}

    def see(name: str, x: jax.Array) -> jax.Array:
        return seen.setdefault(name, x)

    last_R = last_tokens(rows, n_single)  # R from here on: rows whose logits are wanted
    for i, (layer_weights, layer_pages) in enumerate(zip(weights.layers, pages, strict=True)):
        args = (layer_weights, h_TD, rotary, layer_pages, places, added)
        static = {"config": config, "backend": backend, "n_single": n_single, "hopper_processors": hopper_processors}
        if with_metrics and i == len(pages) - 1:
            h_TD, layer_pages, added = transformer_layer(*args, **static, probe=see)
            live_R = _chosen(jnp.where(rows.length_R > 0, rows.start_R + rows.length_R, 0), rows)
            kernel = paged_scores if backend == "gpu" else None
            tables_RW = _chosen(rows.tables_RW, rows)
            metrics = [attention_metrics(seen["q_rotated"][last_R], layer_pages, tables_RW, live_R, kernel)]
        else:
            h_TD, layer_pages, added = _layer(*args, **static)
        new_pages.append(layer_pages)
    if not all_logits:
        h_TD, added = h_TD[last_R], None if added is None else added[last_R]
    if added is not None:
        h_TD = h_TD + jax.lax.psum(added, MODEL)
    return _logits(weights, h_TD, config), tuple(new_pages), *metrics


def _logits(weights: XfmrWeights, h: jax.Array, config: LlamaConfig) -> jax.Array:
    with jax.named_scope("logits"):
        return head(h, weights.norm, weights.tok_embeddings if weights.output is None else weights.output, config)


def last_tokens(rows: StepRows, n_single: int) -> jax.Array:
    """Index (R,) into T of the last real token of each row whose logits are wanted."""
    return _chosen(_first_tokens(rows, n_single) + jnp.maximum(rows.length_R - 1, 0), rows)


def _chosen(of_rows: jax.Array, rows: StepRows) -> jax.Array:
    """What is known of each row (R, ..), for those whose logits are wanted."""
    return of_rows if rows.chosen_E is None else of_rows.at[rows.chosen_E].get(mode="clip")


def _first_tokens(rows: StepRows, n_single: int) -> jax.Array:
    """Index (R,) into T of each row's first token."""
    n_rows, n_tokens = rows.start_R.shape[0], rows.tokens_T.shape[0]
    width = (n_tokens - n_single) // max(1, n_rows - n_single)
    row_R = jnp.arange(n_rows)
    return jnp.where(row_R < n_single, row_R, n_single + (row_R - n_single) * width)


def row_places(
    rows: StepRows, n_single: int, n_pages: int, page_size: int, run_length: int = 1
) -> tuple[jax.Array, RowPlaces]:
    """Positions (T,) of a step's tokens on one device, and where their keys and values go."""
    first_R = _first_tokens(rows, n_single)
    n_rows, n_tokens = first_R.shape[0], rows.tokens_T.shape[0]
    width = (n_tokens - n_single) // max(1, n_rows - n_single)
    token_T = jnp.arange(n_tokens)
    row_T = jnp.where(token_T < n_single, token_T, n_single + (token_T - n_single) // max(1, width))
    offset_T = token_T - first_R[row_T]
    positions_T = rows.start_R[row_T] + offset_T
    # A position beyond the table finds no page, like one whose page the table does not have yet.
    page_T = rows.tables_RW.at[row_T, positions_T // page_size].get(mode="fill", fill_value=n_pages)
    real_T = (offset_T < rows.length_R[row_T]) & (page_T < n_pages)
    at_T = jnp.where(real_T, page_T * page_size + positions_T % page_size, n_pages * page_size)
    if rows.run_place_R is None:
        return positions_T, RowPlaces(at_T, rows.start_R, rows.tables_RW, used_R=rows.length_R > 0)
    place_R = rows.run_place_R
    run_R = jnp.cumsum(place_R == 0) - 1
    token_RL = jnp.zeros((n_rows, run_length), jnp.int32).at[run_R, place_R].set(token_T)
    start_R = jnp.zeros_like(rows.start_R).at[run_R].set(rows.start_R - place_R)
    return positions_T, RowPlaces(at_T, start_R, rows.tables_RW[token_RL[:, 0]], Runs(token_RL, run_R, place_R))


def transformer_layer(
    w: LayerWeights,
    h: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    pages: KVPages | None = None,
    places: RowPlaces | None = None,
    added: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    layer: jax.Array | int = 0,
    *,
    config: LlamaConfig,
    backend: str,
    hopper_processors: int = 0,
    n_single: int = 0,
    dropout_rate: float = 0.0,
    probe: Probe = unprobed,
) -> tuple[jax.Array, KVPages | None, jax.Array | None]:
    """One device's part of a layer: h (.., D) to h (.., D), the updated pages, and what is yet to be added to h.

    Without pages h is (B, L, D), whole sequences that attend to themselves; with pages it is (T, D), the tokens of a
    step, and `places` and `n_single` say of which rows. `rotary` is cos and sin (.., K/2) of the tokens' positions.
    `added` is what the layer before left to be added, this shard's part of it: kernels that fuse the sums with the norm
    take it from there.
    `hopper_processors`: see `mesh.hopper_processors`; 0: kernels for that generation are not used.
    `probe` is given every component that has a name in `parity.components`.
    """
    dropout = None if dropout_key is None else Dropout(dropout_rate, dropout_key)
    fused = backend == "gpu" and probe is unprobed and pages is not None

    def sum_norm(h: jax.Array, part: jax.Array | None, weight_D: jax.Array) -> tuple[jax.Array, jax.Array]:
        """h with what the shards' parts add to it, and its norm."""
        added = None if part is None else jax.lax.psum(part, MODEL)
        return (add_norm if fused else add_norm_reference)(h, added, weight_D, config.norm_eps)

    with jax.named_scope("attention"):
        h, x = sum_norm(h, added, w.attention_norm)
        x = probe("attention_norm", x)
        qkv = project_qkv(x, w.wqkv)
        if fused and pages.kv_NPGK.dtype == qkv.dtype:
            q_HK, pages = rotate_write(qkv, *rotary, pages, places.at_T)
        else:
            q_HK, k_GK, v_GK = map(probe, "qkv", split_qkv(qkv))
            q_HK = probe("q_rotated", apply_rotary_emb(q_HK, *rotary))
            k_GK = probe("k_rotated", apply_rotary_emb(k_GK, *rotary))
            pages = None if pages is None else pages.write(k_GK, v_GK, places.at_T)
        if pages is None:
            attn_HK = attend(backend, q_HK, k_GK, v_GK)
        else:
            _, start_R, tables_RW, runs, used_R = places
            attn_HK = attend_pages(backend, q_HK, pages, tables_RW, start_R, n_single, runs, used_R)
        attn_HK = probe("attn", attn_HK)
        attn = linear(attn_HK, w.wo, n_inputs=2)

    with jax.named_scope("feed_forward"):
        if fused:
            h, x = sum_norm(h, attn, w.ffn_norm)
            in_kernel = hopper_processors and swiglu_kernel.fits(x, w.w13)
            activation = swiglu_kernel.swiglu_gpu(x, w.w13, hopper_processors) if in_kernel else swiglu(x, w.w13)
            return h, pages, linear(activation, w.w2)
        attn = probe("attn_wo", jax.lax.psum(attn, MODEL))
        h = probe("attn_residual", h + _drop(attn, dropout, 2 * layer + 1))
        x = probe("ffn_norm", rms_norm(h, w.ffn_norm, config.norm_eps))
        down = probe("down", jax.lax.psum(linear(swiglu(x, w.w13, probe), w.w2), MODEL))
        return probe("ffn_residual", h + _drop(down, dropout, 2 * layer + 2)), pages, None


# One jitted function for all layers: it is traced once, not once per layer, and inlined by the compiler.
_layer = jax.jit(
    transformer_layer, static_argnames=("config", "backend", "n_single", "hopper_processors", "dropout_rate")
)


def embed(tok_embeddings_VD: jax.Array, tokens: jax.Array) -> jax.Array:
    """Embeddings (.., D) of tokens (..)."""
    return jax.lax.psum(embedding_part(tok_embeddings_VD, tokens), MODEL)


def embedding_part(tok_embeddings_VD: jax.Array, tokens: jax.Array) -> jax.Array:
    """This shard's part of `embed`, which is their sum: zeros for tokens of the other shards' vocabulary."""
    n_local = tok_embeddings_VD.shape[0]
    local, mine = local_ids(tokens, n_local)
    return jnp.where(mine[..., None], tok_embeddings_VD[jnp.clip(local, 0, n_local - 1)], 0)


def head(
    h: jax.Array, norm_D: jax.Array, output_VD: jax.Array, config: LlamaConfig, probe: Probe = unprobed
) -> jax.Array:
    """h (.., D) to this shard's logits (.., V), -inf for the padding of the vocabulary."""
    x = probe("norm", rms_norm(h, norm_D, config.norm_eps))
    acc = jnp.promote_types(x.dtype, jnp.float32)
    logits = linear(x, output_VD, out_dtype=acc)
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
