"""Llama 3 8B. Source: config.json of meta-llama/Meta-Llama-3-8B."""

from ml_collections import ConfigDict

from sharded_llama.config import LlamaConfig
from sharded_llama.run_config import run_config


def get_config() -> ConfigDict:
    model = LlamaConfig(
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        ffn_dim=14336,
        vocab_size=128256,
        norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling=None,
        max_seq_len=8192,
        tie_embeddings=False,
        bos_id=128000,
        eos_ids=(128001,),  # Instruct adds 128009
        dtype="bfloat16",
    )
    return run_config(model)
