"""Which part of which checkpoint tensor stands where in a shard: fusing, repeating and padding, as pure functions.

The reader follows the pieces from tensors to shards, the exporter from stored arrays back to tensors, so that
the two cannot disagree.
"""

from typing import NamedTuple

import numpy as np

from ..config import LlamaConfig

Index = tuple[slice, ...]  # of a global array, as `Sharding.addressable_devices_indices_map` gives


class Piece(NamedTuple):
    """A box of a canonical tensor and its place in a shard. What no piece covers is zero: padding."""

    tensor: str  # canonical name, such as "layers.3.wq"
    source: tuple[slice, ...]  # of the tensor
    target: tuple[int | slice, ...]  # of the shard

    def view(self, shard: np.ndarray) -> np.ndarray:
        """The piece's place in `shard`, in the shape of its source."""
        return shard[self.target].reshape([s.stop - s.start for s in self.source])


def canonical_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a checkpoint of `config` holds, by canonical name, in the order of the weights."""
    d, f, k = config.dim, config.ffn_dim, config.head_dim
    q, kv = config.n_heads * k, config.n_kv_heads * k
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (config.vocab_size, d)}
    for i in range(config.n_layers):
        layer = {
            "attention_norm": (d,),
            "wq": (q, d),
            "wk": (kv, d),
            "wv": (kv, d),
            "wo": (d, q),
            "ffn_norm": (d,),
            "w1": (f, d),
            "w3": (f, d),
            "w2": (d, f),
        }
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["norm"] = (d,)
    if not config.tie_embeddings:
        shapes["output"] = (config.vocab_size, d)
    return shapes


def shard_pieces(config: LlamaConfig, name: str, shape: tuple[int, ...], index: Index) -> list[Piece]:
    """The pieces of the shard `index` of stored array `name`, such as "layers.3.wqkv", of global `shape`.

    Any axis may be split, except the head width K of wo: a part of every head is no slice of its tensor.
    """
    prefix, _, array = name.rpartition(".")
    prefix += "." if prefix else ""
    bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    match array:
        case "wqkv":
            pieces = _wqkv_pieces(config, prefix, shape, bounds)
        case "wo":
            rows, (head, end), _ = bounds
            k = config.head_dim
            pieces = [Piece(name, (slice(*rows), slice(head * k, end * k)), ())]
        case "w13":
            halves, rows, columns = bounds
            source, target = _clip(rows, config.ffn_dim)
            pieces = [
                Piece(prefix + ("w1", "w3")[half], (source, slice(*columns)), (half - halves[0], target))
                for half in range(*halves)
            ]
        case "w2":
            rows, columns = bounds
            source, target = _clip(columns, config.ffn_dim)
            pieces = [Piece(name, (slice(*rows), source), (slice(None), target))]
        case "tok_embeddings" | "output":
            rows, columns = bounds
            source, target = _clip(rows, config.vocab_size)
            pieces = [Piece(name, (source, slice(*columns)), (target,))]
        case _:  # norms
            pieces = [Piece(name, (slice(*bounds[0]),), ())]
    return [piece for piece in pieces if all(s.stop > s.start for s in piece.source)]


def part_axis(name: str) -> int:
    """The axis of a stored array along which it is read in parts: rows of its tensors, heads of wqkv."""
    return 1 if name.rpartition(".")[2] in ("wqkv", "w13") else 0


def _wqkv_pieces(
    config: LlamaConfig, prefix: str, shape: tuple[int, ...], bounds: list[tuple[int, int]]
) -> list[Piece]:
    """One piece per head: the stored array is (G', R'+2, K, D), see `kv_head_layout`."""
    n_kv_heads, r = shape[0], shape[1] - 2
    kv_heads, members, (k_start, k_end), columns = bounds
    pieces = []
    for g in range(*kv_heads):
        true_g = g * config.n_kv_heads // n_kv_heads
        for m in range(*members):
            tensor, head = ("wq", g * r + m) if m < r else (("wk", "wv")[m - r], true_g)
            rows = slice(head * config.head_dim + k_start, head * config.head_dim + k_end)
            pieces.append(Piece(prefix + tensor, (rows, slice(*columns)), (g - kv_heads[0], m - members[0])))
    return pieces


def _clip(bounds: tuple[int, int], size: int) -> tuple[slice, slice]:
    """The part of a padded axis that the tensor has, as a slice of the tensor and as one of the shard."""
    start, stop = bounds[0], max(bounds[0], min(bounds[1], size))
    return slice(start, stop), slice(0, stop - start)
