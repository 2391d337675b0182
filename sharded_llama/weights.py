"""The weights of a model: what each array is, described once, and random ones made directly in their shards.

`weight_specs` is the only description. Abstract weights (for compiling without memory), random weights and
loaded weights all come from it, so they cannot disagree.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P

from .config import LlamaConfig
from .mesh import check_mesh
from .sharding import MODEL, SPECS, kv_head_layout, named_sharding, padded

INIT_STD = 0.02  # initializer_range of every published Llama config


class LayerWeights(NamedTuple):
    """One transformer layer. Matrices keep the (out, in) orientation of the checkpoints."""

    attention_norm: Any  # (D,)
    wqkv: Any  # (G', R'+2, K, D): per kv head its R' query heads, then k, then v
    wo: Any  # (D, H, K)
    ffn_norm: Any  # (D,)
    w13: Any  # (2, F, D): gate, up
    w2: Any  # (D, F)


class XfmrWeights(NamedTuple):
    """The whole model. `output` is None when it is tied to `tok_embeddings`."""

    tok_embeddings: Any  # (V, D)
    layers: tuple[LayerWeights, ...]
    norm: Any  # (D,)
    output: Any  # (V, D) or None


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """One weight array: global shape, dtype, layout on the mesh and initialiser."""

    name: str  # entry of the sharding table, such as "wqkv"
    shape: tuple[int, ...]
    dtype: jnp.dtype
    init: Callable[[jax.Array], jax.Array]  # key -> array of `shape` in float32

    @property
    def spec(self) -> P:
        return SPECS[self.name]

    def abstract(self, mesh: Mesh) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=named_sharding(mesh, self.name))


def weight_specs(config: LlamaConfig, model: int) -> XfmrWeights:
    """The tree of WeightSpec of `config` on `model` tensor-parallel shards."""
    layer = _layer_specs(config, model)
    embedding = functools.partial(_init_padded, (config.vocab_size, config.dim), 0, padded(config.vocab_size, model))
    vocab_shape = (padded(config.vocab_size, model), config.dim)
    dtype = config.jnp_dtype
    return XfmrWeights(
        tok_embeddings=WeightSpec("tok_embeddings", vocab_shape, dtype, embedding),
        layers=(layer,) * config.n_layers,
        norm=WeightSpec("norm", (config.dim,), dtype, functools.partial(_init_ones, config.dim)),
        output=None if config.tie_embeddings else WeightSpec("output", vocab_shape, dtype, embedding),
    )


def _layer_specs(config: LlamaConfig, model: int) -> LayerWeights:
    d, k, f, h = config.dim, config.head_dim, config.ffn_dim, config.n_heads
    g_rep, r_rep = kv_head_layout(config, model)
    f_pad = padded(f, model)
    norm = functools.partial(_init_ones, d)

    def spec(name: str, shape: tuple[int, ...], init: Callable) -> WeightSpec:
        return WeightSpec(name, shape, config.jnp_dtype, init)

    return LayerWeights(
        attention_norm=spec("norm", (d,), norm),
        wqkv=spec("wqkv", (g_rep, r_rep + 2, k, d), functools.partial(_init_wqkv, config, g_rep, r_rep)),
        wo=spec("wo", (d, h, k), functools.partial(_init_padded, (d, h, k), 1, h)),
        ffn_norm=spec("norm", (d,), norm),
        w13=spec("w13", (2, f_pad, d), functools.partial(_init_padded, (2, f, d), 1, f_pad)),
        w2=spec("w2", (d, f_pad), functools.partial(_init_padded, (d, f), 1, f_pad)),
    )


# Initialisers draw the true array and then repeat or pad it: the model does not depend on the mesh.


def _init_ones(size: int, key: jax.Array) -> jax.Array:
    del key
    return jnp.ones((size,), jnp.float32)


def _init_padded(shape: tuple[int, ...], axis: int, size: int, key: jax.Array) -> jax.Array:
    x = INIT_STD * jax.random.normal(key, shape, jnp.float32)
    return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(shape)])


def _init_wqkv(config: LlamaConfig, g_rep: int, r_rep: int, key: jax.Array) -> jax.Array:
    g, k, d = config.n_kv_heads, config.head_dim, config.dim
    r = config.n_heads // g
    w = INIT_STD * jax.random.normal(key, (g, r + 2, k, d), jnp.float32)
    wq = w[:, :r].reshape(g_rep, r_rep, k, d)
    wkv = jnp.repeat(w[:, r:], g_rep // g, axis=0)
    return jnp.concatenate([wq, wkv], axis=1)


def _is_spec(x: Any) -> bool:
    return isinstance(x, WeightSpec)


def abstract_weights(config: LlamaConfig, mesh: Mesh) -> XfmrWeights:
    """Shapes, dtypes and shardings without memory: input of `eval_shape` and of ahead-of-time compilation."""
    check_mesh(config, mesh)
    return jax.tree.map(lambda s: s.abstract(mesh), weight_specs(config, mesh.shape[MODEL]), is_leaf=_is_spec)


def init_weights(key: jax.Array, config: LlamaConfig, *, mesh: Mesh) -> XfmrWeights:
    """Randomly initialised weights (normal, std 0.02; norms 1), each made directly in its shards.

    The same key gives the same model on every mesh. Layers share one compiled initialiser.
    """
    check_mesh(config, mesh)
    specs = weight_specs(config, mesh.shape[MODEL])
    init_layer = _compiled_init(specs.layers[0], mesh)
    head = specs._replace(layers=())
    head_key, *layer_keys = jax.random.split(key, config.n_layers + 1)
    layers = tuple(init_layer(k) for k in layer_keys)
    return _compiled_init(head, mesh)(head_key)._replace(layers=layers)


def _compiled_init(specs: Any, mesh: Mesh) -> Callable[[jax.Array], Any]:
    leaves, tree = jax.tree.flatten(specs, is_leaf=_is_spec)
    shardings = [named_sharding(mesh, s.name) for s in leaves]

    def init(key: jax.Array) -> list[jax.Array]:
        return [s.init(k).astype(s.dtype) for s, k in zip(leaves, jax.random.split(key, len(leaves)), strict=True)]

    compiled = jax.jit(init, out_shardings=shardings)
    return lambda key: jax.tree.unflatten(tree, compiled(key))


def count_parameters(config: LlamaConfig) -> int:
    """Number of true parameters: nothing repeated or padded, tied embeddings once."""
    d, k = config.dim, config.head_dim
    attention = d * k * (2 * config.n_heads + 2 * config.n_kv_heads)
    layer = attention + 3 * d * config.ffn_dim + 2 * d
    embeddings = (1 if config.tie_embeddings else 2) * config.vocab_size * d
    return config.n_layers * layer + embeddings + d
