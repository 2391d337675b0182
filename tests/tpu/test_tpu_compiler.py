"""The steps of full-size models compiled for TPUs by the TPU compiler itself, on a machine that has none.

Needs libtpu (`make test-tpu` installs it). Nothing is run: shapes go in, an executable and its memory come out.
"""

import importlib
import math
import re

import pytest
from jax.experimental import topologies

from sharded_llama.attention import choose_backend
from sharded_llama.config import LlamaConfig
from sharded_llama.engine.options import EngineOptions, sizes_of
from sharded_llama.engine.runner import Runner
from sharded_llama.kv_cache import PAGE_SIZE, page_bytes
from sharded_llama.mesh import make_mesh
from sharded_llama.sampling import Mode
from sharded_llama.sharding import DATA
from sharded_llama.weights import abstract_weights

pytestmark = pytest.mark.tpu_compiler

GIB = 2**30
CHIP_MEMORY = {"v5e": 16 * GIB, "v6e": 32 * GIB, "v5p": 95 * GIB}  # Google's documentation of each generation
TARGETS = [
    ("llama3_1_8b", "v5e:2x4", (1, 8)),
    ("llama3_1_8b", "v6e:2x4", (2, 4)),
    ("llama3_1_70b", "v5p:2x2x4", (1, 16)),
    ("llama3_1_405b", "v5p:4x4x4", (1, 64)),
]
BATCH, PROMPT, CACHED = 16, 256, 8192  # sequences, tokens of a chunk on each data shard, positions of a sequence


def make_runner(name: str, topology: str, mesh_shape: tuple[int, int], pools: int = 1, **changes: int) -> Runner:
    """Pages for `pools` times what BATCH sequences of CACHED tokens need."""
    config = LlamaConfig.from_dict(importlib.import_module(f"configs.{name}").get_config().model).replace(**changes)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    assert len(devices) == mesh_shape[0] * mesh_shape[1]
    mesh = make_mesh(*mesh_shape, devices=devices)
    backend = choose_backend(config, devices[0])
    assert backend == "tpu"
    data, width = mesh.shape[DATA], CACHED // PAGE_SIZE
    return Runner(
        config,
        mesh,
        abstract_weights(config, mesh),
        backend=backend,
        sizes=sizes_of(EngineOptions(max_num_seqs=BATCH, max_num_batched_tokens=BATCH + data * PROMPT), mesh),
        n_pages=pools * BATCH // data * width,
        table_width=width,
        kv_dtype="auto",
    )


def cache_bytes_per_chip(runner: Runner) -> int:
    return runner.n_pages * page_bytes(runner.config, runner.mesh, runner.kv_dtype)


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
    @pytest.mark.parametrize("mixed", [False, True], ids=["decode", "mixed"])
    def test_forward(self, name, topology, mesh_shape, mixed):
        """The largest step of single tokens, and the one with chunks of prompts beside them."""
        runner = make_runner(name, topology, mesh_shape)
        shape = max((s for s in runner.sizes.shapes if bool(s.n_blocks) == mixed), key=lambda s: s.n_tokens)
        forward = runner._forward(shape)
        memory = forward.memory_analysis()
        expected = cache_bytes_per_chip(runner)
        assert expected <= memory.alias_size_in_bytes <= 1.001 * expected, "the pages are updated in place"
        assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < CHIP_MEMORY[topology.split(":")[0]]
        # Far below the share of the cache: nothing copies it.
        assert memory.temp_size_in_bytes < max(expected / 4, 0.5 * GIB)
        assert sums_of_hidden_states(forward, runner.config.dim) == 2 * runner.config.n_layers + 1


@pytest.mark.parametrize(
    ("topology", "mesh_shape"), [("v5e:2x4", (1, 8)), ("v6e:2x4", (2, 4)), ("v6e:2x4", (4, 2))], ids=str
)
def test_temporaries_do_not_grow_with_the_pool(topology, mesh_shape):
    """In bfloat16, with one, two and four kv heads per chip. Two layers show it: a copy would be made in each."""
    few, many = (make_runner("llama3_1_8b", topology, mesh_shape, pools, n_layers=2) for pools in (1, 4))
    grown = cache_bytes_per_chip(many) - cache_bytes_per_chip(few)
    shape = few.sizes.shapes[-1]  # rows of single tokens and of chunks
    assert shape.n_single
    assert shape.n_blocks
    small, large = (runner._forward(shape).memory_analysis() for runner in (few, many))
    assert large.alias_size_in_bytes - small.alias_size_in_bytes >= 0.999 * grown
    assert large.temp_size_in_bytes - small.temp_size_in_bytes < 0.001 * grown


@pytest.mark.parametrize("mode", [Mode.GREEDY, Mode.SAMPLE])
def test_the_sampler_compiles(mode):
    """Its largest temporaries are rows of logits."""
    runner = make_runner("llama3_1_8b", "v5e:2x4", (1, 8))
    memory = runner._choose(BATCH, mode).memory_analysis()
    logits = 4 * BATCH * runner.config.vocab_size
    assert memory.temp_size_in_bytes < (0.5 if mode == Mode.GREEDY else 16) * logits
