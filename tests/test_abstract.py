"""Every published size traces and shards without memory: 8 devices, and 64 for the largest."""

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sharded_llama.config import LlamaConfig
from sharded_llama.engine.steps import Column, DeviceState, StepShape, choose, forward
from sharded_llama.kv_cache import PAGE_SIZE, KVPages, page_bytes
from sharded_llama.mesh import make_mesh, simulate_cpu_devices
from sharded_llama.sampling import Mode
from sharded_llama.sampling.slots import abstract_slots
from sharded_llama.sharding import DATA, MODEL, kv_head_layout, named_sharding, padded
from sharded_llama.weights import abstract_weights, count_parameters

ROOT = Path(__file__).parent.parent
NAMES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")


def load_config(name):
    sys.path.insert(0, str(ROOT))
    return LlamaConfig.from_dict(importlib.import_module(f"configs.{name}").get_config().model)


def check(config, mesh, slots=8, n_pages=64):
    """A step of single tokens and chunks on every data shard, and the sampler after it."""
    weights = abstract_weights(config, mesh)
    pages = KVPages.abstract(config, mesh, n_pages)
    data, shape = mesh.shape[DATA], StepShape(n_single=slots, n_blocks=16, block=16, n_chosen=slots)

    def array(*shape):
        return jax.ShapeDtypeStruct((data * shape[0], *shape[1:]), jnp.int32, sharding=named_sharding(mesh, "tokens"))

    state = DeviceState(pages, array(slots, n_pages), array(slots))
    rows = array(shape.n_rows, Column.COUNT)
    run = functools.partial(forward, config=config, mesh=mesh, backend="blockwise", n_chosen=shape.n_chosen)
    forwarded, after, chosen = jax.eval_shape(run, weights, state, rows, array(shape.n_blocks, shape.block))
    logits, normalizer = forwarded.logits_RV, forwarded.normalizer_R
    assert chosen.shape == (data * shape.n_logits, Column.COUNT)
    assert logits.shape == (data * shape.n_logits, padded(config.vocab_size, mesh.shape[MODEL]))
    assert (logits.dtype, normalizer.shape) == (jnp.float32, logits.shape[:1])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), pages)
    of_slots = abstract_slots(mesh, slots, config.vocab_size, logits.shape[1])
    for mode in (Mode.GREEDY, Mode.LOGPROBS):
        run = functools.partial(choose, config=config, mesh=mesh, mode=mode)
        sampled, newest, kept = jax.eval_shape(run, forwarded, state.tokens_S, of_slots, chosen)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), kept) == jax.tree.map(lambda x: (x.shape, x.dtype), of_slots)
        assert (sampled.tokens_R.shape, sampled.tokens_R.dtype) == (logits.shape[:1], jnp.int32)
        assert (newest.shape, newest.dtype) == (state.tokens_S.shape, jnp.int32)
    # A page of one layer on one device: P positions, a key and a value of each of the device's kv heads.
    of_device = 2 * kv_head_layout(config, mesh.shape[MODEL])[0] // mesh.shape[MODEL] * config.head_dim
    assert page_bytes(config, mesh, "auto") == config.n_layers * PAGE_SIZE * of_device * config.jnp_dtype.itemsize

    # What one device holds of each array divides evenly, and together it is the model, its copies and its padding.
    held = sum(
        x.dtype.itemsize * functools.reduce(int.__mul__, x.sharding.shard_shape(x.shape), 1)
        for x in jax.tree.leaves(weights)
    )
    model = mesh.shape[MODEL]
    share = config.jnp_dtype.itemsize * count_parameters(config) / model
    copies = 2 * (kv_head_layout(config, model)[0] - config.n_kv_heads) * config.head_dim * config.dim * config.n_layers
    norms = (2 * config.n_layers + 1) * config.dim
    padding = 2 * (padded(config.vocab_size, model) - config.vocab_size) * config.dim
    padding += 3 * (padded(config.ffn_dim, model) - config.ffn_dim) * config.dim * config.n_layers
    assert share <= held <= share + config.jnp_dtype.itemsize * (copies / model + norms + padding / model + 1)
    assert mesh.shape[DATA] * model == mesh.size


@pytest.mark.parametrize("mesh_shape", [(1, 8), (2, 4), (8, 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_config_on_8_devices(name, mesh_shape):
    check(load_config(name), make_mesh(*mesh_shape))


def test_405b_on_64_devices():
    """In a process of its own, because a process has one number of simulated devices."""
    subprocess.run([sys.executable, __file__], check=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})


if __name__ == "__main__":
    simulate_cpu_devices(64)
    for shape in ((1, 64), (8, 8), (4, 16)):
        check(load_config("llama3_1_405b"), make_mesh(*shape))
