"""Checkpoints: opened in whatever format they are, read straight into shards, and written in any format."""

import os
from pathlib import Path

from absl import logging

from ..errors import CheckpointError
from .export import FORMATS, ExportFormat, convert, save_weights
from .hf.safetensors import INDEX_FILE, SINGLE_FILE, open_safetensors
from .meta.source import is_meta, open_meta
from .orbax.live import Saving, save_orbax
from .orbax.source import is_orbax, open_orbax
from .reader import ReadStats, load_weights, read_weights
from .source import CheckpointSource, TensorInfo

__all__ = [
    "FORMATS",
    "CheckpointSource",
    "ExportFormat",
    "ReadStats",
    "Saving",
    "TensorInfo",
    "convert",
    "load_weights",
    "open_checkpoint",
    "read_weights",
    "save_orbax",
    "save_weights",
]

# Formats that are recognised and refused: file pattern -> what to say.
_UNSUPPORTED = {
    "pytorch_model*.bin*": "pickled PyTorch weights (.bin), which are not read because unpickling runs code; "
    "load them with transformers and save_pretrained(..., safe_serialization=True)",
    "*.gguf": "a GGUF model, which is not supported; use the model's Hugging Face safetensors",
    "*.pth": "a .pth file, but not as Meta names them: expected params.json beside consolidated.00.pth",
}


def open_checkpoint(folder: str | os.PathLike[str], *, rope_factor: float | None = None) -> CheckpointSource:
    """Opens the checkpoint in `folder`, whose format its files tell, and logs it. Reads headers, no weights.

    But for the shapes of Llama 3.2 1B and 3B in Meta's form, whose embeddings and output are compared (`meta.source`).

    `rope_factor` is that of a Meta checkpoint with scaled rotary embeddings, which cannot say it itself; None: see
    `meta_config.read_config`. Raises CheckpointError when the folder is missing or unreadable, holds no checkpoint or
    one of a format that is not supported, or when the checkpoint's headers are broken.
    """
    folder = Path(folder)
    try:
        files = {file.name for file in folder.iterdir()}
    except OSError as e:
        raise CheckpointError(f"{folder}: cannot be read as a checkpoint folder: {e.strerror}.") from e
    is_safetensors = SINGLE_FILE in files or INDEX_FILE in files
    if rope_factor is not None and (is_safetensors or is_orbax(folder)):
        raise CheckpointError(
            f"{folder}: a rope factor was given, but its own config says it: it is not Meta's format."
        )
    if is_safetensors:
        source: CheckpointSource = open_safetensors(folder)
    elif is_meta(folder):
        source = open_meta(folder, rope_factor)
    elif is_orbax(folder):
        source = open_orbax(folder)
    else:
        raise CheckpointError(_why_none(folder))
    logging.info("%s: %s, %d tensors.", folder, source.format, len(source.tensors))
    return source


def _why_none(folder: Path) -> str:
    for pattern, what in _UNSUPPORTED.items():
        if any(folder.glob(pattern)):
            return f"{folder} holds {what}."
    inside = [sub for sub in sorted(folder.iterdir()) if sub.is_dir() and is_meta(sub)]
    if inside:
        return f"{folder} holds no checkpoint itself; {inside[0]} has one in Meta's format."
    return (
        f"{folder} holds no checkpoint: neither {SINGLE_FILE} nor {INDEX_FILE} (Hugging Face), nor params.json and "
        "consolidated.00.pth (Meta), nor an orbax checkpoint."
    )
