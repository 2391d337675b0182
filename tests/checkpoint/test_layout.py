"""The pieces of shards: they cover what they must, once, and a part of the devices needs only its part of the bytes."""

import itertools
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from hf_models import CONFIG, save_random_model

from sharded_llama.checkpoint import open_checkpoint
from sharded_llama.checkpoint.layout import canonical_shapes, shard_pieces
from sharded_llama.config import LlamaConfig
from sharded_llama.mesh import make_mesh
from sharded_llama.sharding import named_sharding
from sharded_llama.weights import WeightSpec, weight_specs

EVEN = CONFIG.replace(vocab_size=128, ffn_dim=96)  # nothing to pad on 8 shards
TINY = CONFIG.replace(vocab_size=3, ffn_dim=5, eos_ids=(2,))  # some shards are padding only


def stored_arrays(config: LlamaConfig, model: int) -> list[tuple[str, WeightSpec]]:
    leaves = jax.tree_util.tree_leaves_with_path(weight_specs(config, model))
    return [(jax.tree_util.keystr(path, simple=True, separator="."), spec) for path, spec in leaves]


def shards(config: LlamaConfig, model: int):
    """(name, spec, index) of every shard of every stored array."""
    mesh = make_mesh(1, model)
    for name, spec in stored_arrays(config, model):
        yield from ((name, spec, index) for index in indices(spec, mesh))


def indices(spec: WeightSpec, mesh: jax.sharding.Mesh) -> list[tuple[slice, ...]]:
    """The distinct shards of an array, in the order of the devices."""
    found = named_sharding(mesh, spec.name).devices_indices_map(spec.shape)
    unique = {str(found[device]): found[device] for device in mesh.devices.flat}
    return list(unique.values())


@pytest.mark.parametrize("config", [CONFIG, EVEN, TINY], ids=["odd", "even", "tiny"])
@pytest.mark.parametrize("model", [1, 2, 4, 8])
def test_pieces_cover_tensors_and_shards(config: LlamaConfig, model: int):
    tensors = {name: np.zeros(shape, int) for name, shape in canonical_shapes(config).items()}
    covered = 0
    for name, spec, index in shards(config, model):
        shard = np.zeros([len(range(*s.indices(n))) for s, n in zip(index, spec.shape, strict=True)], int)
        for piece in shard_pieces(config, name, spec.shape, index):
            shard_part, tensor_part = piece.view(shard), tensors[piece.tensor][piece.source]
            assert np.shares_memory(shard_part, shard)  # a copy would be filled in vain
            assert shard_part.shape == tensor_part.shape
            shard_part += 1
            tensor_part += 1
        assert shard.max(initial=0) <= 1
        covered += shard.sum()
    repeats = max(1, model // config.n_kv_heads)
    for name, count in tensors.items():
        assert (count == (repeats if name.endswith(("wk", "wv")) else 1)).all(), name
    assert covered == sum(count.sum() for count in tensors.values())


def test_what_no_piece_covers_is_padding():
    shape = (136, 64)  # 131 rows, padded to 8 times 17
    (piece,) = shard_pieces(CONFIG, "output", shape, (slice(119, 136), slice(None)))
    assert piece == ("output", (slice(119, 131), slice(0, 64)), (slice(0, 12),))
    assert shard_pieces(CONFIG.replace(vocab_size=119), "output", shape, (slice(119, 136), slice(None))) == []


def test_repeated_heads_read_the_true_one():
    """8 shards of 2 kv heads and 8 query heads: shard 5 has query head 5, and the second kv head."""
    pieces = shard_pieces(CONFIG, "layers.1.wqkv", (8, 3, 12, 64), (slice(5, 6), slice(None), slice(None), slice(None)))
    rows = {piece.tensor: (piece.source[0].start, piece.target) for piece in pieces}
    assert rows == {"layers.1.wq": (60, (0, 0)), "layers.1.wk": (12, (0, 1)), "layers.1.wv": (12, (0, 2))}


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_any_axis_of_wqkv_may_be_split(axis: int):
    """A layout that the table does not have today: pieces of all splits together equal the whole."""
    shape, parts = (4, 4, 12, 64), 2
    tensors = {name: np.random.default_rng(0).random(shape) for name, shape in canonical_shapes(CONFIG).items()}

    def fill(index: tuple[slice, ...], shard_shape: list[int]) -> np.ndarray:
        shard = np.zeros(shard_shape)
        for piece in shard_pieces(CONFIG, "layers.0.wqkv", shape, index):
            piece.view(shard)[...] = tensors[piece.tensor][piece.source]
        return shard

    size = shape[axis] // parts
    halves = [
        fill(
            tuple(slice(i * size, (i + 1) * size) if a == axis else slice(None) for a in range(4)),
            [size if a == axis else n for a, n in enumerate(shape)],
        )
        for i in range(parts)
    ]
    np.testing.assert_array_equal(np.concatenate(halves, axis), fill((slice(None),) * 4, list(shape)))


def test_half_of_the_devices_read_their_half(tmp_path: Path):
    """A process that owns 4 of 8 shards asks for exactly the bytes of its shards."""
    save_random_model(tmp_path, EVEN)
    source = open_checkpoint(tmp_path)
    mesh = make_mesh(1, 8)
    read = owned = 0
    for name, spec in stored_arrays(EVEN, 8):
        for index in itertools.islice(indices(spec, mesh), 4):  # a replicated norm has one shard
            shard = np.zeros(named_sharding(mesh, spec.name).shard_shape(spec.shape), spec.dtype)
            for piece in shard_pieces(EVEN, name, spec.shape, index):
                read += source.read(piece.tensor, piece.source, piece.view(shard))
            owned += shard.nbytes
            assert shard.all()
    assert read == owned
    everything = sum(math.prod(spec.shape) * spec.dtype.itemsize for _, spec in stored_arrays(EVEN, 8))
    norms = sum(spec.shape[0] * 4 for _, spec in stored_arrays(EVEN, 8) if spec.name == "norm")
    assert read == (everything + norms) / 2
