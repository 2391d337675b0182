"""Writes a Hugging Face folder that transformers loads: safetensors with an index, and config.json."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...config import LlamaConfig
from ...json_file import write_json
from ..layout import canonical_shapes
from ..names import HF_NAMES, to_stored
from ..source import TensorInfo
from .safetensors import INDEX_FILE, SINGLE_FILE, SafetensorsWriter

CONFIG = "config.json"
MAX_SHARD_BYTES = 5 * 10**9


def to_hf_dict(config: LlamaConfig) -> dict[str, Any]:
    """The contents of the config.json of `config`, as transformers' LlamaForCausalLM reads it."""
    scaling = config.rope_scaling
    eos_ids = list(config.eos_ids)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
        "tie_word_embeddings": config.tie_embeddings,
        # Written even when there is none: transformers takes an absent id for 1 or 2.
        "bos_token_id": config.bos_id,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else eos_ids or None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": config.dtype,
    }


class HFWriter:
    """Takes the tensors in the order of `canonical_shapes`, each in blocks of rows, and fills file after file."""

    def __init__(self, folder: Path, files: Mapping[str, Mapping[str, TensorInfo]]) -> None:
        self._folder = folder
        self._files = files
        self._file_of = {name: file for file, infos in files.items() for name in infos}
        self._open: tuple[str, SafetensorsWriter] | None = None

    def write(self, name: str, block: np.ndarray) -> None:
        """Appends rows to canonical tensor `name`."""
        stored = to_stored(name, HF_NAMES)
        file = self._file_of[stored]
        if self._open is None or self._open[0] != file:
            self.close()
            self._open = file, SafetensorsWriter(self._folder / file, self._files[file])
        self._open[1].write(stored, block)

    def close(self, complete: bool = True) -> None:
        if self._open is not None:
            self._open[1].close(complete)
            self._open = None


@contextmanager
def hf_writer(folder: Path, config: LlamaConfig, max_shard_bytes: int = MAX_SHARD_BYTES) -> Iterator[HFWriter]:
    """A writer of the tensors of `config` into `folder`; the index is written when all of them are there."""
    files = _plan_files(config, max_shard_bytes)
    writer = HFWriter(folder, files)
    try:
        yield writer
    except BaseException:
        writer.close(complete=False)
        raise
    writer.close()
    if list(files) != [SINGLE_FILE]:
        weight_map = {name: file for file, infos in files.items() for name in infos}
        total = sum(info.nbytes for infos in files.values() for info in infos.values())
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _plan_files(config: LlamaConfig, max_shard_bytes: int) -> dict[str, dict[str, TensorInfo]]:
    """File name -> Hugging Face tensor name -> tensor, in the order of `canonical_shapes`."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, shape in canonical_shapes(config).items():
        info = TensorInfo(shape, config.jnp_dtype)
        if shards[-1] and size + info.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][to_stored(name, HF_NAMES)] = info
        size += info.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}
