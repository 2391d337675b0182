"""The small model that ships with the package; it runs on a laptop CPU."""

import dataclasses

from ml_collections import ConfigDict

from sharded_llama.config import LlamaConfig
from sharded_llama.run_config import run_config
from sharded_llama.training.settings import TrainSettings


def get_config() -> ConfigDict:
    model = LlamaConfig(
        dim=256,
        n_layers=6,
        n_heads=8,
        n_kv_heads=4,
        head_dim=32,
        ffn_dim=704,
        vocab_size=1024,
        norm_eps=1e-5,
        rope_theta=10_000.0,
        rope_scaling=None,
        max_seq_len=512,
        tie_embeddings=True,
        bos_id=0,
        eos_ids=(1,),
        dtype="bfloat16",
    )
    config = run_config(model, checkpoint="demo")
    config.generate.prompts = ("First Citizen:\n",)
    settings = TrainSettings(
        steps=900,
        batch=32,
        length=512,
        learning_rate=1e-3,
        weight_decay=0.3,
        dropout=0.3,
        eval_every=50,
        compute_dtype="bfloat16",
    )
    config.train = ConfigDict(dataclasses.asdict(settings))
    return config
