"""The PyTorch reference: random Llama models of transformers, in float32, bfloat16 and true float64."""

import contextlib
import copy
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sharded_llama.parity.transformers_model import kept_in_float64

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# Awkward on purpose: head widths, vocabularies and feed-forward widths that divide by nothing.
MODELS = {
    "grouped": {"num_key_value_heads": 2, "head_dim": 6, "vocab_size": 131, "rope_parameters": PLAIN_ROPE},
    "grouped_llama3": {"num_key_value_heads": 4, "head_dim": 16, "vocab_size": 97, "rope_parameters": LLAMA3_ROPE},
    "ungrouped_tied": {
        "num_key_value_heads": 8,
        "head_dim": 10,
        "vocab_size": 61,
        "rope_parameters": PLAIN_ROPE,
        "tie_word_embeddings": True,
    },
}


def make_model(name: str = "grouped", seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A random model in float32 whose logits are far from uniform and whose norm weights are not 1."""
    config = LlamaConfig(
        **{
            "hidden_size": 40,
            "intermediate_size": 92,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "initializer_range": 0.15,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "attn_implementation": "eager",
            **MODELS[name],
            **changes,
        }
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def save(model: LlamaForCausalLM, folder: Path, dtype: str = "float32", **kwargs: object) -> Path:
    """Writes the checkpoint in `dtype`, as transformers itself does."""
    in_dtype(model, dtype).save_pretrained(folder, **kwargs)
    return folder


def in_dtype(model: LlamaForCausalLM, dtype: str) -> LlamaForCausalLM:
    """A copy of the model in `dtype`; the model itself keeps its bits.

    `.to()` would round the inverse frequencies too, which a checkpoint loaded in half precision keeps in float32.
    """
    changed = copy.deepcopy(model).to(getattr(torch, dtype))
    changed.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq
    return changed


def rounded(model: LlamaForCausalLM, dtype: str) -> LlamaForCausalLM:
    """A float32 copy of the model whose weights are those of its checkpoint in `dtype`."""
    return in_dtype(in_dtype(model, dtype), "float32")


@torch.no_grad()
def logits(model: LlamaForCausalLM, tokens_BL: np.ndarray, dtype: str) -> np.ndarray:
    """Logits (B, L, V) of the reference computed in `dtype`, as float64."""
    tokens = torch.from_numpy(np.asarray(tokens_BL)).long()
    with kept_in_float64() if dtype == "float64" else contextlib.nullcontext():
        return in_dtype(model, dtype)(tokens, use_cache=False).logits.to(torch.float64).numpy()


def distance(x: np.ndarray, reference: np.ndarray) -> float:
    """Norm of the difference over norm of the reference."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))
