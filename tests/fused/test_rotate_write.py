"""The kernel between projections and attention, interpreted, against plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharded_llama.config import LlamaConfig
from sharded_llama.fused.rotate_write import rotate_write, rotate_write_reference
from sharded_llama.kv_cache import KVPages
from sharded_llama.layers import rope_angles

N_PAGES, PAGE = 5, 4


def case(n_tokens, kv_heads, group, width, dtype):
    """Products, angles, pages that hold something, and places in any order, some of them nowhere."""
    heads = {"n_heads": kv_heads * group, "n_kv_heads": kv_heads, "head_dim": width}
    config = LlamaConfig(dim=64, n_layers=1, ffn_dim=64, vocab_size=32, norm_eps=1e-5, rope_theta=1e4, **heads)
    keys = jax.random.split(jax.random.key(width), 2)
    qkv = jax.random.normal(keys[0], (n_tokens, kv_heads, group + 2, width), dtype)
    cos_TK, sin_TK = rope_angles(config, jnp.arange(n_tokens) * 7 + 3)
    pages = KVPages(jax.random.normal(keys[1], (N_PAGES, PAGE, 2 * kv_heads, width), dtype))
    at_T = np.random.default_rng(0).permutation(N_PAGES * PAGE)[:n_tokens].astype(np.int32)
    at_T[1::3] = np.int32([N_PAGES * PAGE, 2**30, 2**31 - 1, 2**31 - 1, 2**31 - 1, 2**31 - 1])[: len(at_T[1::3])]
    return qkv, cos_TK, sin_TK, pages, jnp.asarray(at_T)


@pytest.mark.parametrize(
    ("dtype", "n_tokens", "kv_heads", "group", "width"),
    [
        ("float32", 1, 2, 4, 128),
        ("bfloat16", 7, 3, 1, 64),
        ("float16", 16, 1, 5, 48),
        ("bfloat16", 3, 2, 8, 80),
        ("float32", 16, 1, 5, 48),
    ],
)
def test_equals_the_reference(dtype, n_tokens, kv_heads, group, width):
    args = case(n_tokens, kv_heads, group, width, dtype)
    q_THK, pages = rotate_write(*args, interpret=True)
    expected_THK, expected = rotate_write_reference(*args)
    assert q_THK.dtype == expected_THK.dtype == jnp.dtype(dtype)
    tolerance = 1e-6 if dtype == "float32" else float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.float32(q_THK), np.float32(expected_THK), rtol=tolerance, atol=1e-6)
    kv, theirs = np.float32(pages.kv_NPGK), np.float32(expected.kv_NPGK)
    np.testing.assert_allclose(kv, theirs, rtol=tolerance, atol=1e-6)
    np.testing.assert_array_equal(kv[:, :, 1::2], theirs[:, :, 1::2])  # values are not rotated
    written = {int(at) for at in args[4] if at < N_PAGES * PAGE}
    others = [at for at in range(N_PAGES * PAGE) if at not in written]
    before = np.float32(args[3].kv_NPGK).reshape(N_PAGES * PAGE, -1)
    np.testing.assert_array_equal(kv.reshape(N_PAGES * PAGE, -1)[others], before[others])
    assert all(np.any(kv.reshape(N_PAGES * PAGE, -1)[at] != before[at]) for at in written)


def test_what_is_not_finite_is_stored_as_0():
    """In the cache alone: the query that overflowed has to be seen."""
    qkv, cos, sin, pages, _ = case(2, 1, 2, 64, "bfloat16")
    qkv = qkv.at[0, 0, :, 5].set(jnp.nan).at[0, 0, 3, 6].set(-jnp.inf)
    at_T = jnp.int32([3, 8])
    q_THK, ours = rotate_write(qkv, cos, sin, pages, at_T, interpret=True)
    expected_THK, theirs = rotate_write_reference(qkv, cos, sin, pages, at_T)
    np.testing.assert_array_equal(np.isnan(np.float32(q_THK)), np.isnan(np.float32(expected_THK)))
    assert np.isnan(np.float32(q_THK)).any()
    kv = np.float32(ours.kv_NPGK)
    assert np.isfinite(kv).all()
    np.testing.assert_array_equal(kv == 0, np.float32(theirs.kv_NPGK) == 0)
    assert kv.reshape(N_PAGES * PAGE, 2, 64)[3, 1, [5, 6]].tolist() == [0, 0]
