"""The pieces of a transformer layer as pure functions of one device's part. No function here communicates.

Each takes any leading axes, written `..`: only attention knows sequences.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from .config import LlamaConfig, RopeScaling

LONGEST_SUM = 512  # terms that a float32 product adds up one after the other on NVIDIA GPUs
PARTS_BYTES = 1 << 28  # of the parts of a sum that are held at once
FEW_ROWS = 64  # up to which CPUs multiply faster with the weight as the left factor, and transpose the result

# Sees a component of the model by name while the function is traced, and returns what the computation goes on with.
Probe = Callable[[str, jax.Array], jax.Array]


def unprobed(name: str, x: jax.Array) -> jax.Array:
    """The probe of training and serving: nothing is seen, nothing changes, and nothing of it is compiled."""
    del name
    return x


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Type of norms, rotary, scores and softmax: float32, or float64 when the model is float64."""
    return jnp.promote_types(dtype, jnp.float32)


def dot(subscripts: str, x: jax.Array, y: jax.Array, *, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """`einsum` of two arrays with the contract's precision.

    JAX's default float32 product is TF32 on GPUs and bfloat16 on TPUs, so full-precision types ask for
    HIGHEST. Half-precision products accumulate in float32 and are rounded to `out_dtype` (default: x's) at the end.
    """
    precision = jax.lax.Precision.HIGHEST if jnp.finfo(x.dtype).bits >= 32 else None
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=out_dtype or x.dtype)
    summed, n_terms = _summed(subscripts, y)
    if x.dtype != jnp.float32 or n_terms <= LONGEST_SUM:
        return einsum(subscripts, x, y)
    in_parts = functools.partial(_sum_in_parts, einsum, subscripts, summed, -(-n_terms // LONGEST_SUM))
    return jax.lax.platform_dependent(x, y, cuda=in_parts, default=functools.partial(einsum, subscripts))


def _summed(subscripts: str, y: jax.Array) -> tuple[str, int]:
    """The first axis of y that an einsum sums over, and the number of terms of all such axes."""
    inputs, output = subscripts.split("->")
    letters = inputs.split(",")[1]
    summed = [letter for letter in letters if letter not in output]
    return summed[0], math.prod(y.shape[letters.index(letter)] for letter in summed)


def _sum_in_parts(einsum: Callable, subscripts: str, summed: str, parts: int, x: jax.Array, y: jax.Array) -> jax.Array:
    """The einsum of two arrays, its sum over axis `summed` taken in at least `parts` equal parts, if it divides.

    cuBLAS adds the products of a float32 sum one after the other: over 4096 of them it is 1.2e-6 from float64, in
    parts of 512 a third of that.
    """
    (a, b), output = subscripts.split("->")[0].split(","), subscripts.split("->")[1]
    size = y.shape[b.index(summed)]
    parts = next((n for n in range(parts, 2 * parts + 1) if size % n == 0), 1)
    axis_x, axis_y = x.ndim + a.index(summed) - len(a), b.index(summed)
    x, y = (
        z.reshape(*z.shape[:axis], parts, size // parts, *z.shape[axis + 1 :]) for z, axis in ((x, axis_x), (y, axis_y))
    )
    a, b = (letters.replace(summed, f"z{summed}") for letters in (a, b))
    together = functools.partial(einsum, f"{a},{b}->z{output}")
    held = jax.eval_shape(together, x, y)
    if held.size * held.dtype.itemsize <= PARTS_BYTES:
        # One product that reads y where it is. Without the barrier the compiler could make one sum of it again.
        return jnp.sum(jax.lax.optimization_barrier(together(x, y)), axis=0)
    # So many rows that copying a part of y takes no time beside the product.
    of_part = [
        (jax.lax.index_in_dim(x, i, axis_x, False), jax.lax.index_in_dim(y, i, axis_y, False)) for i in range(parts)
    ]
    return functools.reduce(jnp.add, (einsum(subscripts, *part) for part in of_part))


def rms_norm(x: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * weight over the last axis, in float32 and cast back before the weight (Zhang and Sennrich, 2019)."""
    y = x.astype(accumulator(x.dtype))
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * weight_D


def scale_frequencies(inv_freq: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1's frequency scaling of `inv_freq` (float32, radians per position), on the host.

    Long wavelengths are stretched by `factor`, short ones kept, those between interpolated. Evaluated in
    float32 in the order of transformers' `_compute_llama3_parameters`, so that the bits agree with it.
    """
    f32 = np.float32
    wavelen = (f32(1) / inv_freq) * f32(2 * np.pi)
    low_wavelen = scaling.original_max_seq_len / scaling.low_freq_factor
    high_wavelen = scaling.original_max_seq_len / scaling.high_freq_factor
    scaled = inv_freq / f32(scaling.factor)
    smooth = ((f32(1) / wavelen) * f32(scaling.original_max_seq_len) - f32(scaling.low_freq_factor)) / f32(
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (f32(1) - smooth) * scaled + smooth * inv_freq
    return np.where(wavelen > low_wavelen, scaled, np.where(wavelen < high_wavelen, inv_freq, between)).astype(f32)


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Inverse frequencies (K/2,) in float32, computed on the host so that every device uses the same bits.

    The power is taken in float64 of the float32 exponent, which gives the bits of torch's float32 power.
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    power = (np.float64(config.rope_theta) ** exponent.astype(np.float64)).astype(np.float32)
    inv_freq = np.float32(1) / power
    return inv_freq if config.rope_scaling is None else scale_frequencies(inv_freq, config.rope_scaling)


def rope_angles(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each (.., K/2), of every position's rotation angles; float32 (float64 for a float64 model)."""
    acc = accumulator(config.jnp_dtype)
    angles = positions[..., None].astype(acc) * rope_frequencies(config).astype(acc)

    def cos_and_sin(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.cos(angles), jnp.sin(angles)

    def one_by_one(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Out of a loop XLA's CPU compiler takes them as they are. Else it computes them anew for every head and layer.
        cos_TK, sin_TK = jax.lax.map(cos_and_sin, angles.reshape(-1, angles.shape[-1]))
        return cos_TK.reshape(angles.shape), sin_TK.reshape(angles.shape)

    return jax.lax.platform_dependent(angles, cpu=one_by_one, default=cos_and_sin)


def apply_rotary_emb(x_HK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x (.., heads, K) by its position; cos and sin are (.., K/2).

    Half-split convention: element i turns with element i + K/2 (Su et al., 2021, as Hugging Face stores Llama).
    """
    x1, x2 = jnp.split(x_HK.astype(cos.dtype), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_HK.dtype)


def linear(x: jax.Array, w: jax.Array, *, n_inputs: int = 1, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """x (.., I..) times a weight (O.., I..), of which the last `n_inputs` axes are summed over: (.., O..).

    A product of two matrices, whatever the axes: of an einsum over more of them XLA's CPU compiler transposes the
    weight in every step, which takes several times as long as the product.
    """
    outputs, inputs = w.shape[: w.ndim - n_inputs], w.shape[w.ndim - n_inputs :]
    lead = x.shape[: x.ndim - n_inputs]
    x_MI, w_OI = x.reshape(math.prod(lead), math.prod(inputs)), w.reshape(math.prod(outputs), math.prod(inputs))

    def product(x_MI: jax.Array, w_OI: jax.Array) -> jax.Array:
        return dot("mi,oi->mo", x_MI, w_OI, out_dtype=out_dtype)

    def weight_first(x_MI: jax.Array, w_OI: jax.Array) -> jax.Array:
        # CPUs read the weight as it lies when it is the left factor: 2.5 times as fast with 8 rows. The barrier keeps
        # the compiler from swapping the factors back.
        return jax.lax.optimization_barrier(dot("oi,mi->om", w_OI, x_MI, out_dtype=out_dtype)).T

    if len(x_MI) == 1 or len(x_MI) > FEW_ROWS:  # CPUs have a function of its own for one row
        out_MO = product(x_MI, w_OI)
    else:
        out_MO = jax.lax.platform_dependent(x_MI, w_OI, cpu=weight_first, default=product)
    return out_MO.reshape(*lead, *outputs)


def project_qkv(x: jax.Array, wqkv_GRKD: jax.Array) -> jax.Array:
    """x (.., D) to (.., G, R' + 2, K): of each kv head its R' queries, then its key and its value, in one product."""
    return linear(x, wqkv_GRKD)


def split_qkv(qkv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `project_qkv` gives as q (.., H, K), k (.., G, K) and v (.., G, K)."""
    n_kv_heads, width, head_dim = qkv.shape[-3:]
    q = qkv[..., : width - 2, :].reshape(*qkv.shape[:-3], n_kv_heads * (width - 2), head_dim)
    return q, qkv[..., width - 2, :], qkv[..., width - 1, :]


def swiglu(x: jax.Array, w13_2FD: jax.Array, probe: Probe = unprobed) -> jax.Array:
    """silu(x w1) * (x w3) of x (.., D): (.., F) (Shazeer, 2020).

    The activation is computed in float32 and rounded once: silu in bfloat16 would round three times.
    """
    acc = accumulator(x.dtype)
    gate_up = linear(x, w13_2FD)
    gate, up = probe("gate", gate_up[..., 0, :]), probe("up", gate_up[..., 1, :])
    return probe("activation", (jax.nn.silu(gate.astype(acc)) * up.astype(acc)).astype(x.dtype))
