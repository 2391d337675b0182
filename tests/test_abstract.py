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
from sharded_llama.engine.steps import decode, prefill
from sharded_llama.kv_cache import KVCache
from sharded_llama.mesh import make_mesh, simulate_cpu_devices
from sharded_llama.sharding import DATA, MODEL, kv_head_layout, named_sharding, padded
from sharded_llama.weights import abstract_weights, count_parameters

ROOT = Path(__file__).parent.parent
NAMES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")


def load_config(name):
    sys.path.insert(0, str(ROOT))
    return LlamaConfig.from_dict(importlib.import_module(f"configs.{name}").get_config().model)


def check(config, mesh, batch=8, length=1024):
    weights = abstract_weights(config, mesh)
    caches = KVCache.abstract(config, mesh, batch, length)

    def array(name, shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=named_sharding(mesh, name))

    static = {"config": config, "mesh": mesh, "backend": "blockwise"}
    rows = array("tokens", (batch,))
    tokens, positions, after = jax.eval_shape(
        functools.partial(decode, **static, rows=None), weights, caches, array("replicated", (batch,)), rows
    )
    assert tokens.shape == positions.shape == (batch,)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), caches)
    prompt = array("tokens", (batch, 256))
    tokens, after = jax.eval_shape(
        functools.partial(prefill, **static, rows=None), weights, caches, prompt, rows, array("replicated", ())
    )
    assert tokens.shape == (batch,)
    assert len(after) == config.n_layers

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
        check(load_config("llama3_1_405b"), make_mesh(*shape), batch=16)
