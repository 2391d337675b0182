"""Writes weights as a Hugging Face folder that transformers loads: safetensors, config.json and the tokenizer."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from ..config import LlamaConfig
from ..errors import CheckpointError
from ..weights import XfmrWeights
from .layout import canonical_shapes, shard_pieces
from .safetensors import INDEX_FILE, SINGLE_FILE, hf_name, write_safetensors
from .source import TensorInfo

MAX_SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


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


def save_hf(
    weights: XfmrWeights,
    config: LlamaConfig,
    folder: str | os.PathLike[str],
    *,
    tokenizer_folder: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes `weights` in `config.dtype`, with config.json and the tokenizer's files, as the new folder `folder`.

    Tensors are canonical: nothing fused, repeated or padded. The host holds one stored array and one tensor at a
    time. The folder appears under its name only when it is complete. Of several processes all must call this; the
    first one writes. Raises CheckpointError when `folder` exists and is not empty, when `tokenizer_folder` holds
    no tokenizer, or when writing fails.
    """
    folder = Path(os.path.abspath(folder))
    writer = jax.process_index() == 0
    tokenizer: list[Path] = []
    problem = None
    if writer:
        if tokenizer_folder is not None:
            tokenizer = [path for name in TOKENIZER_FILES if (path := Path(tokenizer_folder) / name).is_file()]
            if not tokenizer:
                problem = f"{tokenizer_folder} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)}."
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            problem = f"{folder} already exists; choose a new folder to export to."
    _raise_everywhere(problem)
    tensors = _canonical_tensors(weights, config)
    if writer:
        try:
            _write(tensors, config, folder, tokenizer, max_shard_bytes)
            logging.info("Exported %s.", folder)
        except OSError as e:
            problem = f"{folder}: cannot be written: {e}"
    if jax.process_count() > 1:
        for _ in tensors:  # gathers need every process, even when the writer has given up
            pass
    _raise_everywhere(problem)


def _raise_everywhere(problem: str | None) -> None:
    """Raises on all processes what the first one found: going separate ways, some would wait for ever."""
    if multihost_utils.broadcast_one_to_all(np.int32(problem is not None)):
        raise CheckpointError(problem or "the first process could not export; see its message.")


def _canonical_tensors(weights: XfmrWeights, config: LlamaConfig) -> Iterator[np.ndarray]:
    """The tensors in the order of `canonical_shapes`, on the host, one at a time. Every process must take part."""
    shapes = canonical_shapes(config)
    for path, array in jax.tree_util.tree_leaves_with_path(weights):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        yield from _unfuse(_to_host(array), name, config, shapes)


def _unfuse(
    stored: np.ndarray, name: str, config: LlamaConfig, shapes: dict[str, tuple[int, ...]]
) -> Iterator[np.ndarray]:
    pieces = shard_pieces(config, name, stored.shape, (slice(None),) * stored.ndim)
    for tensor in dict.fromkeys(piece.tensor for piece in pieces):
        out = np.empty(shapes[tensor], config.jnp_dtype)
        for piece in pieces:
            if piece.tensor == tensor:
                out[piece.source] = piece.view(stored)  # copies of a repeated head are equal: any may stay
        yield out


def _to_host(array: jax.Array) -> np.ndarray:
    """The whole of a global array in the memory of every process."""
    if not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    # An array keeps the host copy that NumPy asks of it; this one of the same buffers is dropped with its copy.
    buffers = [shard.data for shard in array.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, buffers))


def _write(
    tensors: Iterator[np.ndarray], config: LlamaConfig, folder: Path, tokenizer: Sequence[Path], max_shard_bytes: int
) -> None:
    """Fills a folder of another name and renames it at the end: a run that is cut short leaves nothing that loads."""
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        files = _plan_files(config, max_shard_bytes)
        for file, infos in files.items():
            write_safetensors(partial / file, infos, (next(tensors) for _ in infos))
        if list(files) != [SINGLE_FILE]:
            weight_map = {name: file for file, infos in files.items() for name in infos}
            total = sum(info.nbytes for infos in files.values() for info in infos.values())
            _write_json(partial / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for path in tokenizer:
            shutil.copyfile(path, partial / path.name)
        _write_json(partial / "config.json", to_hf_dict(config))
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _plan_files(config: LlamaConfig, max_shard_bytes: int) -> dict[str, dict[str, TensorInfo]]:
    """File name -> Hugging Face tensor name -> tensor, in the order of `canonical_shapes`."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, shape in canonical_shapes(config).items():
        info = TensorInfo(shape, config.jnp_dtype)
        if shards[-1] and size + info.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][hf_name(name)] = info
        size += info.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
