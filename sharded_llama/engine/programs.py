"""Traced steps on disk.

Python takes up to half a second to trace and lower a step, one at a time. Where executables come from the disk, that is
most of a start. So what was traced is kept beside them, as StableHLO (`jax.export`), and a later start lowers that.
"""

import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib
from absl import logging
from jax import export
from jax.sharding import Mesh

from ..kv_cache import KVPages
from ..sampling import Sampled
from ..sampling.slots import SlotSampling
from ..weights import LayerWeights, XfmrWeights
from .steps import Forwarded

CHECKSUM_BYTES = 16  # before each program
PACKAGE = Path(__file__).parent.parent
# Of JAX, what a trace may depend on beside the source, the arguments and the environment (JAX_..).
SETTINGS = (
    "jax_debug_infs",
    "jax_debug_nans",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_embedded_constants_max_bytes",
    "jax_enable_checks",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_pallas_enable_debug_checks",
    "jax_pallas_use_mosaic_gpu",
    "jax_random_seed_offset",
    "jax_softmax_custom_jvp",
    "jax_threefry_gpu_kernel_lowering",
    "jax_threefry_partitionable",
    "jax_use_high_dynamic_range_gumbel",
    "jax_use_shardy_partitioner",
)
# Kernels by Pallas are no part of what JAX promises to read in another version; another version reads other files.
KERNELS = [export.DisabledSafetyCheck.custom_call(name) for name in ("__gpu$xla.gpu.triton", "triton_kernel_call")]

for _type in (Forwarded, KVPages, LayerWeights, Sampled, SlotSampling, XfmrWeights):
    export.register_namedtuple_serialization(_type, serialized_name=f"sharded_llama.{_type.__name__}")


def programs_folder(mesh: Mesh) -> Path | None:
    """Where a mesh's steps are kept: in a folder of JAX's compilation cache. None: nowhere.

    Only steps of GPUs in one process are kept. On CPUs compiling takes far longer than tracing.
    """
    cache = jax.config.jax_compilation_cache_dir
    if not cache or not jax.config.jax_enable_compilation_cache or "://" in cache:
        return None
    on_gpu = mesh.devices.flat[0].platform == "gpu"
    return Path(cache) / "programs" if on_gpu and jax.process_count() == 1 else None


def lower(
    run: Callable, args: tuple, *, donate: tuple[int, ...], out: Any, folder: Path | None, identity: tuple
) -> jax.stages.Lowered:
    """`jax.jit(run).lower(*args)`, without tracing if `folder` has it already; else it is put there.

    Args:
      run, args: the function and what stands for its arguments, with shardings.
      donate, out: donate_argnums and out_shardings.
      folder: None: nothing is kept.
      identity: with the arguments, this package's source and JAX's version it says what `run` is: two functions of one
        identity must be the same. Its `repr` counts.
    """
    jitted = jax.jit(run, donate_argnums=donate, out_shardings=out)
    if folder is None:
        return jitted.lower(*args)
    file = folder / f"{_digest(identity, args, donate, out)}.stablehlo"
    program = _read(file)
    try:
        if program is None:
            program = export.export(jitted, disabled_checks=KERNELS)(*args)
            _write(file, bytes(program.serialize()))
        # The same detour in the first start as in later ones, so that they compile the same and find it on the disk.
        return jax.jit(program.call, donate_argnums=donate, out_shardings=out).lower(*args)
    except Exception as error:  # whatever JAX does not export; what is wrong with the step itself comes again
        logging.log_first_n(logging.WARNING, "steps are not kept on disk and will be traced again: %s", 1, error)
        return jitted.lower(*args)


def _digest(*what: Any) -> str:
    settings = [getattr(jax.config, name, None) for name in SETTINGS]
    environment = sorted((name, value) for name, value in os.environ.items() if name.startswith("JAX_"))
    of = (jax.__version__, jaxlib.__version__, settings, environment, SOURCE, *what)
    return hashlib.blake2b(repr(of).encode(), digest_size=16).hexdigest()


def _source_digest() -> str:
    """Of all of this package's source: a change anywhere may change what is traced."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{file.relative_to(PACKAGE)} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


SOURCE = _source_digest()  # of what is being imported: a file that is changed later does not run here


def _read(file: Path) -> export.Exported | None:
    """None if there is none, or none that can be used."""
    try:
        stored = file.read_bytes()
    except OSError:
        return None
    checksum, program = stored[:CHECKSUM_BYTES], stored[CHECKSUM_BYTES:]
    if checksum != _checksum(program):
        logging.warning("%s is damaged and is made again.", file)
        return None
    try:
        return export.deserialize(bytearray(program))
    except Exception as error:  # of another version of the format, or without what reads it
        logging.log_first_n(logging.WARNING, "%s cannot be read: %s", 1, file, error)
        return None


def _write(file: Path, program: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{uuid.uuid4().hex}")  # readable for those who share the folder
    try:
        temporary.write_bytes(_checksum(program) + program)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _checksum(program: bytes) -> bytes:
    """The parser is not made for files that are cut or changed."""
    return hashlib.blake2b(program, digest_size=CHECKSUM_BYTES).digest()
