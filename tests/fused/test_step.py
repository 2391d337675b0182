"""A step through all kernels for GPUs, interpreted, against plain JAX; and that they lower for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_reference import distance

from sharded_llama import attention, model
from sharded_llama.attention.scores_gpu import paged_scores
from sharded_llama.config import LlamaConfig
from sharded_llama.fused.add_norm import add_norm
from sharded_llama.fused.rotate_write import rotate_write
from sharded_llama.kv_cache import KVPages
from sharded_llama.mesh import make_mesh
from sharded_llama.parity.paged_rows import PagedRows
from sharded_llama.sharding import named_sharding
from sharded_llama.weights import abstract_weights, init_weights

CONFIG = LlamaConfig(
    dim=48,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    head_dim=16,
    ffn_dim=80,
    vocab_size=101,
    norm_eps=1e-5,
    rope_theta=1e4,
    dtype="float32",
)


@pytest.fixture
def interpreted(monkeypatch):
    """Backend "gpu" on CPU devices."""
    monkeypatch.setattr(model, "choose_backend", lambda config, device, name: name)
    for name in ("add_norm", "rotate_write", "paged_scores"):
        monkeypatch.setattr(model, name, functools.partial(getattr(model, name), interpret=True))
    monkeypatch.setattr(attention, "paged_rows_gpu", functools.partial(attention.paged_rows_gpu, interpret=True))


@pytest.mark.parametrize(
    ("mesh_shape", "kv_dtype"), [((2, 2), "auto"), ((1, 1), "bfloat16"), ((1, 2), "int8")], ids=str
)
def test_equals_plain_jax(interpreted, mesh_shape, kv_dtype):
    """A chunk of a prompt, and then tokens one by one: logits, metrics, and what is in the pages."""
    mesh = make_mesh(*mesh_shape)
    weights = init_weights(jax.random.key(0), CONFIG, mesh=mesh)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 9), np.int32)
    results = {}
    for backend in ("gpu", "blockwise"):
        run = functools.partial(model.xfmr_step, config=CONFIG, mesh=mesh, backend=backend, with_metrics=True)
        step = jax.jit(run, static_argnames="n_single")
        paged = PagedRows.new(mesh, 4, 16)
        pages = KVPages.new(CONFIG, mesh, paged.n_pages, kv_dtype)
        seen = []
        for first, size in ((0, 7), (7, 1), (8, 1)):
            rows, n_single, _ = paged.step(tokens[:, first : first + size], np.full(4, first), mesh)
            logits, pages, metrics = step(weights, rows=rows, pages=pages, n_single=n_single)
            seen += [np.asarray(logits)[:, : CONFIG.vocab_size], np.asarray(metrics)]
        results[backend] = seen, [np.asarray(layer.kv_NPGK, np.float32) for layer in pages]
    (ours, our_pages), (theirs, their_pages) = results["gpu"], results["blockwise"]
    for a, b in zip(ours, theirs, strict=True):
        assert distance(a, b) < (2e-4 if kv_dtype == "bfloat16" else 1e-5)
    for a, b in zip(our_pages, their_pages, strict=True):
        # A value that lies between two of an 8-bit type may round to either.
        assert distance(a, b) < (1e-6 if kv_dtype == "auto" else 1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_lowers(dtype):
    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    pages = KVPages(array(100, 16, 16, 128))
    calls = [
        (lambda h, x, w: add_norm(h, x, w, 1e-5), array(3, 4096), array(3, 4096), array(4096)),
        (
            rotate_write,
            *(array(3, 8, 6, 128), array(3, 64, dtype=jnp.float32), array(3, 64, dtype=jnp.float32)),
            *(pages, array(3, dtype=jnp.int32)),
        ),
        (
            functools.partial(paged_scores, n_positions=512, nothing=-1e30),
            *(array(3, 32, 128), pages, array(3, 40, dtype=jnp.int32), array(3, dtype=jnp.int32)),
            array(dtype=jnp.int32),
        ),
    ]
    for run, *args in calls:
        text = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.parametrize("mesh_shape", [(1, 1), (1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize(("n_rows", "calls"), [(72, 1), (64, 0), (73, 0)])
def test_the_kernel_of_many_rows_is_for_hopper(monkeypatch, mesh_shape, n_rows, calls):
    """All layers are one function, in which it stands once."""
    monkeypatch.setattr(model, "choose_backend", lambda config, device, name: name)
    config = CONFIG.replace(dim=64, head_dim=16, n_heads=4, ffn_dim=256, dtype="bfloat16")
    mesh = make_mesh(*mesh_shape)
    n_rows *= mesh_shape[0]
    weights, pages = abstract_weights(config, mesh), KVPages.abstract(config, mesh, 16, "auto")
    tokens = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=named_sharding(mesh, "tokens"))
    rows = model.StepRows(tokens((n_rows,)), tokens((n_rows,)), tokens((n_rows,)), tokens((n_rows, 4)))
    step = functools.partial(model.xfmr_step, mesh=mesh, n_single=n_rows // mesh_shape[0], backend="gpu")
    for processors, expected in ((132, calls), (0, 0)):
        monkeypatch.setattr(model, "hopper_processors", lambda device, n=processors: n)
        traced = jax.jit(lambda w, r, p: step(w, config, r, p)).trace(weights, rows, pages)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("mosaic_gpu_v2") == expected
        assert text.count("paged_attention") >= 1
