"""Attention in plain JAX: the reference against torch, the blockwise form against the reference."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_reference import distance

from sharded_llama.attention import attend, choose_backend
from sharded_llama.attention.reference import BLOCK, blockwise_attn, grouped_query_attn
from sharded_llama.config import LlamaConfig
from sharded_llama.errors import ConfigError


def inputs(batch, length, cached, heads, kv_heads, width, dtype=np.float32):
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((batch, n, h, width)).astype(dtype)
        for n, h in ((length, heads), (cached, kv_heads), (cached, kv_heads))
    )
    start = rng.integers(0, cached - length + 1, (batch, 1))
    return q, k, v, start + np.arange(length)[None]


def torch_attn(q, k, v, q_pos):
    q, k, v = (torch.from_numpy(x).transpose(1, 2) for x in (q, k, v))
    mask = torch.arange(k.shape[2])[None, None, None] <= torch.from_numpy(q_pos)[:, None, :, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).numpy()


@pytest.mark.parametrize("form", [grouped_query_attn, blockwise_attn])
@pytest.mark.parametrize(
    "shape",
    [
        (3, 7, 7, 8, 8, 16),
        (3, 5, 19, 8, 2, 6),
        (2, 1, 33, 6, 3, 10),
        (2, 4, BLOCK, 4, 2, 8),
        (2, 3, 2 * BLOCK + 5, 4, 1, 8),
    ],
    ids=str,
)
def test_against_torch(form, shape):
    args = inputs(*shape)
    assert distance(jax.jit(form)(*args), torch_attn(*args)) < 1e-6


def test_blockwise_in_float64():
    with jax.enable_x64(True):
        args = inputs(2, 3, 2 * BLOCK + 5, 4, 2, 8, np.float64)
        assert distance(jax.jit(blockwise_attn)(*args), torch_attn(*args)) < 1e-12


@pytest.mark.parametrize("form", [grouped_query_attn, blockwise_attn])
def test_what_lies_behind_a_query_does_not_matter(form):
    """Whatever stands in the cache beyond a row's own position, not even NaN-free, changes no bit."""
    q, k, v, q_pos = inputs(3, 1, 3 * BLOCK, 4, 2, 8)
    q_pos = np.array([[0], [BLOCK], [BLOCK + 77]])
    clean = jax.jit(form)(q, k, v, q_pos)
    for row, position in enumerate(q_pos[:, 0]):
        k[row, position + 1 :], v[row, position + 1 :] = 1e30, -1e30
    np.testing.assert_array_equal(jax.jit(form)(q, k, v, q_pos), clean)


def test_blockwise_gradient():
    q, k, v, q_pos = inputs(2, 6, 2 * BLOCK + 5, 4, 2, 8)

    def loss(form):
        return jax.jit(jax.grad(lambda *qkv: jnp.sum(jnp.sin(form(*qkv, q_pos))), argnums=(0, 1, 2)))(q, k, v)

    for ours, reference in zip(loss(blockwise_attn), loss(grouped_query_attn), strict=True):
        assert distance(ours, reference) < 1e-5


class TestChoice:
    config = LlamaConfig(
        dim=64,
        n_layers=1,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        ffn_dim=96,
        vocab_size=128,
        norm_eps=1e-5,
        rope_theta=1e4,
        dtype="bfloat16",
    )

    @staticmethod
    def device(platform, **attributes):
        return SimpleNamespace(platform=platform, device_kind=platform, **attributes)

    def test_default(self):
        assert choose_backend(self.config, jax.devices()[0]) == "blockwise"
        assert choose_backend(self.config, self.device("tpu")) == "blockwise"
        assert choose_backend(self.config, self.device("gpu", compute_capability="9.0")) == "cudnn"
        assert choose_backend(self.config, self.device("gpu", compute_capability="8.0")) == "cudnn"

    @pytest.mark.parametrize("change", [{"dtype": "float32"}, {"head_dim": 12}, {"head_dim": 264}])
    def test_cudnn_is_not_chosen_for_what_it_cannot_do(self, change):
        assert (
            choose_backend(self.config.replace(**change), self.device("gpu", compute_capability="9.0")) == "blockwise"
        )

    @pytest.mark.parametrize(("capability", "head_dim"), [("7.5", 64), ("8.9", 256), ("gfx942", 64)])
    def test_cudnn_is_not_chosen_on_gpus_that_lack_the_kernel(self, capability, head_dim):
        gpu = self.device("gpu", compute_capability=capability)
        assert choose_backend(self.config.replace(head_dim=head_dim), gpu) == "blockwise"

    def test_a_request_that_cannot_run_is_refused(self):
        with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
            choose_backend(self.config, jax.devices()[0], "cudnn")
        with pytest.raises(ConfigError, match="is not one of"):
            choose_backend(self.config, jax.devices()[0], "flash")

    def test_reference_and_blockwise_agree(self):
        args = inputs(2, 5, 40, 4, 2, 8)
        ways = [attend(backend, *args, from_zero=False) for backend in ("reference", "blockwise")]
        assert distance(*ways) < 1e-6
