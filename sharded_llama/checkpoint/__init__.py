"""Checkpoints: opened in whatever format they are, read straight into shards, and exported."""

import os
from pathlib import Path

from ..errors import CheckpointError
from .export import save_hf
from .reader import load_weights
from .safetensors import INDEX_FILE, SINGLE_FILE, open_safetensors
from .source import CheckpointSource, TensorInfo

__all__ = ["CheckpointSource", "TensorInfo", "load_weights", "open_checkpoint", "save_hf"]

# Formats that are recognised and refused: file pattern -> what to say.
_UNSUPPORTED = {
    "*.pth": "a Meta checkpoint (.pth), which is not supported; use the model's Hugging Face safetensors",
    "params.json": "a Meta checkpoint (params.json), which is not supported; use the model's Hugging Face safetensors",
    "pytorch_model*.bin*": "pickled PyTorch weights (.bin), which are not read because unpickling runs code; "
    "load them with transformers and save_pretrained(..., safe_serialization=True)",
    "*.gguf": "a GGUF model, which is not supported; use the model's Hugging Face safetensors",
}


def open_checkpoint(folder: str | os.PathLike[str]) -> CheckpointSource:
    """Opens the checkpoint in `folder`, whose format its files tell. Reads headers, no weights.

    Raises CheckpointError when the folder is missing or unreadable, holds no checkpoint or one of a format that
    is not supported, or when the checkpoint's headers are broken.
    """
    folder = Path(folder)
    try:
        files = {file.name for file in folder.iterdir()}
    except OSError as e:
        raise CheckpointError(f"{folder}: cannot be read as a checkpoint folder: {e.strerror}.") from e
    if SINGLE_FILE in files or INDEX_FILE in files:
        return open_safetensors(folder)
    for pattern, what in _UNSUPPORTED.items():
        if any(folder.glob(pattern)):
            raise CheckpointError(f"{folder} holds {what}.")
    raise CheckpointError(f"{folder} holds no checkpoint: neither {SINGLE_FILE} nor {INDEX_FILE}.")
