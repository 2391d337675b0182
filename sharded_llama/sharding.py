"""The one table of how arrays are laid out over the `(data, model)` mesh.

Every PartitionSpec in the package comes from here. `data` replicates the weights and splits the batch;
`model` is tensor parallelism: it splits heads, feed-forward width and vocabulary.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from .config import LlamaConfig
from .errors import MeshError

DATA, MODEL = "data", "model"

SPECS: dict[str, P] = {
    # Weights. Shapes are global; G' and R' are explained at `kv_head_layout`.
    "tok_embeddings": P(MODEL, None),  # (V, D)
    "output": P(MODEL, None),  # (V, D)
    "norm": P(),  # (D,)
    "wqkv": P(MODEL),  # (G', R'+2, K, D)
    "wo": P(None, MODEL),  # (D, H, K)
    "w13": P(None, MODEL),  # (2, F, D)
    "w2": P(None, MODEL),  # (D, F)
    # Cache of one layer; an 8-bit cache's scales lack the last axis.
    "kv_pages": P(DATA, None, MODEL),  # (N, P, 2G', K)
    # Activations and step inputs.
    "tokens": P(DATA),  # (B, ...) tokens, positions, lengths, per-row sampling parameters
    "hidden": P(DATA, None, None),  # (B, L, D)
    "heads": P(DATA, None, MODEL),  # (B, L, H or G', K)
    "attn_weights": P(DATA, MODEL),  # (B, H, L, S)
    "feed_forward": P(DATA, None, MODEL),  # (B, L, F)
    "logits": P(DATA, None, MODEL),  # (B, L, V)
    "last_logits": P(DATA, MODEL),  # (B, V), (R, V) or (T, V)
    "replicated": P(),  # sampled tokens leaving a step, so that every process can read them
}


def named_sharding(mesh: Mesh, name: str) -> NamedSharding:
    """Sharding of the table's array `name` on `mesh`."""
    return NamedSharding(mesh, SPECS[name])


def put(mesh: Mesh, name: str, array: np.ndarray) -> jax.Array:
    """A host array, the same in every process, as a global array laid out as the table says for `name`."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, named_sharding(mesh, name), lambda index: array[index])


def kv_head_layout(config: LlamaConfig, model: int) -> tuple[int, int]:
    """How heads are laid out on `model` shards.

    Returns (G', R'): the number of kv heads after repeating each of the G true ones `max(1, model/G)`
    times, and the query heads that each of them serves. Query head `h` belongs to kv head `h // R'` of
    the repeated ones, which is a copy of true kv head `h // (H/G)`.
    """
    n_kv_heads = max(config.n_kv_heads, model)
    return n_kv_heads, config.n_heads // n_kv_heads


def model_sizes(config: LlamaConfig) -> list[int]:
    """The sizes of the `model` axis that the head counts allow, in ascending order."""
    return [
        m
        for m in range(1, config.n_heads + 1)
        if config.n_heads % m == 0 and (config.n_kv_heads % m == 0 or m % config.n_kv_heads == 0)
    ]


def check_model_size(config: LlamaConfig, model: int) -> None:
    """Raises MeshError, naming the sizes that work, when `model` shards cannot hold whole heads."""
    allowed = model_sizes(config)
    if model not in allowed:
        raise MeshError(
            f"model={model} does not fit {config.n_heads} query heads and {config.n_kv_heads} kv heads: it must "
            f"divide the query heads, and divide or be a multiple of the kv heads. Sizes that work: "
            f"{', '.join(map(str, allowed))}."
        )


def local_ids(ids: jax.Array, n_local: int) -> tuple[jax.Array, jax.Array]:
    """Inside `shard_map`: token ids relative to this shard's `n_local` of the vocabulary, and which of them it has."""
    local = ids - jax.lax.axis_index(MODEL) * n_local
    return local, (local >= 0) & (local < n_local)


def padded(size: int, model: int) -> int:
    """`size` rounded up to a multiple of `model`: vocabulary and feed-forward width are padded with zero rows."""
    return -(-size // model) * model
