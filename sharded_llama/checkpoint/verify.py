"""Compares two checkpoints of one model, bit for bit."""

import sys

import numpy as np
from tqdm import tqdm

from ..config import LlamaConfig, check_matches
from ..errors import CheckpointError
from .export import model_bytes, source_blocks
from .reader import check_tensors
from .source import CheckpointSource


def verify(source: CheckpointSource, result: CheckpointSource, config: LlamaConfig, *, progress: bool = True) -> int:
    """Compares every tensor of `result` with that of `source` in `config.dtype`. Returns the number of tensors.

    Raises CheckpointError, naming the tensor and the first value that differs, when they are not the same bits, and
    ConfigError when `result` describes another model than `config`.
    """
    check_matches(config, result.read_config())
    check_tensors(result, config)
    names: set[str] = set()
    show = progress and sys.stderr.isatty()
    with tqdm(total=model_bytes(config), unit="B", unit_scale=True, desc="Verifying", disable=not show) as bar:
        pairs = zip(source_blocks(source, config), source_blocks(result, config), strict=True)
        row = 0
        for (name, expected), (_, found) in pairs:
            row = row if name in names else 0
            names.add(name)
            bits = f"u{expected.dtype.itemsize}"
            differing = expected.view(bits) != found.view(bits)
            if differing.any():
                first = tuple(int(i) for i in np.argwhere(differing)[0])
                at = (row + first[0], *first[1:])
                raise CheckpointError(
                    f"{result.location}: tensor {result.stored_name(name)} differs from {source.location} in "
                    f"{np.count_nonzero(differing)} or more values; the first is {name}{list(at)}: "
                    f"{found[first]} instead of {expected[first]}."
                )
            row += len(expected)
            bar.update(expected.nbytes)
    return len(names)
