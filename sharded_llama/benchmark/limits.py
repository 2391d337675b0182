"""What the devices' limits allow: bytes over the copy bandwidth, FLOPs over the matmul rate, all-reduces one by one.

Of a piece of work on one device, matmuls and attention each take at least the longer of their bytes and their FLOPs,
one after the other, and each all-reduce its latency:

    limit = max(matmul bytes / B, matmul FLOPs / F) + max(attention bytes / B, attention FLOPs / F) + reduces * latency

Matmul bytes are all weights but the embeddings, of which a step reads single rows; matmul FLOPs are two for each of
these weights and token, the output matrix only where a token is chosen. Attention reads the live keys and values once
and does 4 * heads * head_dim FLOPs for each pair of a token and one that it sees (two products, two FLOPs each).
Activations, norms, sampling and the bytes of large all-reduces are not counted: the limit is a lower bound.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

from ..config import LlamaConfig
from ..kv_cache import EIGHT_BIT, cache_dtype
from ..sharding import kv_head_layout, padded

BYTES, FLOPS = "bytes", "FLOPs"


class Ceilings(NamedTuple):
    """What one device does at best."""

    bytes_per_s: float  # read plus written
    flops_per_s: float
    all_reduce_s: float = 0.0  # of a small array over `model`


class ModelSize(NamedTuple):
    """One device's share of a model on `model` shards."""

    n_layers: int
    model: int
    layer_params: int  # in matmuls, of all layers
    output_params: int
    param_bytes: int  # of one parameter
    kv_bytes: int  # of one token in all layers
    pair_flops: int  # of attention of one token to one position, in all layers

    @classmethod
    def of(cls, config: LlamaConfig, model: int = 1, kv_dtype: str = "auto") -> Self:
        d, k = config.dim, config.head_dim
        n_kv, per_kv = kv_head_layout(config, model)
        attention = n_kv // model * (per_kv + 2) * k * d + d * config.n_heads // model * k
        layer = attention + 3 * d * padded(config.ffn_dim, model) // model
        stored = cache_dtype(config, kv_dtype)
        scale = 4 if stored.name in EIGHT_BIT else 0  # bytes, of each head of a key or value
        return cls(
            n_layers=config.n_layers,
            model=model,
            layer_params=config.n_layers * layer,
            output_params=padded(config.vocab_size, model) // model * d,
            param_bytes=config.jnp_dtype.itemsize,
            kv_bytes=config.n_layers * n_kv // model * 2 * (k * stored.itemsize + scale),
            pair_flops=config.n_layers * 4 * config.n_heads // model * k,
        )

    @property
    def matmul_bytes(self) -> int:
        return (self.layer_params + self.output_params) * self.param_bytes

    @property
    def reduces(self) -> int:
        """All-reduces of a step: two of a layer, one of the embeddings."""
        return 2 * self.n_layers + 1 if self.model > 1 else 0


class Work(NamedTuple):
    """What one device has to do."""

    matmul_bytes: float
    matmul_flops: float
    attention_bytes: float
    attention_flops: float
    reduces: float = 0.0


class Limit(NamedTuple):
    """The least seconds of a Work, and what bounds its parts."""

    seconds: float
    matmul_s: float
    attention_s: float
    reduce_s: float
    matmul_bound: str  # BYTES or FLOPS
    attention_bound: str
    work: Work

    def arithmetic(self, ceilings: Ceilings) -> str:
        """The sum in words, for people to check."""
        w = self.work
        parts = [
            f"matmuls {_number(w.matmul_bytes)}B, {_number(w.matmul_flops)}FLOP: {1e3 * self.matmul_s:.4g} ms by "
            f"{self.matmul_bound}",
            f"attention {_number(w.attention_bytes)}B, {_number(w.attention_flops)}FLOP: "
            f"{1e3 * self.attention_s:.4g} ms by {self.attention_bound}",
        ]
        if w.reduces:
            parts.append(f"{w.reduces:.0f} all-reduces of {1e6 * ceilings.all_reduce_s:.3g} us")
        return "; ".join(parts)


def limit_of(work: Work, ceilings: Ceilings) -> Limit:
    """The formula of this module."""
    matmul = work.matmul_bytes / ceilings.bytes_per_s, work.matmul_flops / ceilings.flops_per_s
    attention = work.attention_bytes / ceilings.bytes_per_s, work.attention_flops / ceilings.flops_per_s
    reduce_s = work.reduces * ceilings.all_reduce_s
    return Limit(
        max(matmul) + max(attention) + reduce_s,
        max(matmul),
        max(attention),
        reduce_s,
        FLOPS if matmul[1] > matmul[0] else BYTES,
        FLOPS if attention[1] > attention[0] else BYTES,
        work,
    )


def decode_work(size: ModelSize, batch: float, context: float) -> Work:
    """One step in which `batch` sequences of this data shard, with `context` live positions each, get one token."""
    params = size.layer_params + size.output_params
    pairs = batch * context
    return Work(size.matmul_bytes, 2 * params * batch, pairs * size.kv_bytes, pairs * size.pair_flops, size.reduces)


def prefill_work(size: ModelSize, lengths: Sequence[int], *, steps: int = 1) -> Work:
    """Prompts of these lengths of one data shard, up to the first token of each, in `steps` steps."""
    tokens = sum(lengths)
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    flops = 2 * (size.layer_params * tokens + size.output_params * len(lengths))
    return Work(steps * size.matmul_bytes, flops, tokens * size.kv_bytes, pairs * size.pair_flops, steps * size.reduces)


class RunLimit(NamedTuple):
    """The least seconds of a whole run: its prompts, then its decode steps."""

    seconds: float
    prefill: Limit
    decode: Limit
    decode_steps: int

    def arithmetic(self, ceilings: Ceilings) -> str:
        return (
            f"prompts {self.prefill.seconds:.4g} s ({self.prefill.arithmetic(ceilings)}) + {self.decode_steps} decode "
            f"steps {self.decode.seconds:.4g} s ({self.decode.arithmetic(ceilings)})"
        )


def run_limit(
    size: ModelSize,
    lengths: Sequence[tuple[int, int]],
    ceilings: Ceilings,
    *,
    at_once: int,
    shards: int = 1,
    cached_tokens: int = 0,
    last_arrival_s: float = 0.0,
) -> RunLimit:
    """Requests of (prompt, answer) tokens, of which at most `at_once` run at the same time, over `shards` data shards.

    The steps are shared out evenly: as many tokens in each step as `at_once` allows and the longest answer needs. The
    first token of an answer comes with its prompt. `cached_tokens` of the prompts are not computed. A run cannot end
    before its last request comes. Work is shared out over the shards perfectly. What a step could save that does both,
    a prompt's arithmetic while it reads the weights for decoding, is not taken off.
    """
    tokens = sum(n_in for n_in, _ in lengths)
    share = 1 - cached_tokens / tokens
    prompts = prefill_work(size, [n_in for n_in, _ in lengths])
    prompts = prompts._replace(
        matmul_flops=share * prompts.matmul_flops / shards,
        attention_bytes=share * prompts.attention_bytes / shards,
        attention_flops=share * prompts.attention_flops / shards,
    )
    new = sum(n_out - 1 for _, n_out in lengths)
    steps = max(-(-new // at_once), max(n_out - 1 for _, n_out in lengths))
    # Token i of an answer (from 1) sees the prompt and i tokens.
    pairs = sum((n_out - 1) * n_in + (n_out - 1) * n_out // 2 for n_in, n_out in lengths) / shards
    params = size.layer_params + size.output_params
    decoding = Work(
        steps * size.matmul_bytes,
        2 * params * new / shards,
        pairs * size.kv_bytes,
        pairs * size.pair_flops,
        steps * size.reduces,
    )
    prefill, decode = limit_of(prompts, ceilings), limit_of(decoding, ceilings)
    return RunLimit(max(prefill.seconds + decode.seconds, last_arrival_s), prefill, decode, steps)


def _number(value: float) -> str:
    """Three digits and a prefix: 15.0 G."""
    for exponent, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**exponent:
            return f"{value / 10**exponent:.3g} {prefix}"
    return f"{value:.3g} "
