"""LlamaConfig: everything about a model that changes its numbers, and nothing about how it is run."""

import contextlib
import dataclasses
import difflib
import os
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp

from .errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16", "float64")


# Far beyond any model: what a broken file says must not ask for endless lists or overflow.
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 10_000


def check_count(name: str, value: Any, limit: int = MAX_SIZE) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least 1.")
    if value > limit:
        raise ConfigError(f"{name}={reprlib.repr(value)} must be at most {limit}.")


def check_positive(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:  # a whole number may be beyond that
        raise ConfigError(f"{name}={value!r} must be a finite number greater than 0.")


@contextlib.contextmanager
def naming(place: Path | str) -> Iterator[None]:
    """Puts the file or field that holds the mistake before the message of a ConfigError.

    What is nested too deeply to be shown in a message becomes such an error as well.
    """
    try:
        yield
    except ConfigError as e:
        raise ConfigError(f"{place}: {e}") from None
    except RecursionError:
        raise ConfigError(f"{place}: has a value that is nested too deeply.") from None


def _check_fields(cls: type, given: Iterable[str], where: str) -> None:
    """Raises ConfigError when `given` has names that are no fields of `cls`, or lacks fields without a default."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in given:
        if name not in fields:
            nearest = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"its fields are {', '.join(fields)}."
            raise ConfigError(f"{where} has no field {name!r}; {hint}")
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in given]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3 frequency scaling ("rope_type": "llama3" in a Hugging Face config.json)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int  # in tokens

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            check_positive(f"rope_scaling.{name}", getattr(self, name))
        check_count("rope_scaling.original_max_seq_len", self.original_max_seq_len)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"rope_scaling.high_freq_factor={self.high_freq_factor} must be greater than "
                f"rope_scaling.low_freq_factor={self.low_freq_factor}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shape and constants of a Llama-family model. Hashable, so that it is a static argument of jitted functions.

    Raises ConfigError, naming the field, when a value is of the wrong type or out of range.
    """

    dim: int  # D
    n_layers: int
    n_heads: int  # H
    n_kv_heads: int  # G
    head_dim: int  # K
    ffn_dim: int  # F
    vocab_size: int  # V
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    max_seq_len: int = 2048  # longest context the model was made for, in tokens
    tie_embeddings: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"  # of weights, activations and cache

    def __post_init__(self) -> None:
        check_count("n_layers", self.n_layers, MAX_LAYERS)
        for name in ("dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "max_seq_len"):
            check_count(name, getattr(self, name))
        for name in ("norm_eps", "rope_theta"):
            check_positive(name, getattr(self, name))
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}.")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs.")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            raise ConfigError(f"rope_scaling={self.rope_scaling!r} must be a RopeScaling or None.")
        if not isinstance(self.tie_embeddings, bool):
            raise ConfigError(f"tie_embeddings={self.tie_embeddings!r} must be True or False.")
        if not isinstance(self.eos_ids, tuple):
            raise ConfigError(f"eos_ids={self.eos_ids!r} must be a tuple of token ids, such as (2,).")
        if self.bos_id is not None:
            self._check_token("bos_id", self.bos_id)
        for token in self.eos_ids:
            self._check_token("eos_ids", token)
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}.")

    def _check_token(self, name: str, token: Any) -> None:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.vocab_size:
            raise ConfigError(f"{name}: {token!r} is not a token id in 0..{self.vocab_size - 1}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config whose fields `values` holds: a dict, or the `model` part of an ml_collections config.

        `rope_scaling` may be a nested mapping, `eos_ids` a list. Raises ConfigError for a field that is unknown
        (naming the nearest), missing or invalid.
        """
        given = dict(values.items())
        _check_fields(cls, given, "the model config")
        scaling = given.get("rope_scaling")
        if hasattr(scaling, "items"):  # ConfigDict is not registered as a Mapping
            scaling = dict(scaling.items())
            _check_fields(RopeScaling, scaling, "rope_scaling")
            given["rope_scaling"] = RopeScaling(**scaling)
        if isinstance(given.get("eos_ids"), list):
            given["eos_ids"] = tuple(given["eos_ids"])
        return cls(**given)

    @classmethod
    def from_hf(cls, path: str | os.PathLike, dtype: str | None = None) -> Self:
        """The config of a Hugging Face checkpoint; see `hf_config.read_config`."""
        from .hf_config import read_config  # which imports this module

        return read_config(path, dtype)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def jnp_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


def check_matches(config: LlamaConfig, checkpoint_config: LlamaConfig) -> None:
    """Raises ConfigError, listing both values of each field, when `config` describes another model.

    The checkpoint's own config defines the model. All fields must be equal but eos_ids, of which one may be a part
    of the other: base and Instruct checkpoints of one model differ so, and the checkpoint's are the ones to use.
    """
    differences = []
    for field in dataclasses.fields(LlamaConfig):
        ours, theirs = getattr(config, field.name), getattr(checkpoint_config, field.name)
        if not _agree(field.name, ours, theirs):
            differences.append(f"{field.name}: the config says {ours!r}, the checkpoint {theirs!r}")
    if differences:
        raise ConfigError(
            f"the config is not that of the checkpoint. {'; '.join(differences)}. "
            "Use the config file of the checkpoint's model; --dtype chooses another type to run in."
        )


def _agree(field: str, ours: Any, theirs: Any) -> bool:
    if field == "eos_ids":
        return set(ours) <= set(theirs) or set(theirs) <= set(ours)
    return ours == theirs
