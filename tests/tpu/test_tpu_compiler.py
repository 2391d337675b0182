"""The steps of full-size models compiled for TPUs by the TPU compiler itself, on a machine that has none.

Needs libtpu (`make test-tpu` installs it). Nothing is run: shapes go in, an executable and its memory come out.
"""

import importlib
import math
import re

import jax
import pytest
from jax.experimental import topologies

from sharded_llama.config import LlamaConfig
from sharded_llama.engine.steps import Steps
from sharded_llama.kv_cache import KVCache
from sharded_llama.mesh import make_mesh

pytestmark = pytest.mark.tpu_compiler

GIB = 2**30
CHIP_MEMORY = {"v5e": 16 * GIB, "v6e": 32 * GIB, "v5p": 95 * GIB}  # Google's documentation of each generation
TARGETS = [
    ("llama3_1_8b", "v5e:2x4", (1, 8)),
    ("llama3_1_8b", "v6e:2x4", (2, 4)),
    ("llama3_1_70b", "v5p:2x2x4", (1, 16)),
    ("llama3_1_405b", "v5p:4x4x4", (1, 64)),
]
BATCH, PROMPT = 16, 256


def make_steps(name: str, topology: str, mesh_shape: tuple[int, int], **changes: int) -> Steps:
    config = LlamaConfig.from_dict(importlib.import_module(f"configs.{name}").get_config().model).replace(**changes)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    assert len(devices) == mesh_shape[0] * mesh_shape[1]
    return Steps(config, make_mesh(*mesh_shape, devices=devices))


def cache_bytes_per_chip(steps: Steps, length: int) -> int:
    total = sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(KVCache.abstract(steps.config, steps.mesh, BATCH, length))
    )
    return total // steps.mesh.size


def sums_of_hidden_states(executable, dim: int) -> int:
    """Number of all-reduces of hidden states. Every other collective must be of a few numbers per row."""
    count = 0
    for shape in re.findall(
        r"= \w+\[([\d,]*)\]\S* (?:all-reduce|all-gather|all-to-all)(?:-start)?\(", executable.as_text()
    ):
        sizes = [int(n) for n in shape.split(",") if n]
        if dim in sizes:
            count += 1
        else:
            assert math.prod(sizes) <= BATCH * 64, f"{shape} is more than the rows' candidates"
    return count


@pytest.mark.parametrize(("name", "topology", "mesh_shape"), TARGETS, ids=lambda x: str(x))
class TestCompiles:
    def test_decode(self, name, topology, mesh_shape):
        steps = make_steps(name, topology, mesh_shape)
        cached = 8192
        decode = steps.decode(BATCH, cached, greedy=True)
        memory = decode.memory_analysis()
        expected = cache_bytes_per_chip(steps, cached)
        assert expected <= memory.alias_size_in_bytes <= 1.001 * expected, "the cache is updated in place"
        assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < CHIP_MEMORY[topology.split(":")[0]]
        # Far below one layer's share of the cache: nothing copies it.
        assert memory.temp_size_in_bytes < max(expected / 4, 0.5 * GIB)
        assert sums_of_hidden_states(decode, steps.config.dim) == 2 * steps.config.n_layers + 1

    def test_prefill(self, name, topology, mesh_shape):
        steps = make_steps(name, topology, mesh_shape)
        prefill = steps.prefill(BATCH, PROMPT, BATCH, 8192, greedy=True)
        memory = prefill.memory_analysis()
        expected = cache_bytes_per_chip(steps, 8192)
        assert expected <= memory.alias_size_in_bytes <= 1.001 * expected
        assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < CHIP_MEMORY[topology.split(":")[0]]
        assert sums_of_hidden_states(prefill, steps.config.dim) == 2 * steps.config.n_layers + 1


@pytest.mark.parametrize(
    ("topology", "mesh_shape"), [("v5e:2x4", (1, 8)), ("v6e:2x4", (2, 4)), ("v6e:2x4", (4, 2))], ids=str
)
def test_temporaries_do_not_grow_with_the_cache(topology, mesh_shape):
    """In bfloat16, with one, two and four kv heads per chip. Two layers show it: a copy would be made in each."""
    steps = make_steps("llama3_1_8b", topology, mesh_shape, n_layers=2)
    short, long = (steps.decode(BATCH, n, greedy=True).memory_analysis() for n in (4096, 16384))
    grown = cache_bytes_per_chip(steps, 16384) - cache_bytes_per_chip(steps, 4096)
    assert long.alias_size_in_bytes - short.alias_size_in_bytes >= 0.999 * grown
    assert long.temp_size_in_bytes - short.temp_size_in_bytes < 0.001 * grown
