"""Random checkpoints of every family in configs/, reduced in depth, width and vocabulary.

Head ratio, rotary embeddings, tying and eps are those of the family: this is what families differ in.
"""

import importlib.util
from pathlib import Path

from hf_reference import LLAMA3_ROPE, PLAIN_ROPE, make_model, save
from transformers import LlamaForCausalLM

from sharded_llama.config import LlamaConfig

CONFIGS = Path(__file__).parents[2] / "configs"
MEASURED = {"llama_160m"}  # only; no checkpoint is like it
FAMILIES = sorted({path.stem for path in CONFIGS.glob("llama*.py")} - MEASURED)


def family_config(name: str) -> LlamaConfig:
    """The model of configs/`name`.py."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return LlamaConfig.from_dict(module.get_config().model)


def reduced_fields(name: str) -> dict[str, object]:
    """Fields of transformers' LlamaConfig for the reduced model of a family; equal for families that differ in size."""
    config = family_config(name)
    ratio = config.n_heads // config.n_kv_heads
    # Meshes of 8 devices need query heads that 8 divides, and kv heads that divide 8 or are divided by it.
    n_kv_heads = {1: 8, 3: 8, 4: 2}.get(ratio, 1)
    rope = {**PLAIN_ROPE, "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope = {
            **LLAMA3_ROPE,
            "rope_theta": config.rope_theta,
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_seq_len,
        }
    return {
        "num_attention_heads": ratio * n_kv_heads,
        "num_key_value_heads": n_kv_heads,
        "num_hidden_layers": 2,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": rope,
        # Awkward on purpose.
        "hidden_size": 48,
        "head_dim": 10,
        "intermediate_size": 93,
        "vocab_size": 131,
    }


def distinct_families() -> dict[str, list[str]]:
    """One family of each reduced model, with all that share it."""
    shared: dict[str, list[str]] = {}
    for name in FAMILIES:
        same = next((first for first in shared if reduced_fields(first) == reduced_fields(name)), name)
        shared.setdefault(same, []).append(name)
    return shared


def reduced_model(name: str) -> LlamaForCausalLM:
    """The reduced random model of a family, in float32."""
    return make_model("grouped", **reduced_fields(name))


def save_reduced(name: str, folder: Path, dtype: str = "float32") -> Path:
    return save(reduced_model(name), folder, dtype)
