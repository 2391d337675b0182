"""Llama 3.3 70B Instruct. Source: config.json of meta-llama/Llama-3.3-70B-Instruct."""

from ml_collections import ConfigDict

from sharded_llama.config import LlamaConfig, RopeScaling
from sharded_llama.run_config import run_config


def get_config() -> ConfigDict:
    model = LlamaConfig(
        dim=8192,
        n_layers=80,
        n_heads=64,
        n_kv_heads=8,
        head_dim=128,
        ffn_dim=28672,
        vocab_size=128256,
        norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_seq_len=8192,
        ),
        max_seq_len=131072,
        tie_embeddings=False,
        bos_id=128000,
        eos_ids=(128001, 128008, 128009),
        dtype="bfloat16",
    )
    return run_config(model)
