"""Reading a Hugging Face checkpoint's config.json and generation_config.json.

What would change the numbers and is not implemented is refused by name; the tables of it are in `hf_fields`.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import hf_fields
from .config import DTYPES, LlamaConfig, RopeScaling, check_count, check_positive, naming
from .errors import ConfigError
from .json_file import read_json_object

logger = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"


def read_config(path: str | os.PathLike, dtype: str | None = None) -> LlamaConfig:
    """The LlamaConfig of a checkpoint folder, or of one config.json file.

    Reads the form of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and of transformers 5
    (`rope_parameters`, `dtype`). A field left out has the default of transformers' LlamaConfig, but the sizes must
    be there. The end-of-sequence ids are those of the generation_config.json beside the file where that names
    some, as in `transformers.generate`, else those of config.json. `dtype` overrides the checkpoint's.

    Raises ConfigError, naming file and field, for what is missing, malformed, or not supported.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise ConfigError(f"{path} holds no config.json: it is not the folder of a Hugging Face checkpoint.")
    raw = read_json_object(file)
    with naming(file):
        _check_supported(raw)
        config = LlamaConfig(
            **_sizes(raw),
            **_rope(raw),
            norm_eps=_positive(raw, "rms_norm_eps", 1e-6),
            max_seq_len=_count(raw, "max_position_embeddings", 2048),
            tie_embeddings=_get(raw, "tie_word_embeddings", False),
            bos_id=raw.get("bos_token_id", 1),
            eos_ids=_token_ids(raw.get("eos_token_id", 2)),
            dtype=dtype or _dtype(raw),
        )
    generation = file.with_name(GENERATION_CONFIG)
    if not generation.is_file():
        return config
    eos_ids = _token_ids(read_json_object(generation).get("eos_token_id"))
    with naming(generation):
        return config.replace(eos_ids=eos_ids or config.eos_ids)


def read_generation_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The sampling defaults of a checkpoint folder: what `transformers.generate` does when told nothing.

    `{"do_sample": False}` (greedy) when generation_config.json is missing or does not turn sampling on. Otherwise
    all of do_sample, temperature, top_k (0: off), top_p (1.0: off) and min_p (0.0: off). A top_k left out is 50,
    because that is transformers' default: Llama 3.1 Instruct, which sets only temperature and top_p, samples from
    50 tokens there. In either case repetition_penalty is there unless it is 1 (off). Settings that are not supported
    are logged as a warning.

    Raises ConfigError, naming file and field, for what is malformed.
    """
    file = Path(folder) / GENERATION_CONFIG
    if not file.is_file():
        return {"do_sample": False}
    raw = read_json_object(file)
    with naming(file):
        for name, neutral in hf_fields.GENERATION_NEUTRAL.items():
            if raw.get(name) is not None and raw[name] not in neutral:
                logger.warning("%s: %s=%r is not supported and has no effect.", file, name, raw[name])
        penalty = _positive(raw, "repetition_penalty", 1.0)
        penalties = {} if penalty == 1.0 else {"repetition_penalty": penalty}
        if raw.get("do_sample") is not True:
            return {"do_sample": False, **penalties}
        _positive(raw, "top_p", 1.0)  # 0 would keep no token
        top_k = _get(raw, "top_k", 50)
        if top_k != 0:
            check_count("top_k", top_k)
        return {
            "do_sample": True,
            "temperature": _positive(raw, "temperature", 1.0),
            "top_k": top_k,
            "top_p": _probability(raw, "top_p", 1.0),
            "min_p": _probability(raw, "min_p", 0.0),
            **penalties,
        }


def _get(raw: Mapping[str, Any], name: str, default: Any) -> Any:
    """`raw[name]`, where null means the same as absent."""
    value = raw.get(name)
    return default if value is None else value


def _count(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = _get(raw, name, default)
    if value is None:
        raise ConfigError(f"{name} is missing.")
    check_count(name, value)
    return value


def _positive(raw: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = _get(raw, name, default)
    if value is None:
        raise ConfigError(f"{name} is missing.")
    check_positive(name, value)
    return float(value)


def _probability(raw: Mapping[str, Any], name: str, default: float) -> float:
    value = _get(raw, name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ConfigError(f"{name}={value!r} must be a number from 0 to 1.")
    return float(value)


def _token_ids(value: Any) -> tuple[Any, ...]:
    """One id, a list of ids or null, as a tuple; LlamaConfig checks what is in it."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _sizes(raw: Mapping[str, Any]) -> dict[str, int]:
    sizes = {ours: _count(raw, theirs) for ours, theirs in hf_fields.SIZES.items()}
    dim, n_heads = sizes["dim"], sizes["n_heads"]
    if raw.get("head_dim") is None and dim % n_heads:
        raise ConfigError(
            f"hidden_size={dim} is not a multiple of num_attention_heads={n_heads}, so head_dim must be given."
        )
    sizes["n_kv_heads"] = _count(raw, "num_key_value_heads", n_heads)
    sizes["head_dim"] = _count(raw, "head_dim", dim // n_heads)
    return sizes


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling, with the precedence of transformers' `standardize_rope_params`."""
    source = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = _get(raw, source, {})
    if not isinstance(rope, dict):
        raise ConfigError(f"{source}={rope!r} must be an object or null.")
    with naming(source):
        for name, value in rope.items():
            if isinstance(value, dict):
                raise ConfigError(f"{name}={value!r}: rotary embeddings that differ by layer are not supported.")
        if _get(rope, "partial_rotary_factor", 1) != 1:
            raise ConfigError(f"partial_rotary_factor={rope['partial_rotary_factor']!r} is not supported, only 1 is.")
        theta = _positive(rope if rope.get("rope_theta") is not None else raw, "rope_theta", 10000.0)
        kind = rope.get("rope_type", rope.get("type", "default"))  # "type" is its name before transformers 4.43
        if kind == "default":
            return {"rope_theta": theta}
        if kind != "llama3":
            raise ConfigError(f"rope_type={kind!r} is not supported; supported are 'default' and 'llama3'.")
        # The context before scaling: the top-level field wins over the one beside the factors.
        name = "original_max_position_embeddings"
        original = _count(
            raw if raw.get(name) is not None else rope, name, _count(raw, "max_position_embeddings", 2048)
        )
        factors = {name: _positive(rope, name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        return {"rope_theta": theta, "rope_scaling": RopeScaling(**factors, original_max_seq_len=original)}


def _dtype(raw: Mapping[str, Any]) -> str:
    name = _get(raw, "dtype", raw.get("torch_dtype"))
    if name is None:
        logger.warning("the checkpoint's config names no dtype; running in bfloat16.")
        return "bfloat16"
    name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r} is not supported, only {', '.join(DTYPES)} are.")
    return name


def _check_supported(raw: Mapping[str, Any]) -> None:
    """Raises ConfigError for what would change the numbers; warns of fields that are not known."""
    model_type, architectures = raw.get("model_type"), _get(raw, "architectures", [])
    if model_type is None and not architectures:
        raise ConfigError("model_type is missing; expected 'llama'.")
    if model_type not in (None, "llama"):
        raise ConfigError(f"model_type={model_type!r} is not supported, only 'llama' is.")
    if not isinstance(architectures, list) or any(a not in hf_fields.ARCHITECTURES for a in architectures):
        raise ConfigError(f"architectures={architectures!r} is not supported, only ['LlamaForCausalLM'] is.")
    known = hf_fields.READ.union(hf_fields.NEUTRAL, hf_fields.NEUTRAL_ITEMS, hf_fields.SCORE_SCALES, hf_fields.HARMLESS)
    for name, value in raw.items():
        if not _is_neutral(name, value, raw):
            raise ConfigError(f"{name}={value!r} is not supported: it would change the model's numbers.")
        if name not in known and value is not None and value is not False:
            logger.warning("ignoring %s=%r of the checkpoint's config: an unknown field.", name, value)


def _is_neutral(name: str, value: Any, raw: Mapping[str, Any]) -> bool:
    """Whether the field leaves the numbers those of a plain Llama."""
    if value is None or value == [] or value == {}:
        return True
    if name in hf_fields.NEUTRAL_ITEMS:
        return isinstance(value, list) and all(item in hf_fields.NEUTRAL_ITEMS[name] for item in value)
    if name in hf_fields.SCORE_SCALES:
        return value == hf_fields.SCORE_SCALES[name](_sizes(raw)["head_dim"])
    if name == "sliding_window" and raw.get("use_sliding_window") is False:
        return True
    return value in hf_fields.NEUTRAL.get(name, (value,))
