"""Stored weights back to canonical tensors, on their devices: undoes fusing, repeating and padding under jit."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from ...config import LlamaConfig
from ...sharding import MODEL
from ...weights import LayerWeights, XfmrWeights


def unfuse_weights(weights: XfmrWeights, config: LlamaConfig, mesh: Mesh) -> dict[str, Any]:
    """The canonical tensors (see `source`) as a nested dict of new global arrays, split over `model` where they can be.

    A tensor keeps the axis along which its stored array is split, which moves no data, if the true size divides by
    `model`. Otherwise its other axis is split, by an exchange between the devices; where neither divides, every
    device gets the whole. A kv head that is repeated is split over its copies. Each device holds its shard of the
    stored arrays and of these beside one another. No array shares memory with `weights`.
    """
    # One compiled function for all layers; the head's arrays have another.
    layer = jax.jit(functools.partial(_layer, config=config, mesh=mesh))
    head = jax.jit(functools.partial(_head, config=config, mesh=mesh))
    weights = jax.tree.map(lambda x: x if x.dtype == config.jnp_dtype else x.astype(config.jnp_dtype), weights)
    tensors = head(weights._replace(layers=()))
    return tensors | {"layers": {str(i): layer(arrays) for i, arrays in enumerate(weights.layers)}}


def _head(weights: XfmrWeights, config: LlamaConfig, mesh: Mesh) -> dict[str, jax.Array]:
    tensors = {
        "tok_embeddings": _cut(weights.tok_embeddings, 0, config.vocab_size, mesh),
        "norm": _split(weights.norm, None, mesh),
    }
    if weights.output is not None:
        tensors["output"] = _cut(weights.output, 0, config.vocab_size, mesh)
    return tensors


def _layer(layer: LayerWeights, config: LlamaConfig, mesh: Mesh) -> dict[str, jax.Array]:
    d, f = config.dim, config.ffn_dim
    repeats = layer.wqkv.shape[0] // config.n_kv_heads
    members = layer.wqkv.shape[1] - 2
    return {
        "attention_norm": _split(layer.attention_norm, None, mesh),
        "wq": _split(layer.wqkv[:, :members].reshape(-1, d), 0, mesh),
        "wk": _kv_heads(layer.wqkv[:, members], repeats, mesh),
        "wv": _kv_heads(layer.wqkv[:, members + 1], repeats, mesh),
        "wo": _split(layer.wo.reshape(d, -1), 1, mesh),
        "ffn_norm": _split(layer.ffn_norm, None, mesh),
        "w1": _cut(layer.w13[0], 0, f, mesh),
        "w3": _cut(layer.w13[1], 0, f, mesh),
        "w2": _cut(layer.w2, 1, f, mesh),
    }


def _split(x: jax.Array, axis: int | None, mesh: Mesh) -> jax.Array:
    """`x` in new memory, split along `axis` over `model`."""
    spec = P() if axis is None else P(*[MODEL if i == axis else None for i in range(x.ndim)])
    # jit would hand an array that it only passes on back as it came, to be donated by its owner.
    return jax.lax.with_sharding_constraint(jnp.copy(x), NamedSharding(mesh, spec))


def _cut(x: jax.Array, axis: int, size: int, mesh: Mesh) -> jax.Array:
    """The first `size` elements along `axis` of a matrix: what lies behind is padding."""
    model, other = mesh.shape[MODEL], 1 - axis
    if x.shape[axis] == size:
        return _split(x, axis, mesh)
    if x.shape[other] % model == 0:
        x = _split(x, other, mesh)  # first, so that cutting needs no whole array anywhere
        return _split(jax.lax.slice_in_dim(x, 0, size, axis=axis), other, mesh)
    return _split(jax.lax.slice_in_dim(x, 0, size, axis=axis), None, mesh)


def _kv_heads(x: jax.Array, repeats: int, mesh: Mesh) -> jax.Array:
    """k or v of every stored kv head, (G', K, D), as the true (G*K, D)."""
    _, k, d = x.shape
    if repeats == 1:
        return _split(x.reshape(-1, d), 0, mesh)
    if k % repeats:
        return _split(x[::repeats].reshape(-1, d), None, mesh)

    def part(head: jax.Array) -> jax.Array:  # (1, K, D): each device has one copy and gives a part of its rows
        start = jax.lax.axis_index(MODEL) % repeats * (k // repeats)
        return jax.lax.dynamic_slice_in_dim(head[0], start, k // repeats)

    return jax.shard_map(part, mesh=mesh, in_specs=P(MODEL), out_specs=P(MODEL))(x)
