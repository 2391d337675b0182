"""The paged kernel for NVIDIA GPUs, interpreted on the CPU, against the specification; and that it lowers for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_reference import distance

from sharded_llama.attention.paged import paged_attn_reference
from sharded_llama.attention.paged_gpu import Tuning, paged_attn_gpu
from sharded_llama.errors import ConfigError
from sharded_llama.kv_cache import EIGHT_BIT, PAGE_SIZE, KVPages

HALF = ("bfloat16", "float16")
SMALL_BLOCKS = Tuning(block=16, num_warps=4, num_stages=2, tile=16)
TWO_LOOPS = SMALL_BLOCKS._replace(two_loops=True)


def inputs(batch, length, heads, kv_heads, width, n_table, dtype="float32", kv_dtype=None, seed=0):
    """Rows of different lengths, their pages scattered over the pool. Numbers after a row's last page are beyond it."""
    rng = np.random.default_rng(seed)
    n_pages = batch * n_table + 2
    kv = rng.standard_normal((n_pages, PAGE_SIZE, 2 * kv_heads, width)).astype(np.float32)
    q = jnp.asarray(rng.standard_normal((batch, length, heads, width)), dtype)
    start = rng.integers(0, n_table * PAGE_SIZE - length + 1, batch)
    tables = rng.permutation(n_pages)[: batch * n_table].reshape(batch, n_table)
    for row, last in enumerate((start + length - 1) // PAGE_SIZE):
        tables[row, last + 1 :] = rng.integers(n_pages, 2**31 - 1, n_table - last - 1)
    pages = stored(kv, kv_dtype or dtype)
    return q, pages, jnp.asarray(tables, jnp.int32), jnp.asarray(start, jnp.int32)


def stored(kv, kv_dtype):
    if kv_dtype not in EIGHT_BIT:
        return KVPages(jnp.asarray(kv, kv_dtype))
    scale = np.abs(kv).max(-1) / EIGHT_BIT[kv_dtype]
    kv = kv / scale[..., None]
    return KVPages(jnp.asarray(np.round(kv) if kv_dtype == "int8" else kv, kv_dtype), jnp.asarray(scale))


@functools.cache
def compiled(function, **settings):
    """Jitted once. Compiled without optimisation: nearly all of these tests' time is the compiler's."""
    return jax.jit(functools.partial(function, **settings), compiler_options={"xla_backend_optimization_level": 0})


def kernel(*args, **settings):
    return compiled(paged_attn_gpu, **settings, interpret=True)(*args)


def reference(*args):
    return compiled(paged_attn_reference)(*args)


@pytest.mark.parametrize(
    ("shape", "splits"),
    [
        ((4, 1, 8, 2, 64, 9), (1, 8)),
        ((1, 1, 3, 3, 128, 3), (8,)),
        ((3, 5, 6, 2, 80, 5), (3,)),
        ((2, 16, 14, 2, 8, 4), (1, 8)),
        ((1, 31, 4, 1, 16, 7), (3,)),
    ],
    ids=str,
)
def test_float32(shape, splits):
    args = inputs(*shape)
    for n_splits in splits:
        ours = kernel(*args, n_splits=n_splits, tuning=SMALL_BLOCKS)
        assert distance(ours, reference(*args)) < 1e-6
        in_two_loops = kernel(*args, n_splits=n_splits, tuning=TWO_LOOPS)
        assert distance(in_two_loops, reference(*args)) < 1e-6


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 1, 8, 2, 64, 40), "float32"), ((2, 33, 8, 2, 24, 11), "bfloat16")], ids=str
)
def test_by_default(shape, dtype):
    """The default blocks, tiles and splits."""
    q, pages, tables, start = inputs(*shape, dtype)
    exact = reference(q.astype(jnp.float32), pages, tables, start)
    bound = 1e-6 if dtype == "float32" else 1.25 * distance(reference(q, pages, tables, start), exact)
    assert distance(kernel(q, pages, tables, start), exact) < bound


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float32", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", ["float32", *HALF])
def test_types(dtype, kv_dtype):
    """No farther from float32, with the same stored values, than the specification is in that type."""
    q, pages, tables, start = inputs(2, 5, 8, 2, 64, 5, dtype, kv_dtype)
    exact = reference(q.astype(jnp.float32), pages, tables, start)
    bound = 1.25 * distance(reference(q, pages, tables, start), exact) if dtype in HALF else 1e-6
    ours = kernel(q, pages, tables, start, n_splits=1 if kv_dtype == dtype else 3, tuning=Tuning(32, 4, 2))
    assert ours.dtype == dtype
    assert distance(ours, exact) < bound


@pytest.mark.parametrize("magnitude", [1e-3, 1e3])
def test_float16_with_scales(magnitude):
    """Probability times scale stays among float16's exponents, whatever the values' size."""
    q, pages, tables, start = inputs(2, 3, 4, 2, 32, 6, "float16", "int8")
    value = np.arange(2 * 2) % 2 == 1
    pages = pages._replace(scale_NPG=pages.scale_NPG * np.where(value, magnitude, 1).astype(np.float32))
    exact = reference(q.astype(jnp.float32), pages, tables, start)
    assert distance(kernel(q, pages, tables, start, n_splits=1), exact) < 1e-3


@pytest.mark.parametrize(("kv_dtype", "n_splits"), [("float32", 1), ("float32", 3), ("int8", 1), ("float8_e4m3fn", 3)])
def test_what_is_not_visible_changes_no_bit(kv_dtype, n_splits):
    q, pages, tables, start = inputs(3, 2, 4, 2, 16, 4, kv_dtype=kv_dtype)
    tuning = TWO_LOOPS if n_splits == 1 else SMALL_BLOCKS
    clean = kernel(q, pages, tables, start, n_splits=n_splits, tuning=tuning)
    assert np.isfinite(clean).all()
    visible = np.zeros(pages.kv_NPGK.shape[:2], bool)
    for row in range(3):
        for position in range(int(start[row]) + 2):
            visible[tables[row, position // PAGE_SIZE], position % PAGE_SIZE] = True
    kv = pages.kv_NPGK
    kv = jnp.where(visible[..., None, None], kv, jnp.asarray(77 if kv_dtype == "int8" else jnp.nan, kv.dtype))
    scale = pages.scale_NPG
    scale = None if scale is None else jnp.where(visible[..., None], scale, jnp.nan)
    spoiled = kernel(q, KVPages(kv, scale), tables, start, n_splits=n_splits, tuning=tuning)
    np.testing.assert_array_equal(spoiled, clean)


@pytest.mark.parametrize("n_splits", [1, 5])
def test_a_row_does_not_depend_on_the_others(n_splits):
    """Row 1 among short rows, among long ones, and beside a row that is not used and whose table is rubbish."""
    q, pages, tables, _ = inputs(3, 3, 6, 2, 16, 5)
    tables = np.asarray(tables) % pages.kv_NPGK.shape[0]
    rubbish = np.array([[-(2**31)], [0], [2**31 - 1]], np.int32) + np.zeros_like(tables)
    rubbish[1] = tables[1]
    outcomes = []
    for table, start in ((tables, [0, 41, 7]), (tables, [77, 41, 70]), (rubbish, [77, 41, 0])):
        noise = jax.random.normal(jax.random.key(start[0]), q.shape).at[1].set(q[1])
        args = noise, pages, jnp.asarray(table), jnp.asarray(start, jnp.int32)
        outcomes.append(np.asarray(kernel(*args, n_splits=n_splits, tuning=SMALL_BLOCKS))[1])
        assert distance(outcomes[-1], np.asarray(reference(*args))[1]) < 1e-6
    np.testing.assert_array_equal(outcomes[0], outcomes[1])
    np.testing.assert_array_equal(outcomes[0], outcomes[2])


def lowered(q_shape, pool_shape, dtype, kv_dtype, n_splits=None):
    scale = jax.ShapeDtypeStruct(pool_shape[:-1], jnp.float32) if kv_dtype in EIGHT_BIT else None
    args = (
        jax.ShapeDtypeStruct(q_shape, dtype),
        KVPages(jax.ShapeDtypeStruct(pool_shape, kv_dtype), scale),
        jax.ShapeDtypeStruct((q_shape[0], 512), jnp.int32),
        jax.ShapeDtypeStruct(q_shape[:1], jnp.int32),
    )
    traced = jax.jit(lambda *a: paged_attn_gpu(*a, n_splits=n_splits)).trace(*args)
    try:
        return traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:  # later versions of JAX lower only where there is a GPU
        if "No supported GPU devices found" not in str(error):
            raise
        pytest.skip("this version of JAX needs a GPU to lower for one")


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float32", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", ["float32", *HALF])
def test_lowers(dtype, kv_dtype):
    for length, n_splits in ((1, None), (64, 1)):
        text = lowered((2, length, 32, 128), (100, PAGE_SIZE, 16, 128), dtype, kv_dtype, n_splits)
        assert text.count("__gpu$xla.gpu.triton") == (2 if n_splits is None else 1)  # the second merges the splits


def test_pools_that_cannot_be_addressed():
    """An 8-bit pool of 2 to 4 GiB has offsets that overflow; larger ones have 64-bit offsets."""
    q_shape, of_page, per_gib = (2, 1, 32, 128), (PAGE_SIZE, 16, 128), 2**30 // (PAGE_SIZE * 16 * 128)
    for n_pages in (2 * per_gib, 4 * per_gib + 1):
        assert "xla.gpu.triton" in lowered(q_shape, (n_pages, *of_page), "bfloat16", "int8")
    for n_pages in (2 * per_gib + 1, 4 * per_gib):
        with pytest.raises(ConfigError, match="cannot be addressed"):
            lowered(q_shape, (n_pages, *of_page), "bfloat16", "int8")
    assert "xla.gpu.triton" in lowered(q_shape, (4 * per_gib, *of_page), "bfloat16", "bfloat16")
    with pytest.raises(ConfigError, match="fewer than 2\\*\\*31 keys"):
        lowered((2, 1, 8, 8), (2**31 // (PAGE_SIZE * 4), PAGE_SIZE, 4, 8), "bfloat16", "bfloat16")
