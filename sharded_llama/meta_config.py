"""Reading and writing the params.json of Meta's checkpoints, and the sidecar file with what it cannot say.

The fields and their defaults are those of `ModelArgs` in Meta's reference code (llama-models and the Llama 2
repository). params.json does not hold the factor of scaled rotary embeddings, the context length, the ids of
special tokens, or whether the embeddings are tied: these come from the sidecar where there is one, else from what
is known of the published models.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import MAX_LAYERS, MAX_SIZE, LlamaConfig, RopeScaling, check_count, check_positive, naming
from .errors import ConfigError
from .json_file import read_json_object

logger = logging.getLogger(__name__)

PARAMS = "params.json"
SIDECAR = "sharded_llama.json"

SIZES = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"}
READ = SIZES | {"ffn_dim_multiplier", "norm_eps", "rope_theta", "use_scaled_rope"}
HARMLESS = {"max_batch_size", "max_seq_len"}  # of a run, not of a model
DISABLED = {-1, 0, None}  # values at which a field of ModelArgs that is not read does nothing; 0 also matches False
MAX_FFN_DIM = 2**31

LLAMA3_VOCAB = 128_256
LLAMA32_SHAPES = {(2048, 16), (3072, 28)}  # (dim, n_layers) of the 1B and 3B models: factor 32, tied embeddings
ROPE_FACTOR, ROPE_FACTOR_LLAMA32 = 8.0, 32.0
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR, ORIGINAL_SEQ_LEN = 1.0, 4.0, 8192  # constants in Meta's code


def is_llama32(params: Mapping[str, Any]) -> bool:
    """Whether params.json has the shapes of Llama 3.2 1B or 3B."""
    return (params.get("dim"), params.get("n_layers")) in LLAMA32_SHAPES and params.get("use_scaled_rope") is True


def read_params(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of params.json. Raises ConfigError for a model that is not a plain Llama, naming the field."""
    file = Path(folder) / PARAMS
    params = read_json_object(file)
    with naming(file):
        for name in ("dim", "n_layers", "n_heads"):
            _count(params, name)
        for name, value in params.items():
            disabled = isinstance(value, int | None) and value in DISABLED
            if name not in READ | HARMLESS and not disabled:
                raise ConfigError(
                    f"{ascii(name)[1:-1]}={ascii(value)[:100]} is not supported: it is not a field of a Llama 2 or 3 "
                    "text model."
                )
    return params


def read_sidecar(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What our exporter wrote beside params.json; empty without it."""
    file = Path(folder) / SIDECAR
    return read_json_object(file) if file.exists() else {}


def read_config(
    folder: str | os.PathLike[str],
    params: Mapping[str, Any],
    sidecar: Mapping[str, Any],
    *,
    vocab_size: int,
    dtype: str,
    tied: bool,
    rope_factor: float | None = None,
) -> LlamaConfig:
    """The LlamaConfig of a Meta checkpoint folder.

    Args:
      folder: for messages.
      params: of `read_params`.
      sidecar: of `read_sidecar`.
      vocab_size: rows of the embeddings, which params.json may leave to the tokenizer (-1).
      dtype: of the stored tensors.
      tied: whether the checkpoint's output matrix is its embeddings.
      rope_factor: of scaled rotary embeddings; None: the sidecar's, else 32 for the shapes of Llama 3.2 1B and 3B,
        else 8.

    Raises ConfigError, naming file and field, for what is missing, malformed, or not supported.
    """
    with naming(Path(folder) / PARAMS):
        sizes = {name: _count(params, name) for name in ("dim", "n_layers", "n_heads")}
        if sizes["dim"] % sizes["n_heads"]:
            raise ConfigError(f"dim={sizes['dim']} must be a multiple of n_heads={sizes['n_heads']}.")
        stated = params.get("vocab_size")
        if stated not in (None, -1, vocab_size):
            raise ConfigError(f"vocab_size={stated!r}, but the embeddings have {vocab_size} rows.")
        scaled = params.get("use_scaled_rope", False)
        if not isinstance(scaled, bool):
            raise ConfigError(f"use_scaled_rope={scaled!r} must be true or false.")
        llama3 = scaled or vocab_size == LLAMA3_VOCAB  # Llama 2 has no field for theta
        values = {
            **sizes,
            "n_kv_heads": _count(params, "n_kv_heads", sizes["n_heads"]),
            "head_dim": sizes["dim"] // sizes["n_heads"],
            "ffn_dim": ffn_dim(
                sizes["dim"], _count(params, "multiple_of", 256), _positive(params, "ffn_dim_multiplier", None)
            ),
            "vocab_size": vocab_size,
            "norm_eps": _positive(params, "norm_eps", 1e-5),
            "rope_theta": _positive(params, "rope_theta", 500_000.0 if llama3 else 10_000.0),
            "rope_scaling": None,
            "tie_embeddings": tied,
            "dtype": dtype,
        }
    if rope_factor is not None and not scaled:
        raise ConfigError(f"{folder}: a rope factor was given, but its params.json has no use_scaled_rope.")
    if scaled:
        factor = ROPE_FACTOR_LLAMA32 if is_llama32(params) else ROPE_FACTOR
        values["rope_scaling"] = {
            "factor": factor,
            "low_freq_factor": LOW_FREQ_FACTOR,
            "high_freq_factor": HIGH_FREQ_FACTOR,
            "original_max_seq_len": ORIGINAL_SEQ_LEN,
        }
    values |= _assumed(values, scaled)
    with naming(Path(folder) / PARAMS):
        LlamaConfig.from_dict(values | {"tie_embeddings": False})  # the sidecar may be wrong in that
    with naming(Path(folder) / SIDECAR):
        unknown = sorted(sidecar.keys() - _SIDECAR_FIELDS)
        if unknown:
            raise ConfigError(f"{unknown[0]!r} is not one of its fields: {', '.join(sorted(_SIDECAR_FIELDS))}.")
        values |= sidecar
        config = LlamaConfig.from_dict(values)
        if (config.rope_scaling is None) == scaled:
            raise ConfigError(f"rope_scaling={config.rope_scaling} does not go with use_scaled_rope={scaled}.")
    if rope_factor is not None:
        config = config.replace(rope_scaling=RopeScaling(**{**vars(config.rope_scaling), "factor": rope_factor}))
    missing = sorted((_SIDECAR_FIELDS - sidecar.keys()) | ({"rope_theta"} - params.keys()))
    if missing:
        told = ", ".join(f"{name}={getattr(config, name)}" for name in missing)
        logger.info("%s does not say all of the model; assuming %s.", Path(folder) / PARAMS, told)
    return config


_SIDECAR_FIELDS = frozenset({"rope_scaling", "max_seq_len", "bos_id", "eos_ids", "tie_embeddings"})


def _assumed(values: Mapping[str, Any], scaled: bool) -> dict[str, Any]:
    """Context length in tokens and special tokens, by family."""
    if values["vocab_size"] == LLAMA3_VOCAB:
        # Base models end with 128001, Instruct models also with 128008 and 128009, which base models never write.
        ids = {"bos_id": 128_000, "eos_ids": (128_001, 128_008, 128_009)}
        return ids | {"max_seq_len": 131_072 if scaled else 8192}
    code_llama = values["rope_theta"] == 1_000_000.0
    ids = {"bos_id": 1, "eos_ids": (2,)} if values["vocab_size"] > 2 else {"bos_id": None, "eos_ids": ()}
    return ids | {"max_seq_len": 131_072 if scaled else 16_384 if code_llama else 4096}


def ffn_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The feed-forward width that Meta's code computes: two thirds of 4 D, scaled, rounded up to a multiple.

    Raises ConfigError when it is beyond any model.
    """
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        if not multiplier * hidden < MAX_FFN_DIM:
            raise ConfigError(f"ffn_dim_multiplier={multiplier} gives a feed-forward width beyond {MAX_FFN_DIM}.")
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def to_params(config: LlamaConfig) -> dict[str, Any]:
    """The contents of params.json for `config`. Raises ConfigError when it cannot say the model."""
    if config.head_dim * config.n_heads != config.dim:
        raise ConfigError(
            f"Meta's layout has no head_dim: it is dim / n_heads = {config.dim / config.n_heads:g}, but this model's "
            f"is {config.head_dim}. Choose another format."
        )
    multiple_of, multiplier = _ffn_fields(config)
    params = {
        "dim": config.dim,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple_of,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "n_layers": config.n_layers,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "use_scaled_rope": config.rope_scaling is not None,
        "vocab_size": config.vocab_size,
    }
    return {name: value for name, value in params.items() if value is not None}


def to_sidecar(config: LlamaConfig) -> dict[str, Any]:
    """The contents of the sidecar file of `config`."""
    values = {name: getattr(config, name) for name in sorted(_SIDECAR_FIELDS)}
    return values | {"rope_scaling": config.rope_scaling and vars(config.rope_scaling)}


def _ffn_fields(config: LlamaConfig) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) that give `config.ffn_dim`: a published pair if one does."""
    published = [(n, m) for m in (None, 1.0, 1.2, 1.3, 1.5) for n in (4096, 1024, 256)]
    exact = (1, (config.ffn_dim + 0.5) / int(2 * (4 * config.dim) / 3))
    for multiple_of, multiplier in [*published, exact]:
        if ffn_dim(config.dim, multiple_of, multiplier) == config.ffn_dim:
            return multiple_of, multiplier
    raise ConfigError(f"Meta's layout cannot say ffn_dim={config.ffn_dim} for dim={config.dim}.")


def _count(params: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = default if params.get(name) is None else params[name]
    if value is None:
        raise ConfigError(f"{name} is missing.")
    check_count(name, value, MAX_LAYERS if name == "n_layers" else MAX_SIZE)
    return value


def _positive(params: Mapping[str, Any], name: str, default: float | None) -> float | None:
    value = default if params.get(name) is None else params[name]
    if value is not None:
        check_positive(name, value)
        value = float(value)
    return value
