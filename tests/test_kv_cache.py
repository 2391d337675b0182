"""The paged cache of a layer: what is written where, what is read back, and what is dropped."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sharded_llama.config import LlamaConfig
from sharded_llama.errors import ConfigError
from sharded_llama.kv_cache import EIGHT_BIT, KVPages, cache_dtype, page_bytes
from sharded_llama.mesh import make_mesh
from sharded_llama.sharding import SPECS

CONFIG = LlamaConfig(
    dim=64,
    n_layers=2,
    n_heads=8,
    n_kv_heads=4,
    head_dim=8,
    ffn_dim=50,
    vocab_size=131,
    norm_eps=1e-5,
    rope_theta=1e4,
    dtype="float32",
)
N_PAGES, PAGE, HEADS, WIDTH = 5, 16, 4, 8
PLACES = N_PAGES * PAGE
write = jax.jit(KVPages.write)
read = jax.jit(KVPages.read, static_argnums=2)
copy = jax.jit(KVPages.copy)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def filled(kv_dtype="float32"):
    """Pages that hold something everywhere."""
    empty = KVPages.new(CONFIG, make_mesh(), N_PAGES, kv_dtype)[0]
    return write(empty, normal(0, PLACES, HEADS, WIDTH), normal(1, PLACES, HEADS, WIDTH), jnp.arange(PLACES))


def places_of(pages):
    """Every array of the pages by place, as bits on the host."""
    return [np.asarray(x).reshape(PLACES, *x.shape[2:]).view(f"u{x.dtype.itemsize}") for x in jax.tree.leaves(pages)]


def restored(pages, dtype=jnp.float32):
    """Keys and values (places, G, K)."""
    return [np.asarray(x).reshape(PLACES, HEADS, WIDTH) for x in read(pages, jnp.arange(N_PAGES), dtype)]


class TestShapes:
    @pytest.mark.parametrize("kv_dtype", ["auto", "bfloat16", "int8", "float8_e4m3fn"])
    @pytest.mark.parametrize(("mesh_shape", "n_kv_heads"), [((1, 1), 4), ((2, 4), 4), ((1, 8), 8)], ids=str)
    def test_each_data_shard_has_a_pool_of_its_own(self, mesh_shape, n_kv_heads, kv_dtype):
        mesh = make_mesh(*mesh_shape)
        layers = KVPages.new(CONFIG, mesh, N_PAGES, kv_dtype)
        assert len(layers) == CONFIG.n_layers
        shape = (mesh_shape[0] * N_PAGES, PAGE, 2 * n_kv_heads, WIDTH)
        for layer, abstract in zip(layers, KVPages.abstract(CONFIG, mesh, N_PAGES, kv_dtype), strict=True):
            assert layer.kv_NPGK.shape == shape
            assert layer.kv_NPGK.dtype == ("float32" if kv_dtype == "auto" else kv_dtype)
            assert (layer.scale_NPG is not None) == (kv_dtype in EIGHT_BIT)
            for x, expected in zip(jax.tree.leaves(layer), jax.tree.leaves(abstract), strict=True):
                assert (x.shape, x.dtype, x.sharding) == (expected.shape, expected.dtype, expected.sharding)
                assert x.sharding.spec == SPECS["kv_pages"]
                assert not np.asarray(x).astype(np.float32).any()

    @pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4), (1, 8)], ids=str)
    def test_bytes_of_a_page(self, mesh_shape):
        """Keys and values of both layers on one device: bytes of its heads, and four for each scale."""
        heads = 2 * max(HEADS, mesh_shape[1]) // mesh_shape[1]
        of = functools.partial(page_bytes, CONFIG, make_mesh(*mesh_shape))
        numbers = CONFIG.n_layers * PAGE * heads
        assert of("auto") == of("float32") == numbers * WIDTH * 4
        assert of("bfloat16") == numbers * WIDTH * 2
        assert of("int8") == of("float8_e4m3fn") == numbers * (WIDTH + 4)

    def test_names_of_types(self):
        assert cache_dtype(CONFIG, "auto") == jnp.float32
        assert cache_dtype(CONFIG.replace(dtype="bfloat16"), "auto") == jnp.bfloat16
        assert cache_dtype(CONFIG, "int8") == jnp.int8
        with pytest.raises(ConfigError, match="kv_cache_dtype='fp8' is not one of auto, bfloat16"):
            cache_dtype(CONFIG, "fp8")


class TestWrite:
    @pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
    def test_tokens_go_to_their_places_and_nowhere_else(self, kv_dtype):
        before, places = filled(kv_dtype), np.array([37, 0, PLACES - 1, 16, 15])
        k, v = normal(2, 5, HEADS, WIDTH), normal(3, 5, HEADS, WIDTH)
        after = write(before, k, v, jnp.asarray(places))
        dtype = np.dtype(kv_dtype)
        expected = np.asarray(before.kv_NPGK).copy()
        for token, place in enumerate(places):
            for head in range(HEADS):
                expected[place // PAGE, place % PAGE, 2 * head] = k[token, head].astype(dtype)
                expected[place // PAGE, place % PAGE, 2 * head + 1] = v[token, head].astype(dtype)
        np.testing.assert_array_equal(np.asarray(after.kv_NPGK), expected)

    @pytest.mark.parametrize("kv_dtype", ["float32", "int8", "float8_e4m3fn"])
    def test_places_beyond_the_pool_are_dropped(self, kv_dtype):
        """However many tokens have none, and whatever their numbers are: the others are written, nothing else is."""
        before = filled(kv_dtype)
        k, v = normal(2, 7, HEADS, WIDTH), normal(3, 7, HEADS, WIDTH)
        places = np.array([PLACES, 20, PLACES, PLACES + 1, 2**31 - 1, PLACES, 3], np.int32)
        after = write(before, k, v, places)
        alone = write(before, k[[1, 6]], v[[1, 6]], places[[1, 6]])
        none = write(before, k, v, np.full(7, PLACES, np.int32))
        for x, of_alone, of_none, old in zip(*map(places_of, (after, alone, none, before)), strict=True):
            np.testing.assert_array_equal(x, of_alone)
            np.testing.assert_array_equal(of_none, old)
            np.testing.assert_array_equal(np.delete(x, [20, 3], axis=0), np.delete(old, [20, 3], axis=0))
            assert (x[[20, 3]] != old[[20, 3]]).any()

    @pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
    def test_what_is_not_finite_is_stored_as_zero(self, kv_dtype):
        """The other numbers of its head are what they are beside a zero."""
        k, v = normal(2, 2, HEADS, WIDTH), normal(3, 2, HEADS, WIDTH)
        zeros = k.copy(), v.copy()
        for x, zero in zip((k, v), zeros, strict=True):
            for place, value in (((0, 1, 3), np.nan), ((0, 2, 0), np.inf), ((1, 0, 7), -np.inf)):
                x[place], zero[place] = value, 0
        spoiled, clean = (write(filled(kv_dtype), *of, jnp.array([5, 70])) for of in ((k, v), zeros))
        for x, expected in zip(*map(places_of, (spoiled, clean)), strict=True):
            np.testing.assert_array_equal(x, expected)


class TestRead:
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_keys_and_values_of_the_pages_asked_for(self, dtype):
        k, v = normal(0, PLACES, HEADS, WIDTH), normal(1, PLACES, HEADS, WIDTH)
        tables = np.array([[4, 0, 4], [2, 1, 3]])
        for ours, written in zip(read(filled(), tables, dtype), (k, v), strict=True):
            assert ours.dtype == dtype
            expected = written.reshape(N_PAGES, PAGE, HEADS, WIDTH)[tables].astype(np.dtype(dtype))
            np.testing.assert_array_equal(np.asarray(ours), expected)

    @pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
    def test_numbers_beyond_the_pool_read_some_page(self, kv_dtype):
        pages = filled(kv_dtype)
        inside = read(pages, np.arange(N_PAGES), jnp.float32)
        outside = read(pages, np.array([N_PAGES, 2**31 - 1], np.int32), jnp.float32)
        for x, of_pages in zip(outside, inside, strict=True):
            for page in np.asarray(x):
                assert any((page == other).all() for other in np.asarray(of_pages))


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_copy(kv_dtype):
    """Whole pages with their scales; all are read before one is written; a target beyond the pool is nothing."""
    before = filled(kv_dtype)
    source, target = np.array([0, 1, 2, 9]), np.array([1, 3, N_PAGES, 2**31 - 1])
    after = copy(before, source, target)
    for new, old in zip(*map(places_of, (after, before)), strict=True):
        new, old = (x.reshape(N_PAGES, PAGE, *x.shape[1:]) for x in (new, old))
        np.testing.assert_array_equal(new, old[[0, 0, 2, 1, 4]])


@pytest.mark.parametrize("kv_dtype", list(EIGHT_BIT))
class TestEightBit:
    def allowed(self, kv_dtype, x):
        """Half of the distance between neighbouring stored values, in units of the head's largest value.

        int8 has steps of 1/127. float8_e4m3fn has three bits of mantissa, and steps of 2**-9 below 2**-6.
        """
        peak = np.abs(x).max(-1, keepdims=True)
        if kv_dtype == "int8":
            return peak / 127 * 0.5
        return np.maximum(np.abs(x) * 2**-4, peak / 448 * 2**-10)

    def test_error_is_that_of_rounding(self, kv_dtype):
        """Heads of any size: each has a scale of its own. The factor is for float32's own rounding."""
        sizes = 10.0 ** np.linspace(-30, 30, PLACES * HEADS).reshape(PLACES, HEADS, 1).astype(np.float32)
        k, v = normal(2, PLACES, HEADS, WIDTH) * sizes, normal(3, PLACES, HEADS, WIDTH) * sizes[::-1]
        pages = write(filled(kv_dtype), k, v, jnp.arange(PLACES))
        assert pages.kv_NPGK.dtype == kv_dtype
        for ours, exact in zip(restored(pages), (k, v), strict=True):
            assert (np.abs(ours - exact) <= 1.00001 * self.allowed(kv_dtype, exact)).all()
            # The bound is not generous: some values are nearly as far off.
            assert (np.abs(ours - exact) > 0.9 * self.allowed(kv_dtype, exact)).any()
            largest = np.abs(exact) == np.abs(exact).max(-1, keepdims=True)
            np.testing.assert_allclose(ours[largest], exact[largest], rtol=1e-6)

    def test_scale_is_the_largest_value_over_the_types(self, kv_dtype):
        k, v = normal(2, 1, HEADS, WIDTH), normal(3, 1, HEADS, WIDTH)
        scale = np.asarray(write(filled(kv_dtype), k, v, jnp.array([21])).scale_NPG)[1, 5]
        for head in range(HEADS):
            np.testing.assert_allclose(scale[2 * head], np.abs(k[0, head]).max() / EIGHT_BIT[kv_dtype], rtol=1e-6)
            np.testing.assert_allclose(scale[2 * head + 1], np.abs(v[0, head]).max() / EIGHT_BIT[kv_dtype], rtol=1e-6)

    def test_what_is_written_never_changes(self, kv_dtype):
        """A much larger token in the same page leaves the bits of its neighbours and of their scales."""
        before = filled(kv_dtype)
        k, v = 1e6 * normal(2, 1, HEADS, WIDTH), 1e6 * normal(3, 1, HEADS, WIDTH)
        after = write(before, k, v, jnp.array([21]))
        for new, old in zip(*map(places_of, (after, before)), strict=True):
            np.testing.assert_array_equal(np.delete(new, 21, axis=0), np.delete(old, 21, axis=0))
            assert (new[21] != old[21]).any()

    def test_the_same_token_has_the_same_bits_wherever_and_beside_whatever_it_is_written(self, kv_dtype):
        k, v = normal(2, 3, HEADS, WIDTH), normal(3, 3, HEADS, WIDTH)
        together = write(filled(kv_dtype), k, v, jnp.array([3, 40, 41]))
        alone = write(KVPages.new(CONFIG, make_mesh(), N_PAGES, kv_dtype)[0], k[1:2], v[1:2], jnp.array([7]))
        for x, y in zip(*map(places_of, (together, alone)), strict=True):
            np.testing.assert_array_equal(x[40], y[7])

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_zeros_and_the_smallest_values(self, kv_dtype, dtype):
        """A head of zeros is read as zeros. Values too small for a scale lose their bits, but stay finite and small."""
        tiny = float(ml_dtypes.finfo(dtype).tiny)
        k = np.zeros((2, HEADS, WIDTH), dtype)
        v = np.full((2, HEADS, WIDTH), tiny, dtype)
        pages = write(filled(kv_dtype), k, v, jnp.array([1, 30]))
        zeros, smallest = (x[[1, 30]] for x in restored(pages))
        np.testing.assert_array_equal(zeros, 0)
        assert (np.abs(smallest) <= 1.07 * tiny).all()

    def test_the_largest_values_of_a_type_stay_finite(self, kv_dtype):
        for dtype in ("float16", "bfloat16", "float32"):
            largest = np.full((1, HEADS, WIDTH), ml_dtypes.finfo(dtype).max, dtype)
            pages = write(filled(kv_dtype), largest, -largest, jnp.array([1]))
            k, v = (x[1] for x in restored(pages))
            np.testing.assert_allclose(k, largest[0].astype(np.float32), rtol=1e-6)
            np.testing.assert_array_equal(v, -k)
