"""A model of 160 million parameters in Llama 3's form, to measure on a CPU: a step of it is mostly products.

No checkpoint of it exists; `launch.benchmark --random_weights --peer=hf` runs it beside transformers.
"""

from ml_collections import ConfigDict

from sharded_llama.config import LlamaConfig
from sharded_llama.run_config import run_config


def get_config() -> ConfigDict:
    model = LlamaConfig(
        dim=1024,
        n_layers=8,
        n_heads=16,
        n_kv_heads=8,
        head_dim=64,
        ffn_dim=2816,
        vocab_size=32000,
        norm_eps=1e-5,
        rope_theta=10_000.0,
        rope_scaling=None,
        max_seq_len=2048,
        tie_embeddings=False,
        bos_id=1,
        eos_ids=(2,),
        dtype="float32",
    )
    return run_config(model)
