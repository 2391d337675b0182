"""Llama 2 7B. Source: config.json of meta-llama/Llama-2-7b-hf."""

from ml_collections import ConfigDict

from sharded_llama.config import LlamaConfig
from sharded_llama.run_config import run_config


def get_config() -> ConfigDict:
    model = LlamaConfig(
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        head_dim=128,
        ffn_dim=11008,
        vocab_size=32000,
        norm_eps=1e-5,
        rope_theta=10_000.0,
        rope_scaling=None,
        max_seq_len=4096,
        tie_embeddings=False,
        bos_id=1,
        eos_ids=(2,),
        dtype="float16",
    )
    return run_config(model)
