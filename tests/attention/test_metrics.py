"""Metrics of attention over the paged cache against dense scores in NumPy, on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sampling import entropy_spec as spec

from sharded_llama.attention import metrics
from sharded_llama.attention.metrics import BLOCK, attention_metrics
from sharded_llama.attention.scores_gpu import paged_scores
from sharded_llama.kv_cache import EIGHT_BIT, PAGE_SIZE, KVPages
from sharded_llama.mesh import make_mesh
from sharded_llama.sharding import DATA, MODEL, SPECS

HEADS, WIDTH = 8, 16
KEPT = 2 * BLOCK  # in place of the module's: what is beyond is computed twice
LONG = 4 * BLOCK // PAGE_SIZE + 3  # pages of a table of more than four blocks
# Mesh, true kv heads: fewer than `model` shards are repeated.
MESHES = [((1, 1), 2), ((2, 4), 4), ((2, 4), 2), ((1, 8), 8), ((1, 8), 1)]


INTERPRETED = functools.partial(paged_scores, interpret=True)
both_ways = pytest.mark.parametrize("kernel", [None, INTERPRETED], ids=["plain", "kernel"])


@pytest.fixture(autouse=True)
def few_kept(monkeypatch):
    monkeypatch.setattr(metrics, "KEPT", KEPT)
    monkeypatch.setattr(metrics, "KERNEL_BLOCK", BLOCK)


@functools.cache
def on_mesh(data, model, kernel=None):
    """`attention_metrics` of global arrays."""
    specs = P(DATA, MODEL), SPECS["kv_pages"], P(DATA), P(DATA)
    run = functools.partial(attention_metrics, kernel=kernel)
    return jax.jit(
        jax.shard_map(run, mesh=make_mesh(data, model), in_specs=specs, out_specs=P(DATA), check_vma=kernel is None)
    )


write = jax.jit(KVPages.write)


class Case:
    """Rows of the given lengths in scattered pages of each data shard's pool, and what they say in float64."""

    def __init__(self, mesh, kv_heads, lengths, n_table, dtype="float32", kv_dtype=None, scale=1.0):
        rng = np.random.default_rng(0)
        data, model = mesh
        n_rows, cached = len(lengths), n_table * PAGE_SIZE
        per_shard = n_rows // data
        n_pages = per_shard * n_table + 2
        self.lengths = np.int32(lengths)
        q = jnp.asarray(scale * rng.standard_normal((n_rows, HEADS, WIDTH)), dtype)
        k = jnp.asarray(rng.standard_normal((n_rows, cached, kv_heads, WIDTH)), dtype)
        repeated = jnp.repeat(k, max(1, model // kv_heads), axis=2)
        tables = np.concatenate([rng.permutation(n_pages)[: per_shard * n_table] for _ in range(data)])
        tables = tables.reshape(n_rows, n_table)
        position = np.arange(cached)
        at = tables[:, position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
        at = at + np.repeat(np.arange(data), per_shard)[:, None] * n_pages * PAGE_SIZE
        kv_dtype = jnp.dtype(kv_dtype or dtype)
        shape = (data * n_pages, PAGE_SIZE, 2 * repeated.shape[2], WIDTH)
        scales = jnp.zeros(shape[:-1], jnp.float32) if kv_dtype.name in EIGHT_BIT else None
        live = position < self.lengths[:, None]
        keys = repeated.reshape(-1, *repeated.shape[2:])
        places = jnp.asarray(np.where(live, at, 2**30).reshape(-1), jnp.int32)  # beyond the pool: nowhere
        self.pages = write(KVPages(jnp.zeros(shape, kv_dtype), scales), keys, jnp.full_like(keys, 1e4), places)
        self.live = np.zeros(shape[:2], bool)
        self.live.reshape(-1)[at[live]] = True
        for row, length in enumerate(lengths):  # what no position needs
            tables[row, -(-length // PAGE_SIZE) :] = rng.integers(n_pages, 2**31 - 1)
        self.args = q, self.pages, jnp.asarray(tables, jnp.int32), jnp.asarray(self.lengths)
        self.q, self.k = (np.float64(x.astype(jnp.float32)) for x in (q, k))
        self.mesh = mesh

    def ours(self, pages=None, kernel=None):
        q, _, tables, lengths = self.args
        return np.asarray(on_mesh(*self.mesh, kernel)(q, self.pages if pages is None else pages, tables, lengths))

    def scores(self, row):
        """Of the live positions: (H, S) float64."""
        k = np.repeat(self.k[row, : self.lengths[row]], HEADS // self.k.shape[2], axis=1)
        return np.einsum("hk,shk->hs", self.q[row], k) / WIDTH**0.5

    def exact(self):
        return np.stack([spec.attention_metrics(self.scores(row)) for row in range(len(self.lengths))])


RAGGED = [1, 0, 37, LONG * PAGE_SIZE, BLOCK, KEPT + 1, KEPT, BLOCK + 1]


@both_ways
@pytest.mark.parametrize(("mesh", "kv_heads"), MESHES, ids=str)
def test_ragged_rows(mesh, kv_heads, kernel):
    """Empty slots, one position, whole blocks and one more, the whole table."""
    case = Case(mesh, kv_heads, RAGGED, LONG)
    ours, exact = case.ours(kernel=kernel), case.exact()
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ours[1], 0)
    assert np.all(exact[2:, :2] > 0.01)  # heads differ: neither column could be a constant


@both_ways
def test_a_table_of_less_than_a_block(kernel):
    case = Case((2, 4), 4, [5, 16, 0, 40], 3)
    np.testing.assert_allclose(case.ours(kernel=kernel), case.exact(), rtol=1e-5, atol=1e-6)
    case.args = *case.args[:3], jnp.zeros(4, jnp.int32)
    np.testing.assert_array_equal(case.ours(), np.zeros((4, 4)))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0, 1000.0])
def test_flat_and_sharp_heads(scale):
    """From equal probabilities, whose entropy is log2 of the length, to one position with all of it."""
    case = Case((1, 8), 2, [7, 300, BLOCK + 9, 3], LONG, scale=scale)
    ours = case.ours()
    np.testing.assert_allclose(ours, case.exact(), rtol=1e-4, atol=2e-5)
    if scale == 0:
        np.testing.assert_allclose(ours[:, 0], np.log2(case.lengths), rtol=1e-6)
        np.testing.assert_allclose(ours[:, 1:], 0, atol=1e-7)


def test_heads_that_agree():
    """The same query and the same keys in every head: no head differs from the mean, wherever it is computed."""
    case = Case((1, 8), 1, [5, 100, BLOCK + 30, 64], LONG)
    q, pages, tables, lengths = case.args
    case.args = jnp.broadcast_to(q[:, :1], q.shape), pages, tables, lengths
    ours = case.ours()
    np.testing.assert_allclose(ours[:, 1], 0, atol=1e-10)
    np.testing.assert_allclose(ours[:, 2], 0, atol=1e-7)
    assert np.all(ours[:, 0] > 1)


@both_ways
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, kernel):
    """Products of half types are exact in float32: no farther from the exact scores of the same inputs."""
    case = Case((2, 4), 2, RAGGED, LONG, dtype)
    np.testing.assert_allclose(case.ours(kernel=kernel), case.exact(), rtol=1e-5, atol=1e-6)


@both_ways
@pytest.mark.parametrize("kv_dtype", list(EIGHT_BIT))
def test_eight_bit_cache(kv_dtype, kernel):
    """What the stored keys say exactly, and what the keys said within the rounding of the type.

    Rounding moves a score by at most |q| times the largest error of a key over sqrt(K), d: interaction by at most d, a
    probability by at most a factor exp(2 d).
    """
    case = Case((1, 8), 2, RAGGED, LONG, kv_dtype=kv_dtype)
    ours, exact = case.ours(kernel=kernel), case.exact()
    tables = case.args[2]
    stored = case.pages.read(tables, jnp.float32)[0]
    written = case.k
    case.k = np.float64(stored.reshape(len(RAGGED), -1, *stored.shape[3:]))[:, :, :: stored.shape[3] // case.k.shape[2]]
    np.testing.assert_allclose(ours, case.exact(), rtol=1e-5, atol=1e-6)

    live = np.arange(written.shape[1]) < case.lengths[:, None]
    error = np.where(live[..., None, None], np.abs(case.k - written), 0)
    moved = np.abs(case.q).sum(-1).max(-1) * error.max((1, 2, 3)) / WIDTH**0.5
    assert 0 < moved.max() < 1
    differs = np.abs(ours - exact)
    assert np.all(differs[:, 3] <= moved + 1e-6)
    # |A' - A| <= A (exp(2 d) - 1) for every head, and so for the mean; mean_j A is 1 / length.
    assert np.all(differs[:, 2] <= 2 * np.expm1(2 * moved) / np.maximum(case.lengths, 1) + 1e-6)
    # Typical errors are far below the largest: entropies stay within a few hundredths of a bit.
    assert np.max(differs[:, :2]) < (0.1 if kv_dtype == "float8_e4m3fn" else 0.02)


@both_ways
@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_what_is_not_live_changes_no_bit(kv_dtype, kernel):
    """Neither NaN nor anything else in places beyond a row's length, of other rows, or of values."""
    case = Case((1, 8), 2, RAGGED, LONG, kv_dtype=kv_dtype)
    clean = case.ours(kernel=kernel)
    is_live_key = case.live[:, :, None] & (np.arange(case.pages.kv_NPGK.shape[2]) % 2 == 0)
    for rubbish in (77, jnp.nan):
        filling = jnp.asarray(77 if kv_dtype == "int8" else rubbish, case.pages.kv_NPGK.dtype)
        kv = jnp.where(is_live_key[..., None], case.pages.kv_NPGK, filling)
        scale = None if case.pages.scale_NPG is None else jnp.where(is_live_key, case.pages.scale_NPG, rubbish)
        np.testing.assert_array_equal(case.ours(KVPages(kv, scale), kernel), clean)


def test_a_row_does_not_depend_on_the_others():
    """Bit for bit: beside short rows, long ones, and rows that are not used."""
    case = Case((1, 8), 2, [300, 0, 37, LONG * PAGE_SIZE], LONG)
    together = case.ours()
    q, pages, tables, lengths = case.args
    for row in (0, 2):
        alone = jnp.where(jnp.arange(4) == row, lengths, 0)
        case.args = q, pages, tables, alone
        np.testing.assert_array_equal(case.ours()[row], together[row])


def test_memory_does_not_grow_with_the_context():
    """Eight times the table: the same temporaries."""

    def temporaries(n_table):
        pages = KVPages(jax.ShapeDtypeStruct((4096, PAGE_SIZE, 4, WIDTH), jnp.float32))
        shapes = [((8, HEADS, WIDTH), jnp.float32), ((8, n_table), jnp.int32), ((8,), jnp.int32)]
        q, tables, lengths = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes)
        compiled = on_mesh(1, 1).lower(q, pages, tables, lengths).compile()
        return compiled.memory_analysis().temp_size_in_bytes - 8 * n_table * 4  # the padded table is copied

    few, many = (temporaries(n * KEPT // PAGE_SIZE) for n in (2, 16))
    assert few > 8 * HEADS * KEPT * 4  # the scores that are kept are among them
    assert many < 1.1 * few
