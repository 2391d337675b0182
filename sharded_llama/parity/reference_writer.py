"""Writes a reference to a file, stage after stage; `reference_file` has the format."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from .. import __version__
from ..checkpoint.hf.safetensors import SafetensorsWriter
from ..checkpoint.source import TensorInfo, shorten
from ..config import LlamaConfig
from ..errors import ParityError
from .components import HEAD, Reference, Stage, stage_axes
from .output_file import naming, replacing
from .reference_file import (
    EXACT_LOGITS,
    FLOAT64,
    FORMAT,
    GREEDY_TOKENS,
    MARGINS,
    OPTIONAL,
    TOKENS,
    VERSION,
    all_tensors,
    describe,
    is_alike,
    parse_metadata,
    stage_names,
    stage_tensors,
)

Write = Callable[[str, np.ndarray], None]


def save_reference(
    file: str | os.PathLike[str],
    reference: Reference,
    tokens_BL: np.ndarray,
    *,
    config: LlamaConfig,
    fingerprint: str,
    new_tokens: int,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Runs a reference and writes what it computes; returns the bytes of the file.

    Holds the values of one stage at a time (at the beginning, the embedding and the first layer). `config` and
    `fingerprint` say which model it is, for `check_model`. The file is complete or, also after an interrupt, not there;
    one that is there already is replaced at the end. Raises ParityError when it cannot be written, or when the
    reference gives other tensors than its model and type ask for.
    """
    file, config, tokens = Path(file), config.replace(dtype=reference.dtype), _checked_tokens(tokens_BL, config)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "package_version": __version__,
        "made_by": reference.made_by,
        "fingerprint": fingerprint,
        "config": json.dumps(dataclasses.asdict(config)),
        "settings": json.dumps(dict(settings)),
    }
    parse_metadata(file, metadata)  # what could not be read again is refused before anything is computed
    with replacing(file) as temporary:
        stages = reference.stages(tokens)
        first = [next(stages, None), next(stages, None)]  # the layer shows whether there are attention weights
        has_weights = first[1] is not None and OPTIONAL in first[1].values
        tensors = dict(all_tensors(config, tokens.shape, new_tokens, has_weights))
        _check_space(file, sum(info.nbytes for info in tensors.values()))
        with _writing(file, temporary, tensors, metadata) as write:
            write(TOKENS, tokens.astype(FLOAT64))
            for name in stage_names(config):
                expected = dict(stage_tensors(name, config, tokens.shape, has_weights))
                # Nothing here refers to a stage when the next one is computed.
                _write_stage(write, first.pop(0) if first else next(stages, None), name, expected)
            if next(stages, None) is not None:
                raise ParityError(f"the reference goes on after {HEAD}.")
            _write_greedy(write, reference, tokens, new_tokens, config)
        return temporary.stat().st_size


@contextlib.contextmanager
def _writing(
    file: Path, temporary: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> Iterator[Write]:
    """A function that appends tensor after tensor. The bytes are on the disk when the block ends."""
    with naming(file):
        writer = SafetensorsWriter(temporary, tensors, metadata)

    def write(name: str, array: np.ndarray) -> None:
        with naming(file):
            writer.write(name, array)

    try:
        yield write
    except BaseException:
        with contextlib.suppress(OSError):  # of bytes that were still to be written
            writer.close(complete=False)
        raise
    with naming(file):
        writer.close()


def _write_stage(write: Write, stage: Stage | None, name: str, expected: Mapping[str, TensorInfo]) -> None:
    if stage is None or stage.name != name:
        given = "ends" if stage is None else f"gives {stage.name}"
        raise ParityError(f"the reference {given} where {name} should come.")
    arrays = {f"{name}/{component}": x for component, x in stage.values.items()}
    arrays |= {f"exact/{name}/{component}": x for component, x in stage.exact.items()}
    if stage.noise:
        noise = [stage.noise.get(component, math.nan) for component in stage_axes(name)]
        arrays[f"noise/{name}"] = np.array(noise, FLOAT64)
    if stage.exact_logits is not None:
        arrays[EXACT_LOGITS] = stage.exact_logits
    missing, unknown = [x for x in expected if x not in arrays], [x for x in arrays if x not in expected]
    if missing:
        raise ParityError(f"the reference does not give {shorten(missing)}.")
    if unknown:
        raise ParityError(f"the reference gives {shorten(unknown)}, which do not belong to its type or model.")
    for tensor, info in expected.items():
        _write_checked(write, tensor, arrays[tensor], info)


def _write_greedy(
    write: Write, reference: Reference, tokens_BL: np.ndarray, new_tokens: int, config: LlamaConfig
) -> None:
    info = TensorInfo((len(tokens_BL), new_tokens), FLOAT64)
    tokens, margins = np.empty(info.shape, np.int32), np.empty(info.shape)
    if new_tokens:
        tokens, margins = reference.greedy(tokens_BL, new_tokens)
        tokens = _checked_tokens(tokens, config)
    _write_checked(write, GREEDY_TOKENS, tokens.astype(FLOAT64), info)
    _write_checked(write, MARGINS, margins, info)


def _write_checked(write: Write, name: str, array: np.ndarray, info: TensorInfo) -> None:
    if not is_alike(array, info):
        raise ParityError(f"the reference gives {name} as {describe(array)}, but its model asks for {describe(info)}.")
    write(name, array)


def _checked_tokens(tokens: np.ndarray, config: LlamaConfig) -> np.ndarray:
    """The tokens as int32."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
        raise ParityError(f"tokens must be whole numbers of shape (rows, length), not {describe(tokens)}.")
    wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if wrong.size:
        raise ParityError(f"token {wrong[0]} is no token id in 0..{config.vocab_size - 1}.")
    return tokens.astype(np.int32)


def _check_space(file: Path, needed: int) -> None:
    """Raises ParityError before a disk is filled in vain."""
    free = shutil.disk_usage(file.parent).free
    if free < needed:
        raise ParityError(f"{file}: needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free there.")
