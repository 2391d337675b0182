"""Logits against transformers within the numerics contract, on every mesh that 8 devices allow."""

import functools

import jax
import numpy as np
import pytest
from hf_reference import MODELS, distance, logits, make_model, rounded, save

from sharded_llama.checkpoint import load_weights, open_checkpoint
from sharded_llama.config import LlamaConfig
from sharded_llama.kv_cache import KVPages
from sharded_llama.mesh import make_mesh
from sharded_llama.model import xfmr, xfmr_step
from sharded_llama.parity.paged_rows import PagedRows

MESHES = [(d, n // d) for n in (1, 2, 4, 8) for d in (1, 2, 4, 8) if d <= n]
NAME = "grouped"  # tests/parity/test_families.py has other head ratios, rotary embeddings and tied outputs
# A chunk is two rows of a step, and it ends within a page: the next one goes on there and into a third page.
BATCH, LENGTH, CHUNK = 8, 35, 18
TOKENS = np.random.default_rng(1).integers(0, MODELS[NAME]["vocab_size"], (BATCH, LENGTH)).astype(np.int32)


def small_model():
    """Two layers: one hands its output to the other, and a third would only be compiled."""
    return make_model(NAME, num_hidden_layers=2)


@functools.cache
def reference_logits(dtype, weights_dtype):
    """Reference in `dtype` on weights rounded to `weights_dtype`."""
    return logits(rounded(small_model(), weights_dtype), TOKENS, dtype)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    @functools.cache
    def folder(dtype):
        return save(small_model(), tmp_path_factory.mktemp(dtype), dtype)

    return folder


def our_logits(folder, dtype, mesh, way):
    """Logits (B, L, V) by one of three ways through the model: one piece, chunk after chunk, token by token."""
    config = LlamaConfig.from_hf(folder, dtype=dtype)
    weights = load_weights(open_checkpoint(folder), config, mesh=mesh, progress=False)
    if way == "whole":
        out = jax.jit(lambda w, t: xfmr(w, config, t, mesh=mesh))(weights, TOKENS)
    else:
        size = CHUNK if way == "chunks" else 1
        run = functools.partial(xfmr_step, mesh=mesh, all_logits=True)
        step = jax.jit(run, static_argnames=("config", "n_single"), donate_argnames="pages")
        paged = PagedRows.new(mesh, BATCH, 2 * CHUNK)
        pages = KVPages.new(config, mesh, paged.n_pages)
        pieces = []
        for start in range(0, LENGTH, size):
            piece = TOKENS[:, start : start + size]
            padded = np.pad(piece, [(0, 0), (0, size - piece.shape[1])])
            rows, n_single, width = paged.step(padded, np.full(BATCH, start), mesh)
            out, pages = step(weights, config=config, rows=rows, pages=pages, n_single=n_single)
            pieces.append(np.asarray(out).reshape(BATCH, width, -1)[:, : piece.shape[1]])
        out = np.concatenate(pieces, axis=1)
    return np.asarray(out, np.float64)[..., : config.vocab_size]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The meshes of a type. float64 shows what a mesh gets wrong: its bound is 1e-10. The others share the meshes."""
    meshes = MESHES
    if not metafunc.config.option.exhaustive:
        meshes = {"test_float32": MESHES[::2], "test_bfloat16": MESHES[1::2]}.get(metafunc.function.__name__, MESHES)
    metafunc.parametrize("mesh_shape", meshes, ids=[f"{data}x{model}" for data, model in meshes])


class TestLogits:
    def test_float64(self, checkpoints, mesh_shape):
        with jax.enable_x64(True):
            for way in ("whole", "chunks", "tokens"):
                ours = our_logits(checkpoints("float32"), "float64", make_mesh(*mesh_shape), way)
                assert distance(ours, reference_logits("float64", "float32")) < 1e-10, way

    def test_float32(self, checkpoints, mesh_shape):
        exact, theirs = (reference_logits(dtype, "float32") for dtype in ("float64", "float32"))
        bound = max(1e-5, 1.5 * distance(theirs, exact))
        for way in ("whole", "chunks", "tokens"):
            ours = our_logits(checkpoints("float32"), "float32", make_mesh(*mesh_shape), way)
            assert distance(ours, theirs) < bound, way
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-2)

    def test_bfloat16(self, checkpoints, mesh_shape):
        exact, theirs = (reference_logits(dtype, "bfloat16") for dtype in ("float32", "bfloat16"))
        for way in ("whole", "chunks", "tokens"):
            ours = our_logits(checkpoints("bfloat16"), "bfloat16", make_mesh(*mesh_shape), way)
            assert distance(ours, exact) < 1.25 * distance(theirs, exact), way
