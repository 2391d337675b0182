"""The PyTorch reference of a checkpoint, whatever its format."""

import contextlib
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from ..checkpoint import CheckpointSource, ExportFormat, convert
from ..checkpoint.export import stored_dtype
from ..checkpoint.hf.safetensors import SafetensorsSource
from ..checkpoint.meta.source import MetaSource
from ..config import LlamaConfig
from ..errors import ParityError
from .components import Reference


@contextlib.contextmanager
def torch_reference(
    source: CheckpointSource, config: LlamaConfig, device: str = "cpu", *, rope_factor: float | None = None
) -> Iterator[Reference]:
    """The checkpoint in PyTorch, in `config.dtype` on `device` ("cpu", "cuda", ...), while the block runs.

    A Hugging Face folder is loaded by transformers. Meta's is run by a plain model in Meta's own layout, which shares
    nothing with this package's reader; `rope_factor` is what the user gave, if anything. Any other format is exported
    to a temporary Hugging Face folder first, by this package: what its reader gets wrong there is wrong on both sides.
    Raises ParityError when torch or transformers are not installed, or cannot load it.
    """
    check_torch(source, device)
    with contextlib.ExitStack() as stack:
        folder = Path(source.location)
        if not isinstance(source, SafetensorsSource | MetaSource):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sharded-llama-"))) / "hf"
            logging.info("exporting %s to %s for the reference.", source.location, folder)
            convert(source, config.replace(dtype=stored_dtype(source)), folder, ExportFormat("hf"))
        yield _open(folder, isinstance(source, MetaSource), config.dtype, device, rope_factor)


def check_torch(source: CheckpointSource, device: str = "cpu") -> None:
    """Raises ParityError, before weights are read, when the packages or the device of PyTorch are not there."""
    try:
        from .torch_reference import torch_device

        if not isinstance(source, MetaSource):
            importlib.import_module(".transformers_model", __package__)
    except ImportError as error:
        raise ParityError(
            f"the reference needs torch and, but for Meta's checkpoints, transformers ({error}): pip install "
            "'sharded_llama[parity]', or compare with a file that --save_reference made on another machine: "
            "--reference=FILE."
        ) from error
    torch_device(device)


def _open(folder: Path, is_meta: bool, dtype: str, device: str, rope_factor: float | None) -> Reference:
    from .torch_reference import TorchReference

    if is_meta:
        from .meta_model import open_meta_model

        return TorchReference(open_meta_model(folder, dtype, rope_factor=rope_factor, device=device))
    from .transformers_model import open_transformers

    return TorchReference(open_transformers(folder, dtype, device))
