"""Llama 2 13B. Source: config.json of meta-llama/Llama-2-13b-hf."""

from ml_collections import ConfigDict

from sharded_llama.config import LlamaConfig
from sharded_llama.run_config import run_config


def get_config() -> ConfigDict:
    model = LlamaConfig(
        dim=5120,
        n_layers=40,
        n_heads=40,
        n_kv_heads=40,
        head_dim=128,
        ffn_dim=13824,
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
