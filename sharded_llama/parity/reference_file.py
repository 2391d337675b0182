"""References that travel: what a reference computed, in one safetensors file that any tool can read.

Tensors by name, with the letters of the package for shapes (N: new tokens, C: components of the stage):

    tokens                                     (B, L) F64  token ids, which this type holds exactly
    embedding/embedding, layers.3/q, head/norm             `Stage.values`; head/logits F32, of a float64 model F64
    exact/layers.3/q                           F32         `Stage.exact`: half precision only
    noise/layers.3                             (C,) F64    `Stage.noise` in the order of `stage_axes`, NaN where absent
    head/exact_logits                          (B, L, V)   `Stage.exact_logits`: F64 for float32, F32 for half precision
    greedy/tokens, greedy/margins              (B, N) F64

A float64 reference has no exact values and no noise. Attention weights are there for every layer or for none. The
metadata says the rest, as text: what made the file, the model (`LlamaConfig` as JSON, whose dtype is the
reference's), the fingerprint of its weights, and settings (JSON).
"""

import contextlib
import dataclasses
import json
import math
import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.files import FileTensor, read_slices
from ..checkpoint.hf.safetensors import read_header_and_metadata
from ..checkpoint.source import TensorInfo, shorten
from ..config import LlamaConfig
from ..errors import CheckpointError, ConfigError, ParityError
from .components import EMBEDDING, HEAD, Greedy, Stage, component_shapes, layer_stage, stage_axes

FORMAT, VERSION = "sharded_llama parity reference", "1"
FIELDS = ("format", "version", "package_version", "made_by", "fingerprint", "config", "settings")
MAX_TEXT = 1 << 16  # characters of a field; real ones have a few hundred

TOKENS, GREEDY_TOKENS, MARGINS, EXACT_LOGITS = "tokens", "greedy/tokens", "greedy/margins", "head/exact_logits"
OPTIONAL = "attn_weights"  # which grow with the square of the length
FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
HIGHER = {"float32": FLOAT64, "bfloat16": FLOAT32, "float16": FLOAT32}  # the type that noise is measured in
HALF = ("bfloat16", "float16")

NOT_THE_MODEL = ("dtype", "max_seq_len", "bos_id", "eos_ids")  # fields that do not change a model's numbers


@dataclass(frozen=True, eq=False)
class ReferenceFile:
    """An opened file of a reference: a `Reference` for the tokens that it was made for."""

    file: Path
    made_by: str
    config: LlamaConfig
    fingerprint: str  # of the weights
    settings: dict[str, str]
    tokens_BL: np.ndarray  # int32
    new_tokens: int  # of the greedy continuation
    tensors: dict[str, FileTensor]

    @property
    def dtype(self) -> str:
        """See `Reference.dtype`."""
        return self.config.dtype

    def stages(self, tokens_BL: np.ndarray) -> Iterator[Stage]:
        """See `Reference.stages`. Raises ParityError for other tokens than the file's, or when it cannot be read."""
        self._check_tokens(tokens_BL)
        return map(self._stage, stage_names(self.config))

    def greedy(self, tokens_BL: np.ndarray, new_tokens: int) -> Greedy:
        """The first `new_tokens` saved steps. Raises ParityError for other tokens, or more steps than there are."""
        self._check_tokens(tokens_BL)
        if not 0 <= new_tokens <= self.new_tokens:
            raise ParityError(f"{self.file}: holds {self.new_tokens} new tokens of each row, not {new_tokens}.")
        tokens, margins = (_read(self.tensors, name)[:, :new_tokens] for name in (GREEDY_TOKENS, MARGINS))
        return Greedy(tokens.astype(np.int32), margins)

    def _stage(self, name: str) -> Stage:
        noise = self._arrays({"noise": f"noise/{name}"}).get("noise", np.full(len(stage_axes(name)), math.nan))
        return Stage(
            name,
            values=self._arrays({component: f"{name}/{component}" for component in stage_axes(name)}),
            exact=self._arrays({component: f"exact/{name}/{component}" for component in stage_axes(name)}),
            noise={c: x for c, x in zip(stage_axes(name), noise.tolist(), strict=True) if not math.isnan(x)},
            exact_logits=self._arrays({"logits": EXACT_LOGITS}).get("logits") if name == HEAD else None,
        )

    def _arrays(self, names: dict[str, str]) -> dict[str, np.ndarray]:
        """Those of the named tensors that there are."""
        return {key: _read(self.tensors, name) for key, name in names.items() if name in self.tensors}

    def _check_tokens(self, tokens_BL: np.ndarray) -> None:
        given, expected = np.asarray(tokens_BL), self.tokens_BL
        if given.shape != expected.shape:
            raise ParityError(f"{self.file}: is for tokens of shape {expected.shape}, not {given.shape}.")
        if (given != expected).any():
            row, position = np.argwhere(given != expected)[0]
            raise ParityError(
                f"{self.file}: is for other tokens. The first difference is in row {row} at position {position}: "
                f"it has {expected[row, position]}, and {given[row, position]} is asked for."
            )


def open_reference(file: str | os.PathLike[str]) -> ReferenceFile:
    """Opens a file of `save_reference`, and checks everything but the values of its stages.

    Raises ParityError, naming the file and the tensor, when it is missing, cut short, malformed, of another version of
    the format, or does not hold just the tensors of the model, the type and the tokens that it describes.
    """
    file = Path(file)
    with _as_parity_error():
        tensors, metadata = read_header_and_metadata(file)
    made_by, config, fingerprint, settings = parse_metadata(file, metadata)
    shape, (_, new_tokens) = (_matrix_shape(file, tensors, name) for name in (TOKENS, GREEDY_TOKENS))
    if 0 in shape:
        raise ParityError(f"{file}: tensor {TOKENS} is empty: it has shape {shape}.")
    unknown = tensors.keys() - {TOKENS}
    for name, info in all_tensors(config, shape, new_tokens, f"{layer_stage(0)}/{OPTIONAL}" in tensors):
        if name not in tensors:  # the first one ends it: a description may claim any number of layers
            raise ParityError(f"{file}: lacks tensor {name}.")
        if not is_alike(tensors[name], info):
            raise ParityError(
                f"{file}: tensor {name} is {describe(tensors[name])}, but of its model, type and tokens it has to be "
                f"{describe(info)}."
            )
        unknown.discard(name)
    if unknown:
        raise ParityError(f"{file}: has tensors that no such reference has: {shorten(sorted(unknown))}.")
    tokens, _ = (_read_tokens(file, tensors, name, config.vocab_size) for name in (TOKENS, GREEDY_TOKENS))
    return ReferenceFile(file, made_by, config, fingerprint, settings, tokens, new_tokens, tensors)


def check_model(file: ReferenceFile, config: LlamaConfig, fingerprint: str) -> None:
    """Raises ParityError when the reference is not of this model, in this type, with these weights."""
    check_same_model(str(file.file), file.config, config)
    if file.dtype != config.dtype:
        raise ParityError(
            f"{file.file}: the reference is {file.dtype}, this run {config.dtype}: give --dtype={file.dtype}, or make "
            f"a reference with --dtype={config.dtype}."
        )
    if file.fingerprint != fingerprint:
        raise ParityError(
            f"{file.file}: is a reference of other weights: their fingerprint is {reprlib.repr(file.fingerprint)}, "
            f"that of this run's weights {reprlib.repr(fingerprint)}."
        )


def check_same_model(place: str, theirs: LlamaConfig, ours: LlamaConfig) -> None:
    """Raises ParityError, naming `place` and every field, when two configs differ in more than NOT_THE_MODEL."""
    names = [field.name for field in dataclasses.fields(LlamaConfig) if field.name not in NOT_THE_MODEL]
    values = [(name, getattr(theirs, name), getattr(ours, name)) for name in names]
    differences = [f"{name}: it has {a!r}, this run {b!r}" for name, a, b in values if a != b]
    if differences:
        raise ParityError(f"{place}: is of another model. {'; '.join(differences)}.")


@contextlib.contextmanager
def _as_parity_error() -> Iterator[None]:
    try:
        yield
    except CheckpointError as e:
        raise ParityError(str(e)) from e


# What a reference consists of


def stage_names(config: LlamaConfig) -> Iterator[str]:
    yield EMBEDDING
    yield from map(layer_stage, range(config.n_layers))
    yield HEAD


def all_tensors(
    config: LlamaConfig, tokens_shape: tuple[int, int], new_tokens: int, has_weights: bool
) -> Iterator[tuple[str, TensorInfo]]:
    """Every tensor by name, in the order of the file."""
    yield TOKENS, TensorInfo(tokens_shape, FLOAT64)
    for stage in stage_names(config):
        yield from stage_tensors(stage, config, tokens_shape, has_weights)
    for name in (GREEDY_TOKENS, MARGINS):
        yield name, TensorInfo((tokens_shape[0], new_tokens), FLOAT64)


def stage_tensors(
    stage: str, config: LlamaConfig, tokens_shape: tuple[int, int], has_weights: bool
) -> Iterator[tuple[str, TensorInfo]]:
    """The tensors of one stage by name, in the order of the file."""
    shapes = component_shapes(stage, config, tokens_shape)
    if not has_weights:
        shapes.pop(OPTIONAL, None)
    dtypes = {"logits": FLOAT64 if config.dtype == "float64" else FLOAT32}
    for name, shape in shapes.items():
        yield f"{stage}/{name}", TensorInfo(shape, dtypes.get(name, np.dtype(config.jnp_dtype)))
    for name, shape in shapes.items() if config.dtype in HALF else ():
        yield f"exact/{stage}/{name}", TensorInfo(shape, FLOAT32)
    if config.dtype in HIGHER:
        yield f"noise/{stage}", TensorInfo((len(stage_axes(stage)),), FLOAT64)
    if config.dtype in HIGHER and stage == HEAD:
        yield EXACT_LOGITS, TensorInfo(shapes["logits"], HIGHER[config.dtype])


def is_alike(a: TensorInfo | np.ndarray, b: TensorInfo) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype)


def describe(x: TensorInfo | np.ndarray) -> str:
    return f"{x.dtype} {x.shape}"


# Reading


def parse_metadata(file: Path, metadata: Mapping[str, str]) -> tuple[str, LlamaConfig, str, dict[str, str]]:
    """made_by, config, fingerprint and settings of the file."""
    if metadata.get("format") != FORMAT:
        raise ParityError(f"{file}: is not a parity reference: its metadata does not have format = {FORMAT!r}.")
    if metadata.get("version") != VERSION:
        version = reprlib.repr(metadata.get("version"))
        raise ParityError(f"{file}: is of version {version} of the format; version {VERSION!r} can be read.")
    if metadata.keys() != set(FIELDS):
        raise ParityError(f"{file}: its metadata has to have just {', '.join(FIELDS)}.")
    for name in FIELDS:
        if len(metadata[name]) > MAX_TEXT:
            raise ParityError(f"{file}: {name} in its metadata has more than {MAX_TEXT} characters.")
    config, settings = (_parse_object(file, name, metadata[name]) for name in ("config", "settings"))
    if not all(isinstance(value, str) for value in settings.values()):
        raise ParityError(f"{file}: settings in its metadata are not text by name.")
    try:
        model = LlamaConfig.from_dict(config)
    except (ConfigError, RecursionError) as e:  # a value that is nested too deeply cannot even be shown
        reason = e if isinstance(e, ConfigError) else "a value is nested too deeply."
        raise ParityError(f"{file}: the config in its metadata is not a model's: {reason}") from e
    return metadata["made_by"], model, metadata["fingerprint"], settings


def _parse_object(file: Path, name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half of a character could not be printed
    except (ValueError, RecursionError) as e:
        raise ParityError(f"{file}: {name} in its metadata is not JSON: {reprlib.repr(str(e))}.") from e
    if not isinstance(value, dict):
        raise ParityError(f"{file}: {name} in its metadata is not a JSON object.")
    return value


def _matrix_shape(file: Path, tensors: Mapping[str, FileTensor], name: str) -> tuple[int, int]:
    if name not in tensors:
        raise ParityError(f"{file}: lacks tensor {name}.")
    if len(tensors[name].shape) != 2:
        raise ParityError(f"{file}: tensor {name} has to be a matrix, not of shape {tensors[name].shape}.")
    return tensors[name].shape


def _read(tensors: Mapping[str, FileTensor], name: str) -> np.ndarray:
    out = np.empty(tensors[name].shape, tensors[name].dtype)
    with _as_parity_error():
        read_slices(tensors[name], (slice(None),) * out.ndim, out, name)
    return out


def _read_tokens(file: Path, tensors: Mapping[str, FileTensor], name: str, vocab_size: int) -> np.ndarray:
    """Token ids as int32."""
    values = _read(tensors, name)
    wrong = ~((values >= 0) & (values < vocab_size) & (values == np.floor(values)))  # true of NaN
    if wrong.any():
        row, position = np.argwhere(wrong)[0]
        raise ParityError(
            f"{file}: tensor {name} has {values[row, position]} in row {row} at position {position}, which is no token "
            f"id in 0..{vocab_size - 1}."
        )
    return values.astype(np.int32)
