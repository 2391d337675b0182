"""Which weights a checkpoint has, in a few bytes, whatever its format."""

import hashlib

import numpy as np

from ..checkpoint import CheckpointSource
from ..checkpoint.layout import canonical_shapes
from ..config import LlamaConfig
from ..errors import CheckpointError


def fingerprint(source: CheckpointSource, config: LlamaConfig) -> str:
    """SHA-256 of the norms and of a row of every other matrix, as the checkpoint stores them.

    Equal for one model in all formats, different for another one or for weights that were rounded to another type. wq
    and wk are left out: a mistake in the order of their rows is for the comparison to find, and must not look like
    another model. Raises CheckpointError when a tensor is missing or cannot be read.
    """
    digest = hashlib.sha256()
    for name, shape in canonical_shapes(config).items():
        if name.endswith((".wq", ".wk")):
            continue
        if name not in source.tensors:
            raise CheckpointError(f"{source.location}: lacks {source.stored_name(name)}.")
        if source.tensors[name].shape != shape:
            given = source.tensors[name].shape
            raise CheckpointError(f"{source.location}: {source.stored_name(name)} is {given}, should be {shape}.")
        row = shape[0] // 2
        slices = (slice(row, row + 1), slice(0, shape[1])) if len(shape) == 2 else (slice(0, shape[0]),)
        out = np.empty([s.stop - s.start for s in slices], source.tensors[name].dtype)
        source.read(name, slices, out)
        digest.update(f"{name}{shape}".encode() + out.astype(np.float64).tobytes())
    return digest.hexdigest()
