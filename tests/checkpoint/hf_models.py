"""Random Hugging Face checkpoints, and the stored arrays they must become, worked out without the package's layout."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
import transformers

from sharded_llama.config import LlamaConfig, RopeScaling
from sharded_llama.weights import LayerWeights, XfmrWeights

# Odd vocabulary and feed-forward width (padded on every mesh), grouped heads, H*K that is not D.
CONFIG = LlamaConfig(
    dim=64,
    n_layers=2,
    n_heads=8,
    n_kv_heads=2,
    head_dim=12,
    ffn_dim=92,
    vocab_size=131,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64),
    max_seq_len=512,
    bos_id=1,
    eos_ids=(2, 5),
    dtype="float32",
)

State = dict[str, np.ndarray]  # Hugging Face name -> tensor


def hf_config(config: LlamaConfig) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.ffn_dim,
        vocab_size=config.vocab_size,
        tie_word_embeddings=config.tie_embeddings,
    )


def save_random_model(folder: Path, config: LlamaConfig, *, max_shard_size: str = "5GB", seed: int = 0) -> State:
    """Saves a model of `config` in `config.dtype` with transformers, every parameter random; returns its tensors."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(hf_config(config)).to(getattr(torch, config.dtype))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return state_of(model)


def state_of(model: torch.nn.Module) -> State:
    return {name: to_numpy(tensor) for name, tensor in model.state_dict().items()}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def expected_weights(state: State, config: LlamaConfig, model: int) -> XfmrWeights:
    """The global arrays that `model` shards store, fused, repeated and padded with plain NumPy."""
    g, h, k, d = config.n_kv_heads, config.n_heads, config.head_dim, config.dim
    g_rep = max(g, model)

    def pad(x: np.ndarray, axis: int) -> np.ndarray:
        widths = [(0, -x.shape[i] % model if i == axis else 0) for i in range(x.ndim)]
        return np.pad(x, widths)

    def layer(i: int) -> LayerWeights:
        def get(name: str) -> np.ndarray:
            return state[f"model.layers.{i}.{name}.weight"].astype(config.jnp_dtype)

        wq = get("self_attn.q_proj").reshape(g_rep, h // g_rep, k, d)
        wk = get("self_attn.k_proj").reshape(g, k, d).repeat(g_rep // g, axis=0)[:, None]
        wv = get("self_attn.v_proj").reshape(g, k, d).repeat(g_rep // g, axis=0)[:, None]
        return LayerWeights(
            attention_norm=get("input_layernorm"),
            wqkv=np.concatenate([wq, wk, wv], axis=1),
            wo=get("self_attn.o_proj").reshape(d, h, k),
            ffn_norm=get("post_attention_layernorm"),
            w13=pad(np.stack([get("mlp.gate_proj"), get("mlp.up_proj")]), 1),
            w2=pad(get("mlp.down_proj"), 1),
        )

    return XfmrWeights(
        tok_embeddings=pad(state["model.embed_tokens.weight"].astype(config.jnp_dtype), 0),
        layers=tuple(layer(i) for i in range(config.n_layers)),
        norm=state["model.norm.weight"].astype(config.jnp_dtype),
        output=None if config.tie_embeddings else pad(state["lm_head.weight"].astype(config.jnp_dtype), 0),
    )


def assert_bits_equal(actual: np.ndarray, expected: np.ndarray) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    bits = f"u{actual.dtype.itemsize}"
    np.testing.assert_array_equal(actual.view(bits), expected.view(bits))


# Safetensors files taken apart and put together by hand, to break them.


def take_apart(file: Path) -> tuple[dict, bytes]:
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def put_together(file: Path, header: dict | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
