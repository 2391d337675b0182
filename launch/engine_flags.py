"""The flags that size an engine, for every launcher that generates; the names are those of `EngineOptions`."""

from typing import Any

from absl import flags

from sharded_llama.errors import ConfigError
from sharded_llama.kv_cache import KV_DTYPES

DRAFT_MODEL = flags.DEFINE_string(
    "draft_model", None, "Checkpoint, as in --checkpoint, of a smaller model that guesses --num_speculative_tokens."
)
LOOKUP = (
    flags.DEFINE_integer("prompt_lookup_max", 4, "Most last tokens to look up where no draft model guesses.", 1),
    flags.DEFINE_integer("prompt_lookup_min", 2, "Fewest last tokens to look up.", 1),
)

FLAGS = (
    flags.DEFINE_integer(
        "max_model_len", None, "Longest prompt and answer together, in tokens. Default: the model's.", 1
    ),
    flags.DEFINE_integer("max_num_seqs", None, "Sequences that run at the same time. Default: by device.", 1),
    flags.DEFINE_integer("max_num_batched_tokens", None, "Tokens of one step. Default: by device.", 1),
    flags.DEFINE_bool("enable_prefix_caching", True, "Keep the cache of prompts' beginnings for later ones."),
    flags.DEFINE_enum("kv_cache_dtype", "auto", KV_DTYPES, "Type of the KV cache; auto: the model's."),
    flags.DEFINE_float(
        "memory_utilization", 0.9, "Share of an accelerator's memory for weights, cache and temporaries.", 0.0, 1.0
    ),
    flags.DEFINE_integer("kv_cache_bytes", None, "Bytes of the KV cache over the mesh. Default on CPU: 1 GiB.", 1),
    flags.DEFINE_integer("decode_steps", None, "Decode steps per dispatch where nothing waits. Default: by device.", 1),
    flags.DEFINE_bool("deterministic", False, "Bitwise the same answers whatever else runs; somewhat slower."),
    flags.DEFINE_integer(
        "num_speculative_tokens",
        None,
        "Guess this many tokens ahead and check them in one step: by --draft_model, else by what followed the last "
        "tokens before. The answers stay what they are.",
        1,
    ),
    *LOOKUP,
)


def engine_options() -> dict[str, Any]:
    """The options that the flags give. Raises ConfigError for flags of guesses where none are made."""
    speculates = next(flag for flag in FLAGS if flag.name == "num_speculative_tokens").value is not None
    for flag in (DRAFT_MODEL, *LOOKUP):
        if flag.present and not speculates:
            raise ConfigError(f"--{flag.name} belongs to guessed tokens: add --num_speculative_tokens=5, for one.")
    return {flag.name: flag.value for flag in FLAGS}
