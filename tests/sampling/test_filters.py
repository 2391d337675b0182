"""Which tokens the filters keep, against the specification, by way of the candidates and of the search."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sampling import sampler_spec as spec

from sharded_llama.mesh import make_mesh
from sharded_llama.sampling import SamplingParams, filters
from sharded_llama.sampling.filters import Filters, is_kept, last_kept, top_tokens
from sharded_llama.sharding import MODEL, padded

MESHES = [(1, 1), (2, 2), (1, 8), (4, 2), (8, 1), (1, 4)]


@functools.cache
def keep(mesh_shape, vocab):
    """A jitted function: which tokens of whole rows (R, V) are kept."""
    mesh = make_mesh(*mesh_shape)

    def local(logits, *columns):
        f = Filters(*columns)
        peak = jax.lax.pmax(logits.max(-1), MODEL)
        cut = last_kept(logits, peak, top_tokens(logits, min(filters.K, vocab)), f, vocab)
        ids = jax.lax.axis_index(MODEL) * logits.shape[1] + jnp.arange(logits.shape[1])
        return is_kept(logits, ids[None], peak, cut, f)

    specs = (P("data", "model"), *[P("data")] * 4)
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data", "model"), check_vma=False))


def kept_tokens(logits, params, mesh_shape=(1, 1)):
    """Booleans (R, V) for rows of logits with parameters of their own."""
    vocab = logits.shape[1]
    wide = np.pad(logits, ((0, 0), (0, padded(vocab, mesh_shape[1]) - vocab)), constant_values=-np.inf)
    columns = [np.array([getattr(p, name) for p in params]) for name in ("temperature", "top_k", "top_p", "min_p")]
    types = (np.float32, np.int32, np.float32, np.float32)
    found = keep(mesh_shape, vocab)(
        wide.astype(np.float32), *(c.astype(t) for c, t in zip(columns, types, strict=True))
    )
    return np.asarray(found)[:, :vocab]


def check(logits, params, found):
    """Exactly the specification's tokens, but for those at the very edge of top_p or min_p, where rounding decides."""
    for row, p, kept in zip(np.asarray(logits, np.float32), params, found, strict=True):
        top_p = p.top_p + 3e-5 if p.top_p < 1 else 1
        few = dataclasses.replace(p, top_p=max(1e-9, p.top_p - 3e-5), min_p=min(1, p.min_p * (1 + 1e-5)))
        many = dataclasses.replace(p, top_p=min(1, top_p), min_p=p.min_p * (1 - 1e-5))
        least, most = (spec.kept(row.astype(np.float64), q) for q in (few, many))
        assert not (least & ~kept).any(), (p, "a token is missing", np.flatnonzero(least & ~kept)[:5])
        assert not (kept & ~most).any(), (p, "a token is too many", np.flatnonzero(kept & ~most)[:5])
        if p.top_k > 0:
            assert kept.sum() <= p.top_k


def adversarial(vocab, rng):
    """Rows of logits, by name."""
    one_hot = np.full(vocab, -50.0)
    one_hot[vocab // 2] = 50
    masked = rng.normal(size=vocab)
    masked[rng.random(vocab) < 0.9] = -np.inf
    only_one = np.full(vocab, -np.inf)
    only_one[vocab - 1] = 3.0
    return {
        "normal": 2 * rng.normal(size=vocab),
        "narrow": 1e-3 * rng.normal(size=vocab),
        "wide": 40 * rng.normal(size=vocab),
        "flat": np.zeros(vocab),
        "negative flat": np.full(vocab, -7.25),
        "few values": rng.integers(0, 3, vocab).astype(float),
        "signed zeros": np.where(rng.random(vocab) < 0.5, 0.0, -0.0),
        "one hot": one_hot,
        "masked": masked,
        "only one": only_one,
        "falling": -np.log(1 + np.arange(vocab)),
        "huge": np.where(rng.random(vocab) < 0.01, 3e38, -3e38),
    }


SETTINGS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 300},
    {"top_k": 900, "top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"min_p": 0.3},
    {"min_p": 0.01, "top_p": 0.8},
    {"min_p": 0.001, "top_k": 400, "top_p": 0.95},
    {"temperature": 5.0, "top_p": 0.7},
    {"temperature": 0.01, "top_p": 0.7, "top_k": 500},
]


@pytest.mark.parametrize(
    ("vocab", "mesh_shape"), list(zip((1031, 997, 4099, 500, 130, 37), MESHES, strict=True)), ids=str
)
def test_every_filter_on_adversarial_logits(vocab, mesh_shape):
    rows = adversarial(vocab, np.random.default_rng(vocab))
    cases = [(name, row, SamplingParams(**s)) for name, row in rows.items() for s in SETTINGS]
    cases += cases[: -len(cases) % 8]  # any mesh takes a multiple of 8
    logits, params = np.array([c[1] for c in cases], np.float32), [c[2] for c in cases]
    check(logits, params, kept_tokens(logits, params, mesh_shape))


def test_every_mesh_keeps_the_same_tokens():
    vocab, rng = 1031, np.random.default_rng(3)
    cases = [(row, SamplingParams(**s)) for row in adversarial(vocab, rng).values() for s in SETTINGS]
    cases += cases[: -len(cases) % 8]
    logits, params = np.array([c[0] for c in cases], np.float32), [c[1] for c in cases]
    all_meshes = [(d, m) for d in (1, 2, 4, 8) for m in (1, 2, 4, 8) if d * m <= 8]
    first, *others = (kept_tokens(logits, params, mesh_shape) for mesh_shape in all_meshes)
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("mesh_shape", [(1, 1), (1, 8)], ids=str)
def test_the_vocabulary_of_llama_3(mesh_shape):
    """128,256 tokens: blocks, candidates, and a nucleus that only the search finds."""
    vocab, rng = 128_256, np.random.default_rng(5)
    peaked = 4 * rng.normal(size=vocab)
    logits = np.array([peaked, peaked, rng.normal(size=vocab), np.round(peaked)], np.float32)
    params = [
        SamplingParams(top_k=50, top_p=0.9),
        SamplingParams(top_k=20_000),
        SamplingParams(top_p=0.95),
        SamplingParams(temperature=0.7, top_k=3000, top_p=0.99, min_p=1e-4),
    ]
    check(logits, params, kept_tokens(logits, params, mesh_shape))


@pytest.mark.parametrize("k", [1, 5, 20, 128])
def test_most_likely_tokens_are_in_order_also_among_equals(k):
    rng = np.random.default_rng(k)
    logits = np.concatenate([rng.integers(0, 50, (4, 9000)), rng.integers(0, 2, (2, 9000))]).astype(np.float32)
    mesh = make_mesh(1, 4)
    run = jax.shard_map(
        lambda x: top_tokens(x, k), mesh=mesh, in_specs=P(None, "model"), out_specs=P(), check_vma=False
    )
    found = jax.jit(run)(logits)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.ids_RK, order)
    np.testing.assert_array_equal(found.logits_RK, np.take_along_axis(logits, order, axis=1))
