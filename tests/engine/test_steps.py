"""What can be proven of the compiled steps without a clock."""

import re

import jax
import pytest

from sharded_llama.config import LlamaConfig
from sharded_llama.engine.steps import Steps
from sharded_llama.kv_cache import KVCache
from sharded_llama.mesh import make_mesh

CONFIG = LlamaConfig(
    dim=64,
    n_layers=3,
    n_heads=8,
    n_kv_heads=4,
    head_dim=8,
    ffn_dim=50,
    vocab_size=131,
    norm_eps=1e-5,
    rope_theta=1e4,
    dtype="float32",
)
MESHES = [(1, 1), (2, 1), (1, 2), (1, 8), (2, 4), (4, 2)]
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def collectives(executable):
    """Shapes of what every collective of the compiled program gives, by kind."""
    found = {name: [] for name in COLLECTIVES}
    for shape, name in re.findall(rf"= (\S+) ({'|'.join(COLLECTIVES)})(?:-start)?\(", executable.as_text()):
        found[name].append([int(n) for n in re.search(r"\[([\d,]*)\]", shape).group(1).split(",") if n])
    return found


def cache_bytes_per_device(mesh, batch, length):
    return sum(
        x.dtype.itemsize * int(jax.numpy.prod(jax.numpy.array(x.sharding.shard_shape(x.shape))))
        for x in jax.tree.leaves(KVCache.abstract(CONFIG, mesh, batch, length))
    )


@pytest.mark.parametrize("mesh_shape", MESHES, ids=str)
@pytest.mark.parametrize("greedy", [True, False])
def test_caches_are_updated_in_place(mesh_shape, greedy):
    mesh = make_mesh(*mesh_shape)
    steps = Steps(CONFIG, mesh)
    expected = cache_bytes_per_device(mesh, 8, 512)
    prefill = steps.prefill(8, 32, 8, 512, greedy=greedy).memory_analysis()
    assert prefill.alias_size_in_bytes == expected
    decode = steps.decode(8, 512, greedy=greedy).memory_analysis()
    # Only the caches are donated; a few words of padding may come with them.
    assert expected <= decode.alias_size_in_bytes <= expected + 64


def test_temporary_memory_does_not_grow_with_the_cache():
    """Eight times the cache, the same temporaries: nothing copies or scores the whole cache at once."""
    steps = Steps(CONFIG, make_mesh(2, 4))
    short, long = (steps.decode(8, length, greedy=True).memory_analysis() for length in (2048, 16384))
    assert long.alias_size_in_bytes > 7.9 * short.alias_size_in_bytes
    assert long.temp_size_in_bytes <= short.temp_size_in_bytes + 1024


@pytest.mark.parametrize("mesh_shape", [(1, 2), (1, 8), (2, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("greedy", [True, False])
def test_two_all_reduces_per_layer(mesh_shape, greedy):
    """One after attention and one after the MLP, one for the embedding; candidates are gathered; no weight moves."""
    steps = Steps(CONFIG, make_mesh(*mesh_shape))
    for step in (steps.decode(8, 512, greedy=greedy), steps.prefill(8, 32, 8, 512, greedy=greedy)):
        found = collectives(step)
        assert len(found["all-reduce"]) == 2 * CONFIG.n_layers + 1
        assert not found["all-to-all"] + found["collective-permute"] + found["reduce-scatter"]
        # Two candidates per row (or the row of logits) over the vocabulary, and the tokens over the data.
        assert len(found["all-gather"]) <= 3
        rows = 8 // mesh_shape[0]
        for shape in found["all-reduce"]:
            assert set(shape) <= {1, rows, 32, CONFIG.dim}, "only hidden states are summed"
        for shape in found["all-gather"]:
            size = int(jax.numpy.prod(jax.numpy.array(shape)))
            assert size <= 8 * 136, f"{shape} is more than the rows' logits"


def test_one_compilation_per_shape():
    steps = Steps(CONFIG, make_mesh(1, 2))
    first = steps.decode(4, 128, greedy=True)
    assert steps.decode(4, 128, greedy=True) is first
    assert steps.n_compiled == 1
    steps.decode(4, 256, greedy=True)
    steps.decode(4, 128, greedy=False)
    steps.prefill(4, 16, 4, 128, greedy=True)
    assert steps.n_compiled == 4


def test_the_decode_step_leaves_nothing_on_the_host():
    """No callback, infeed or outfeed: tokens stay on the device until they are read."""
    text = Steps(CONFIG, make_mesh(2, 2)).decode(4, 128, greedy=False).as_text()
    assert not re.search(r"infeed|outfeed|callback|SendToHost|host_transfer", text, re.IGNORECASE)
