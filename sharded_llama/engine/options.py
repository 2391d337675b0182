"""How an engine is sized: what a user may set, and what follows for a model on a mesh."""

import dataclasses
import operator
from collections.abc import Iterable
from typing import Any

from jax.sharding import Mesh

from ..config import LlamaConfig
from ..errors import ConfigError
from ..kv_cache import PAGE_SIZE, cache_dtype
from ..sampling import Mode
from ..sharding import DATA
from .steps import StepShape

BLOCK, GPU_BLOCK = 16, 32  # tokens in a row of a prompt's chunk
FEW_BLOCKS = 4  # of which a step of prompts has room at least, if the largest has
FEW_ENDS = 64  # answers and ends of prompts in a step beside few answers
FEW_SLOTS = 16  # answers beside which a step of prompts does without rows for all
# Defaults per data shard: on accelerators a decode step of 256 rows costs little more than one of 64; on CPUs every row
# costs, and compiling for many shapes would take longer than the answers.
ACCELERATOR = {"max_num_seqs": 256, "max_num_batched_tokens": 2048}
CPU = {"max_num_seqs": 16, "max_num_batched_tokens": 512}
LIMITS = {
    "max_num_seqs": 65_536,
    "max_num_batched_tokens": 1 << 20,
    "decode_steps": 64,
    "num_pages": 1 << 30,
    "num_speculative_tokens": 32,
    "prompt_lookup_max": 32,
    "prompt_lookup_min": 32,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What a user may set of an engine; the names are vLLM's where it has them.

    Raises ConfigError, naming the option, for values out of bounds.
    """

    max_model_len: int | None = None  # longest prompt and answer together; default: the model's, or what memory holds
    max_num_seqs: int | None = None  # sequences that run at the same time; a multiple of data
    max_num_batched_tokens: int | None = None  # tokens of one step at most, over all data shards; without padding
    enable_prefix_caching: bool = True
    kv_cache_dtype: str = "auto"  # auto: the model's type
    memory_utilization: float = 0.9  # share of an accelerator's memory for weights, cache and temporaries
    kv_cache_bytes: int | None = None  # of the cache over the whole mesh; default on CPU: 1 GiB
    num_pages: int | None = None  # pages of each data shard, in place of what memory allows
    deterministic: bool = False  # bitwise the same answers in any company
    decode_steps: int | None = None  # decode steps of one dispatch where nothing waits
    seed: int | None = None  # of requests that have none; default: a fresh one
    num_speculative_tokens: int | None = None  # guesses at a time, checked in one step; default: no speculation
    prompt_lookup_max: int = 4  # last tokens that are looked up in the sequence, where no draft model guesses
    prompt_lookup_min: int = 2
    entropy_sampler: bool = False  # take requests with SamplingParams.entropy; their steps are programs of their own

    def __post_init__(self) -> None:
        sizes = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_bytes", "num_pages")
        counts = ("decode_steps", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min")
        for name in (*sizes, *counts):
            self._check_count(name)
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ConfigError(
                f"prompt_lookup_min={self.prompt_lookup_min} must be at most "
                f"prompt_lookup_max={self.prompt_lookup_max}."
            )
        if self.num_speculative_tokens and self.entropy_sampler:
            raise ConfigError("entropy_sampler does not go with num_speculative_tokens: leave one of them out.")
        utilization = self.memory_utilization
        if isinstance(utilization, bool) or not isinstance(utilization, int | float) or not 0 < utilization <= 1:
            raise ConfigError(f"memory_utilization={utilization!r} must be a number above 0 and at most 1.")
        for name in ("enable_prefix_caching", "deterministic", "entropy_sampler"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be True or False.")
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool)):
            raise ConfigError(f"seed={self.seed!r} must be a whole number.")

    def _check_count(self, name: str) -> None:
        value, limit = getattr(self, name), LIMITS.get(name, 1 << 62)
        if value is None:
            return
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise ConfigError(f"{name}={value!r} must be a whole number from 1 to {limit}.")

    @classmethod
    def make(cls, **given: Any) -> "EngineOptions":
        """Raises ConfigError for an option that there is not."""
        names = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ConfigError(f"unknown engine option {unknown[0]!r}; there are: {', '.join(names)}.")
        return cls(**given)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The static sizes of an engine, each per data shard."""

    slots: int  # sequences that run at the same time
    max_tokens: int  # tokens of one step
    block: int  # tokens of a chunk's row
    max_blocks: int  # chunk rows of one step
    decode_steps: int
    run_length: int  # where all rows have one token: consecutive ones that attention takes together
    shapes: tuple[StepShape, ...]  # of every step that is ever run, those that only decode first
    # Numbers of rows of one token that have a shape of max_tokens each, together with chunks; () where there are none.
    beside_chunks: tuple[int, ...] = ()

    def shape_for(self, n_single: int, n_blocks: int, n_logits: int = 0) -> StepShape:
        """The smallest shape with room for these rows, and for those that are chosen from: all single ones at least.

        Without chunks it is one without them: several steps at once are only compiled for these.
        """
        wanted = (n_single, n_blocks, max(n_single, n_logits))
        fitting = (s for s in self.shapes if all(map(operator.ge, (s.n_single, s.n_blocks, s.n_logits), wanted)))
        return min((s for s in fitting if n_blocks or not s.n_blocks), key=lambda s: s.n_tokens)


def block_of(mesh: Mesh) -> int:
    """Tokens in a row of a prompt's chunk. They share what attention loads; the last row of a prompt wastes some."""
    return GPU_BLOCK if mesh.devices.flat[0].platform == "gpu" else BLOCK


def sizes_of(options: EngineOptions, mesh: Mesh, run_length: int = 1) -> Sizes:
    """What the options mean on a mesh. Raises ConfigError when they contradict one another.

    run_length: what the attention kernel takes at no extra cost, see `attention.run_length`.
    """
    data = mesh.shape[DATA]
    on_cpu, block = mesh.devices.flat[0].platform == "cpu", block_of(mesh)
    defaults = CPU if on_cpu else ACCELERATOR
    slots = -(-(options.max_num_seqs or data * defaults["max_num_seqs"]) // data)
    given = options.max_num_batched_tokens
    per_shard = None if given is None else -(-given // data)
    if options.deterministic:
        # One shape for everything: each token is a row of its own, and a step has as many as sequences may run.
        if options.decode_steps not in (None, 1):
            raise ConfigError("deterministic=True runs one step at a time: leave decode_steps out.")
        max_tokens = max(slots, block) if per_shard is None else per_shard
        if max_tokens < slots:
            raise ConfigError(_too_few(given, slots * data, slots * data))
        return Sizes(slots, max_tokens, 1, max_tokens, 1, run_length, (StepShape(max_tokens, 0, 1),))
    if per_shard is not None and per_shard < slots + block:
        raise ConfigError(_too_few(given, slots * data, (slots + block) * data))
    sizes = _sizes_on_cpu if on_cpu else _sizes_on_accelerator
    return sizes(slots, block, per_shard, options.decode_steps)


def _sizes_on_cpu(slots: int, block: int, max_tokens: int | None, decode_steps: int | None) -> Sizes:
    """What is computed for nothing costs more here, and another executable less: steps of prompts of four sizes."""
    chunks = max(slots + block, CPU["max_num_batched_tokens"]) if max_tokens is None else max_tokens - slots
    most = chunks // block
    blocks = {most, *(most // part for part in (8, 4, 2) if most >= FEW_BLOCKS * part)}
    beside = (0, min(slots, FEW_SLOTS), slots)  # 0: prompts that come while nothing decodes
    shapes = _shapes(slots, block, {1, slots}, {(n, m) for n in beside for m in blocks})
    return Sizes(slots, slots + most * block, block, most, decode_steps or 4, 1, shapes)


def _sizes_on_accelerator(slots: int, block: int, max_tokens: int | None, decode_steps: int | None) -> Sizes:
    """Products of 2048 rows take less time for each than those of 2304: more rows of one token leave fewer chunks."""
    max_tokens = max_tokens or max(2 * slots + block, ACCELERATOR["max_num_batched_tokens"])
    most, few = max_tokens // block, min(slots, FEW_SLOTS)
    beside = tuple(sorted({0, few, max(few, slots // 2), slots}))
    mixed = {(n, (max_tokens - n) // block) for n in beside}
    mixed.add((slots, most))  # for chunks that turn out to be rows of one token, beyond what was planned with
    mixed |= {(n, most // part) for n in (0, few, slots) for part in (8, 4, 2) if most >= FEW_BLOCKS * part}
    decoding = {1, slots, *(2**i for i in (3, *range(5, 20)) if 2**i < slots)}
    shapes = _shapes(slots, block, decoding, mixed)
    return Sizes(slots, max_tokens, block, most, decode_steps or 1, 1, shapes, beside)


def _shapes(slots: int, block: int, singles: Iterable[int], mixed: Iterable[tuple[int, int]]) -> tuple[StepShape, ...]:
    """Steps of rows of one token alone, and of pairs: beside so many blocks.

    What follows is chosen for as many rows as in a step of the former kind, so that it is by the same executable: few
    prompts end in one step, and no more rows than there are slots have an answer.
    """
    few = min(slots, FEW_ENDS)
    with_chunks = (StepShape(n, m, block, few if n < few else slots) for n, m in sorted(mixed))
    return (*(StepShape(n, 0, 1) for n in sorted({*singles, few})), *with_chunks)


def modes_of(options: EngineOptions) -> tuple[Mode, ...]:
    """The samplers that steps are compiled with."""
    return tuple(mode for mode in Mode if mode != Mode.ENTROPY or options.entropy_sampler)


def _too_few(given: int, seqs: int, least: int) -> str:
    return (
        f"max_num_batched_tokens={given} is too few for max_num_seqs={seqs}: every running sequence takes one token of "
        f"a step, and prompts need some more; give at least {least}, or fewer sequences."
    )


def check_options(options: EngineOptions, config: LlamaConfig, draft: LlamaConfig | None = None) -> None:
    """Raises ConfigError for what contradicts the model, or the one that guesses."""
    if draft is not None:
        if options.num_speculative_tokens is None:
            raise ConfigError("a draft model needs num_speculative_tokens, the guesses that it makes at a time.")
        if draft.vocab_size != config.vocab_size:
            raise ConfigError(
                f"the draft model has {draft.vocab_size} tokens and the model {config.vocab_size}: they must share one "
                "tokenizer."
            )
        if draft.max_seq_len < (options.max_model_len or config.max_seq_len):
            raise ConfigError(
                f"the draft model was made for {draft.max_seq_len} tokens: give max_model_len={draft.max_seq_len} or "
                "less."
            )
    cache_dtype(config, options.kv_cache_dtype)
    if options.max_model_len is not None and options.max_model_len > config.max_seq_len:
        raise ConfigError(
            f"max_model_len={options.max_model_len} is beyond the context of {config.max_seq_len} tokens that the "
            "model was made for."
        )
    if options.max_model_len is not None and options.max_model_len < 2:
        raise ConfigError("max_model_len=1 has no room for a prompt and an answer; give at least 2.")


def pages_per_sequence(max_model_len: int) -> int:
    return -(-max_model_len // PAGE_SIZE)
