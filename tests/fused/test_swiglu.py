"""The product with the gated activation at its end, interpreted, against plain JAX; and that it lowers for a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from sharded_llama.fused import swiglu as kernel
from sharded_llama.layers import swiglu


def arrays(rows, columns, terms, dtype="bfloat16"):
    x = jax.random.normal(jax.random.key(0), (rows, terms), dtype)
    return x, jax.random.normal(jax.random.key(1), (2, columns, terms), dtype) * terms**-0.5


@pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="this JAX does not interpret such kernels")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("rows", "columns", "terms"),
    [(128, 256, 64), (256, 224, 320), (384, 96, 256), (72, 128, 128), (336, 192, 64)],
    ids=["one stage", "more than a ring", "as many as a ring", "a part of a tile", "rows beyond the last"],
)
def test_equals_the_reference(dtype, rows, columns, terms):
    """Three processors, so that one has several tiles, and others fewer or none."""
    x, w13 = arrays(rows, columns, terms, dtype)
    assert kernel.fits(x, w13)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        ours = np.float32(kernel.swiglu_gpu(x, w13, 3))
    theirs = np.float32(swiglu(x, w13))
    # A sum in another order moves a value to its neighbour now and then.
    np.testing.assert_allclose(ours, theirs, rtol=4 * float(jnp.finfo(dtype).eps), atol=1e-4)
    assert np.mean(ours != theirs) < 0.02


@pytest.mark.parametrize(
    ("rows", "columns", "terms", "dtype", "width"),
    [
        (2048, 14336, 4096, "bfloat16", 128),
        (256, 14336, 4096, "float16", 112),
        (2032, 96, 64, "bfloat16", 96),
        (72, 224, 320, "bfloat16", 112),
    ],
)
def test_lowers(rows, columns, terms, dtype, width):
    x, w13 = jax.ShapeDtypeStruct((rows, terms), dtype), jax.ShapeDtypeStruct((2, columns, terms), dtype)
    assert kernel.fits(x, w13)
    lowered = jax.jit(kernel.swiglu_gpu, static_argnums=2).trace(x, w13, 132).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu_v2") == 1
    assert lowered.out_info.shape == (rows, columns)
    assert kernel.tile_width(rows, columns, 132) == width


@pytest.mark.parametrize(
    ("rows", "columns", "terms", "dtype"),
    [
        (64, 128, 64, "bfloat16"),
        (130, 128, 64, "bfloat16"),
        (128, 100, 64, "bfloat16"),
        (128, 128, 96, "bfloat16"),
        (128, 128, 64, "float32"),
    ],
    ids=["few rows", "rows", "columns", "terms", "type"],
)
def test_does_not_fit(rows, columns, terms, dtype):
    assert not kernel.fits(*arrays(rows, columns, terms, dtype))
