"""Every layer function against torch in float32, fed the same input, within the contract's leaf bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_reference import LLAMA3_ROPE, distance
from transformers import LlamaConfig as HFConfig
from transformers.models.llama import modeling_llama

from sharded_llama import layers
from sharded_llama.config import LlamaConfig, RopeScaling

pytestmark = pytest.mark.usefixtures("optimising_compiler")

LEAF = 1e-6
WIDE = 3e-6  # torch itself is 1.4e-6 from float64 on wide MLPs


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_config(head_dim, theta, scaled):
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
    return LlamaConfig(
        dim=64,
        n_layers=1,
        n_heads=4,
        n_kv_heads=2,
        head_dim=head_dim,
        ffn_dim=96,
        vocab_size=128,
        norm_eps=1e-5,
        rope_theta=theta,
        rope_scaling=scaling if scaled else None,
        dtype="float32",
    )


def their_rotary(head_dim, theta, scaled):
    rope = {**LLAMA3_ROPE, "rope_theta": theta, "original_max_position_embeddings": 8192}
    if not scaled:
        rope = {"rope_type": "default", "rope_theta": theta}
    config = HFConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        rope_parameters=rope,
        max_position_embeddings=131072,
    )
    return modeling_llama.LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_frequencies_have_the_bits_of_the_reference(head_dim, theta, scaled):
    ours = layers.rope_frequencies(make_config(head_dim, theta, scaled))
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, their_rotary(head_dim, theta, scaled).inv_freq.numpy())


@pytest.mark.parametrize("head_dim", [6, 10, 80, 96])
def test_frequencies_of_other_widths_are_within_8_ulp(head_dim):
    ours = layers.rope_frequencies(make_config(head_dim, 1e4, False))
    np.testing.assert_array_max_ulp(ours, their_rotary(head_dim, 1e4, False).inv_freq.numpy(), maxulp=8)


@pytest.mark.parametrize("scaled", [False, True])
def test_rotary_up_to_position_100000(scaled):
    positions = np.array([[0, 1, 2, 100, 4097, 31_337, 65_536, 99_999, 100_000]])
    x = normal(0, 1, positions.size, 4, 128)
    cos, sin = jax.jit(layers.rope_angles, static_argnums=0)(make_config(128, 5e5, scaled), jnp.asarray(positions))
    ours = jax.jit(layers.apply_rotary_emb)(x, cos, sin)
    x_torch = torch.from_numpy(x).transpose(1, 2)
    their_cos, their_sin = their_rotary(128, 5e5, scaled)(x_torch, torch.from_numpy(positions))
    theirs, _ = modeling_llama.apply_rotary_pos_emb(x_torch, x_torch, their_cos, their_sin)
    theirs = theirs.transpose(1, 2).numpy()
    for i in range(positions.size):  # each position on its own: an error that grows must not hide behind the others
        assert distance(ours[:, i], theirs[:, i]) < LEAF, positions[0, i]


def test_rms_norm():
    x, weight = 3 * normal(0, 2, 5, 300), normal(1, 300)
    norm = modeling_llama.LlamaRMSNorm(300, eps=1e-5)
    norm.weight.data = torch.from_numpy(weight)
    ours = jax.jit(layers.rms_norm, static_argnums=2)(x, weight, 1e-5)
    assert distance(ours, norm(torch.from_numpy(x)).detach().numpy()) < LEAF


def test_rms_norm_of_tiny_values_depends_on_eps():
    x, weight = np.full((1, 8), 1e-4, np.float32), np.ones(8, np.float32)
    assert not np.allclose(layers.rms_norm(x, weight, 1e-5), layers.rms_norm(x, weight, 1e-6))


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    x = jnp.asarray(3 * normal(0, 4, 513), jnp.bfloat16)
    weight = jnp.asarray(normal(1, 513), jnp.bfloat16)
    norm = modeling_llama.LlamaRMSNorm(513, eps=1e-5).to(torch.bfloat16)
    norm.weight.data = torch.from_numpy(np.asarray(weight, np.float32)).bfloat16()
    theirs = norm(torch.from_numpy(np.asarray(x, np.float32)).bfloat16()).detach().float().numpy()
    np.testing.assert_array_equal(np.asarray(layers.rms_norm(x, weight, 1e-5), np.float32), theirs)


@pytest.mark.parametrize("model", [1, 4])
def test_project_qkv(model):
    """The fused product gives what the three separate ones give, for each shard's share of the heads."""
    x, wq, wk, wv = normal(0, 3, 7, 50), normal(1, 8, 6, 50), normal(2, 4, 6, 50), normal(3, 4, 6, 50)
    fused = np.concatenate([wq.reshape(4, 2, 6, 50), wk[:, None], wv[:, None]], axis=1)
    parts = [
        jax.jit(lambda x, w: layers.split_qkv(layers.project_qkv(x, w)))(x, part) for part in np.split(fused, model)
    ]
    for ours, weight in zip(
        map(lambda p: np.concatenate(p, axis=2), zip(*parts, strict=True)), (wq, wk, wv), strict=True
    ):
        theirs = torch.einsum("bld,hkd->blhk", torch.from_numpy(x), torch.from_numpy(weight))
        assert distance(ours, theirs.numpy()) < LEAF


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 33)])
@pytest.mark.parametrize("n_inputs", [1, 2])
def test_linear(shape, n_inputs):
    """One row, several, more than FEW_ROWS, and more axes than one on either side."""
    x, w = normal(0, *shape, 6, 10), normal(1, 3, 4, 6, 10)
    if n_inputs == 1:
        x, w = x[..., 0, :], w[:, :, 0]
    ours = jax.jit(layers.linear, static_argnames="n_inputs")(x, w, n_inputs=n_inputs)
    assert ours.shape == (*shape, 3, 4)
    assert distance(ours, np.tensordot(x, w, axes=[range(-n_inputs, 0)] * 2)) < LEAF


@pytest.mark.parametrize("subscripts", ["...d,grkd->...grk", "...hk,dhk->...d", "bgrls,bsgk->blgrk"])
def test_long_float32_sums_are_taken_in_parts_on_nvidia_gpus(subscripts, monkeypatch):
    """One chain of 4096 products is 1.2e-6 from float64 there. Elsewhere, and in other types, nothing changes."""
    monkeypatch.setattr(layers, "LONGEST_SUM", 10)
    sizes = {**dict.fromkeys("bglrvz", 3), "d": 24, "h": 6, "k": 4, "s": 24}
    inputs, _ = subscripts.split("->")
    x, y = (normal(i, *(sizes[a] for a in axes.replace("...", "bl"))) for i, axes in enumerate(inputs.split(",")))
    summed, n_terms = layers._summed(subscripts, jnp.asarray(y))
    assert n_terms == 24 or subscripts.startswith("...d")
    for held in (layers.PARTS_BYTES, 0):  # all parts at once, and one after the other
        monkeypatch.setattr(layers, "PARTS_BYTES", held)
        out = layers._sum_in_parts(jnp.einsum, subscripts, summed, 3, jnp.asarray(x), jnp.asarray(y))
        np.testing.assert_allclose(out, np.einsum(subscripts, x, y), rtol=1e-5, atol=1e-5)
    monkeypatch.undo()
    monkeypatch.setattr(layers, "LONGEST_SUM", 10)

    def program(platform, dtype=np.float32):
        traced = jax.jit(functools.partial(layers.dot, subscripts)).trace(x.astype(dtype), y.astype(dtype))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "optimization_barrier" in program("cuda")
    assert "optimization_barrier" not in program("cpu")
    assert "optimization_barrier" not in program("cuda", jnp.bfloat16)


def test_feed_forward():
    x, w1, w3, w2 = normal(0, 2, 3, 200), normal(1, 600, 200), normal(2, 600, 200), normal(3, 200, 600)
    ours = jax.jit(lambda x, w13, w2: layers.linear(layers.swiglu(x, w13), w2))(x, np.stack([w1, w3]), w2)
    t = [torch.from_numpy(a) for a in (x, w1, w3, w2)]
    theirs = (torch.nn.functional.silu(t[0] @ t[1].T) * (t[0] @ t[2].T)) @ t[3].T
    assert distance(ours, theirs.numpy()) < WIDE
