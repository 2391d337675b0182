"""Logits against transformers within the numerics contract, on every mesh that 8 devices allow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_reference import MODELS, distance, logits, make_model, rounded, save

from sharded_llama.checkpoint import load_weights, open_checkpoint
from sharded_llama.config import LlamaConfig
from sharded_llama.kv_cache import KVCache
from sharded_llama.mesh import make_mesh
from sharded_llama.model import xfmr

MESHES = [(d, n // d) for n in (1, 2, 4, 8) for d in (1, 2, 4, 8) if d <= n]
# One model runs on every mesh; the others on those that repeat kv heads, split them, or do neither.
CASES = [("grouped", mesh) for mesh in MESHES]
CASES += [(name, mesh) for name in MODELS if name != "grouped" for mesh in ((1, 1), (2, 2), (1, 8), (2, 4))]
BATCH, LENGTH, CHUNK = 8, 13, 5


@functools.cache
def reference_logits(name, dtype, weights_dtype):
    """Reference in `dtype` on weights rounded to `weights_dtype`."""
    return logits(rounded(make_model(name), weights_dtype), tokens(name), dtype)


def tokens(name):
    return np.random.default_rng(1).integers(0, MODELS[name]["vocab_size"], (BATCH, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    @functools.cache
    def folder(name, dtype):
        return save(make_model(name), tmp_path_factory.mktemp(f"{name}-{dtype}"), dtype)

    return folder


def our_logits(folder, name, dtype, mesh, way):
    """Logits (B, L, V) by one of three ways through the model: one piece, chunk after chunk, token by token."""
    config = LlamaConfig.from_hf(folder, dtype=dtype)
    weights = load_weights(open_checkpoint(folder), config, mesh=mesh, progress=False)
    batch = tokens(name)
    if way == "whole":
        out = jax.jit(lambda w, t: xfmr(w, config, t, mesh=mesh)[0])(weights, batch)
    else:
        step = jax.jit(lambda w, t, p, c: xfmr(w, config, t, p, c, mesh=mesh), donate_argnums=3)
        size = CHUNK if way == "chunks" else 1
        caches = KVCache.new(config, mesh, BATCH, 17)
        pieces = []
        for start in range(0, LENGTH, size):
            piece = batch[:, start : start + size]
            padded = np.pad(piece, [(0, 0), (0, size - piece.shape[1])])
            out, caches = step(weights, padded, jnp.full(BATCH, start, jnp.int32), caches)
            pieces.append(np.asarray(out)[:, : piece.shape[1]])
        out = np.concatenate(pieces, axis=1)
    return np.asarray(out, np.float64)[..., : config.vocab_size]


@pytest.mark.parametrize(("name", "mesh_shape"), CASES, ids=lambda x: x if isinstance(x, str) else f"{x[0]}x{x[1]}")
class TestLogits:
    def test_float64(self, checkpoints, name, mesh_shape):
        with jax.enable_x64(True):
            for way in ("whole", "chunks", "tokens"):
                ours = our_logits(checkpoints(name, "float32"), name, "float64", make_mesh(*mesh_shape), way)
                assert distance(ours, reference_logits(name, "float64", "float32")) < 1e-10, way

    def test_float32(self, checkpoints, name, mesh_shape):
        exact, theirs = (reference_logits(name, dtype, "float32") for dtype in ("float64", "float32"))
        bound = max(1e-5, 1.5 * distance(theirs, exact))
        for way in ("whole", "chunks", "tokens"):
            ours = our_logits(checkpoints(name, "float32"), name, "float32", make_mesh(*mesh_shape), way)
            assert distance(ours, theirs) < bound, way
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-2)

    def test_bfloat16(self, checkpoints, name, mesh_shape):
        exact, theirs = (reference_logits(name, dtype, "bfloat16") for dtype in ("float32", "bfloat16"))
        for way in ("whole", "chunks", "tokens"):
            ours = our_logits(checkpoints(name, "bfloat16"), name, "bfloat16", make_mesh(*mesh_shape), way)
            assert distance(ours, exact) < 1.25 * distance(theirs, exact), way
