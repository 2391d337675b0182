"""Attention over pages on TPUs, by an interpreter that simulates a TPU's memories and copies, against the reference.

JAX's own kernel cannot be interpreted; what it is called with is held to the package's plain form of it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_reference import distance
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from sharded_llama.attention import paged_tpu
from sharded_llama.attention.paged import paged_attn_reference
from sharded_llama.attention.paged_tpu import paged_attn_tpu, ragged_arguments, supports
from sharded_llama.kv_cache import KVPages

FITS = dict(
    dtype="bfloat16", kv_dtype="bfloat16", n_heads=4, n_kv_heads=1, head_dim=128, page_size=16, batch=8, n_tables=64
)


def inputs(starts, length, kv_heads, group, width, n_tables, page_size=16, dtype=jnp.float32):
    """Rows with pages of their own in any order; what no row sees is NaN, and pages that none needs lie beyond."""
    rng = np.random.default_rng(0)
    batch = len(starts)
    n_pages = batch * n_tables + 2
    q = rng.standard_normal((batch, length, kv_heads * group, width)).astype(np.float32)
    kv = rng.standard_normal((n_pages, page_size, 2 * kv_heads, width)).astype(np.float32)
    tables = rng.permutation(n_pages)[: batch * n_tables].reshape(batch, n_tables)
    seen = np.zeros((n_pages, page_size), bool)
    for row, start in enumerate(starts):
        needed = start + length
        for w in range(n_tables):
            seen[tables[row, w], : max(0, needed - w * page_size)] = True
        tables[row, -(-needed // page_size) :] = n_pages + 7
    kv[~seen] = np.nan
    return jnp.asarray(q, dtype), KVPages(jnp.asarray(kv, dtype)), jnp.asarray(tables), jnp.asarray(starts)


def interpreted(*args):
    return jax.jit(functools.partial(paged_attn_tpu, interpret=True))(*args)


def reference(*args):
    return jax.jit(paged_attn_reference)(*args)


SHAPES = {  # starts, queries, kv heads, query heads for each, width, pages per row
    "decode": ([0, 15, 16, 31, 32, 100], 1, 2, 4, 64, 7),
    "decode-1-kv-head": ([77, 3], 1, 1, 8, 128, 6),
    "chunk": ([0, 33], 18, 1, 3, 64, 4),
    "chunk-of-several-blocks": ([5, 40], 17, 1, 16, 128, 4),
    "odd-kv-heads": ([9, 60], 3, 3, 2, 64, 5),
}


@pytest.fixture(autouse=True)
def blocks_of_32_positions(monkeypatch):
    """Short rows have several blocks of pages; and the interpreter takes seconds to trace large ones."""
    monkeypatch.setattr(paged_tpu, "KEYS", 32)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float32(shape):
    args = inputs(*shape)
    assert distance(interpreted(*args), reference(*args)) < 1e-6


@pytest.mark.parametrize("shape", [SHAPES["decode"], SHAPES["chunk"]], ids=["decode", "chunk"])
def test_bfloat16_is_as_near_to_float32_as_the_reference_is(shape):
    q, pages, *where = inputs(*shape, dtype=jnp.bfloat16)
    exact = reference(q.astype(jnp.float32), KVPages(pages.kv_NPGK.astype(jnp.float32)), *where)
    ours = interpreted(q, pages, *where)
    assert ours.dtype == jnp.bfloat16
    assert distance(ours, exact) < 1.25 * distance(reference(q, pages, *where), exact)


@pytest.mark.parametrize("page_size", [8, 64])
def test_page_sizes(page_size):
    args = inputs([0, 31, 100], 2, 1, 4, 64, 128 // page_size, page_size)
    assert distance(interpreted(*args), reference(*args)) < 1e-6


def test_a_row_does_not_depend_on_the_others():
    q, pages, tables, start = inputs([40, 3], 1, 1, 4, 64, 3)
    together = interpreted(q, pages, tables, start)
    alone = interpreted(q[1:2], pages, tables[1:2], start[1:2])
    np.testing.assert_array_equal(together[1:2], alone)


def test_a_row_whose_padding_leaves_the_table():
    """The last chunk of a full sequence: its real queries are right, and the row after it is."""
    q, pages, tables, start = inputs([70, 10], 8, 1, 4, 64, 5)
    start = start.at[0].add(5)  # queries at 75..82 of a table of 80
    pages = KVPages(jnp.nan_to_num(pages.kv_NPGK))
    got = interpreted(q, pages, tables, start)
    expected = reference(q, pages, tables, start)
    assert distance(got[0, :5], expected[0, :5]) < 1e-6
    assert distance(got[1], expected[1]) < 1e-6


@pytest.mark.parametrize("length", [1, 6])
def test_arguments_of_the_ragged_kernel(length):
    q, pages, tables, start = inputs([0, 17], length, 2, 3, 128, 2)
    pages = KVPages(jnp.nan_to_num(pages.kv_NPGK))  # the plain form multiplies by what it hides
    out = ref_ragged_paged_attention(*ragged_arguments(q, pages.kv_NPGK, tables, start), sm_scale=128**-0.5)
    assert distance(out.reshape(q.shape), reference(q, pages, tables, start)) < 1e-6


@pytest.mark.parametrize(
    ("kv_heads", "width", "dtype", "n_tables", "ragged"),
    [
        (1, 128, jnp.bfloat16, 256, True),
        (8, 128, jnp.float32, 256, True),
        (16, 256, jnp.bfloat16, 256, True),
        (3, 128, jnp.bfloat16, 256, False),
        (8, 64, jnp.bfloat16, 256, False),
        (1, 128, jnp.bfloat16, 1 << 15, False),
    ],
)
def test_which_kernel_serves(kv_heads, width, dtype, n_tables, ragged, monkeypatch):
    monkeypatch.setattr(paged_tpu, "_by_jax", lambda *_: "JAX's")
    monkeypatch.setattr(paged_tpu, "_by_ours", lambda *_: "ours")
    q, kv = jax.ShapeDtypeStruct((8, 1, 16, width), dtype), jax.ShapeDtypeStruct((9, 16, 2 * kv_heads, width), dtype)
    tables, start = jax.ShapeDtypeStruct((8, n_tables), jnp.int32), jax.ShapeDtypeStruct((8,), jnp.int32)
    assert paged_attn_tpu(q, KVPages(kv), tables, start) == ("JAX's" if ragged else "ours")
    assert paged_attn_tpu(q, KVPages(kv), tables, start, interpret=True) == "ours"


class TestSupports:
    @pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 8])
    @pytest.mark.parametrize("width", [64, 128])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_fits(self, kv_heads, width, dtype):
        shape = dict(n_heads=8 * kv_heads, n_kv_heads=kv_heads, head_dim=width, dtype=dtype, kv_dtype=dtype)
        assert supports(**(FITS | shape)) is None

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (dict(dtype="float16", kv_dtype="float16"), "not float16"),
            (dict(dtype="float64", kv_dtype="float64"), "not float64"),
            (dict(kv_dtype="int8"), "a cache of int8"),
            (dict(kv_dtype="float8_e4m3fn"), "a cache of float8_e4m3fn"),
            (dict(kv_dtype="float32"), "not bfloat16 and float32"),
            (dict(head_dim=96), "not 96"),
            (dict(n_kv_heads=3), "4 query heads cannot share 3"),
            (dict(page_size=12), "not 12"),
            (dict(page_size=1 << 12, n_heads=32, n_kv_heads=32), "a page of 4096 positions of 32 kv heads"),
            (dict(batch=64, n_tables=4096), "64 x 4096 pages"),
        ],
    )
    def test_does_not_fit(self, change, reason):
        assert reason in supports(**(FITS | change))
