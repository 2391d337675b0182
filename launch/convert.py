"""Converts a checkpoint to Hugging Face, Meta or orbax, or prints what it is.

    python -m launch.convert --checkpoint=FOLDER --output=NEW_FOLDER --format=hf
    python -m launch.convert --checkpoint=FOLDER --output=NEW_FOLDER --format=meta --meta_files=8 --verify
    python -m launch.convert --inspect=FOLDER --mesh=data:1,model:8

Any format converts to any other on a machine whose memory is far smaller than the model: tensors pass through in
blocks. The new folder appears under its name when it is complete. Tokenizer and sampling defaults come along.
"""

import re
import resource
import sys
import time
from pathlib import Path

import jax
from absl import flags, logging

from sharded_llama.checkpoint import FORMATS, CheckpointSource, ExportFormat, convert, open_checkpoint
from sharded_llama.checkpoint.describe import describe, describe_mesh
from sharded_llama.checkpoint.export import stored_dtype
from sharded_llama.checkpoint.layout import canonical_shapes
from sharded_llama.checkpoint.verify import verify
from sharded_llama.config import LlamaConfig
from sharded_llama.engine.loading import checkpoint_folder
from sharded_llama.errors import CheckpointError, ConfigError
from sharded_llama.mesh import parse_mesh

from . import common

flags.adopt_module_key_flags(common)

OUTPUT = flags.DEFINE_string("output", None, "New folder to write.")
FORMAT = flags.DEFINE_enum("format", None, FORMATS, "Format to write.")
MAX_SHARD_SIZE = flags.DEFINE_string("max_shard_size", "5GB", "Most bytes of a Hugging Face file: 500MB, 5GB, 1GiB.")
META_FILES = flags.DEFINE_integer("meta_files", 1, "Files (model-parallel ranks) of a Meta checkpoint.", 1, 8)
VERIFY = flags.DEFINE_bool("verify", False, "Compare every tensor of the result with the source, bit for bit.")
INSPECT = flags.DEFINE_string(
    "inspect", None, "Print what the checkpoint in this folder is and, with --mesh, what each device would hold."
)

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as 500MB, 5GB or 1GiB, as transformers writes them."""
    match = re.fullmatch(r"([0-9]{1,12}) ?([A-Za-z]*)", text)
    if match is None or match[2] not in UNITS or not int(match[1]):
        raise ConfigError(f"--max_shard_size={text}: expected a size such as 500MB, 5GB or 1GiB.")
    return int(match[1]) * UNITS[match[2]]


def open_source(name: str) -> tuple[CheckpointSource, LlamaConfig]:
    """The checkpoint, and its config in the dtype that --dtype asks for, else the one that its tensors need."""
    source = open_checkpoint(checkpoint_folder(name), rope_factor=common.ROPE_FACTOR.value)
    config = source.read_config()
    stored = stored_dtype(source)
    if common.DTYPE.value is None and stored != config.dtype:
        logging.warning("The config says %s, but the tensors are stored as %s: taking that.", config.dtype, stored)
    return source, config.replace(dtype=common.DTYPE.value or stored)


def inspect(name: str) -> None:
    source, config = open_source(name)
    print(describe(source, config))
    if common.MESH.value is not None:
        print(f"\n{describe_mesh(config, parse_mesh(common.MESH.value))}")


def peak_memory() -> int:
    """Bytes of memory that this process had at most."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    # Linux's ru_maxrss begins with the peak of the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def main() -> None:
    if INSPECT.value is not None:
        inspect(INSPECT.value)
        return
    if OUTPUT.value is None or FORMAT.value is None:
        raise CheckpointError(
            f"nothing to do: give --output=NEW_FOLDER and --format={'|'.join(FORMATS)}, or --inspect=FOLDER."
        )
    if jax.process_count() > 1:
        raise CheckpointError("conversion runs in one process: leave out --coordinator_address and its companions.")
    output = Path(OUTPUT.value).expanduser()
    format = ExportFormat(FORMAT.value, parse_size(MAX_SHARD_SIZE.value), META_FILES.value)
    source, config = open_source(common.checkpoint_name())
    start = time.perf_counter()
    nbytes = convert(source, config, output, format)
    seconds = time.perf_counter() - start
    print(
        f"Converted {len(canonical_shapes(config))} tensors, {nbytes:,} bytes in {seconds:.1f} s "
        f"({nbytes / 1e9 / seconds:.2f} GB/s), peak host memory {peak_memory() / 1e9:.2f} GB: {output}",
        flush=True,
    )
    if VERIFY.value:
        count = verify(source, open_checkpoint(output), config)
        converted = f" converted to {config.dtype}" if stored_dtype(source) != config.dtype else ""
        print(f"Verified {count} tensors: the same bits as in {source.location}{converted}.")


def cli() -> None:
    common.run(main)


if __name__ == "__main__":
    cli()
