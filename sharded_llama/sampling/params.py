"""What one request asks of the sampler, and the same for a whole batch as arrays."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import RequestError

MAX_N = 64  # answers to one prompt
MAX_LOGPROBS = 20  # most likely tokens whose probabilities a request can ask for


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen. Names and defaults are vLLM's.

    Filters apply in the order temperature, min_p, top_k, top_p, each to the renormalised result of the one before.
    Raises RequestError on values out of bounds.
    """

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # keep this many of the most likely tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of most likely tokens with at least this mass
    min_p: float = 0.0  # drop tokens less likely than this times the most likely one
    seed: int | None = None  # None: a fresh one for every request
    max_tokens: int = 16  # new tokens at most
    ignore_eos: bool = False
    n: int = 1  # answers to one prompt, each with a seed of its own
    logprobs: int | None = None  # log-probabilities of each token and of this many of the most likely ones

    def __post_init__(self) -> None:
        self._check("temperature", 0.0 <= self._number("temperature") <= 100.0, "a number from 0 (greedy) to 100")
        self._check("top_k", 0 <= self._integer("top_k") < 2**31, "a whole number: 0 (all tokens) or more")
        self._check("top_p", 0.0 < self._number("top_p") <= 1.0, "a number above 0 and at most 1")
        self._check("min_p", 0.0 <= self._number("min_p") <= 1.0, "a number from 0 to 1")
        self._check("max_tokens", 1 <= self._integer("max_tokens") < 2**31, "a whole number of at least 1")
        self._check("n", 1 <= self._integer("n") <= MAX_N, f"a whole number from 1 to {MAX_N}")
        if self.logprobs is not None:
            in_range = 0 <= self._integer("logprobs") <= MAX_LOGPROBS
            self._check("logprobs", in_range, f"None or a whole number from 0 to {MAX_LOGPROBS}")
        if self.seed is not None:
            self._check("seed", -(2**63) <= self._integer("seed") < 2**64, "a whole number of at most 64 bits")

    def _number(self, name: str) -> float:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        return float(value) if is_number and math.isfinite(value) else math.nan

    def _integer(self, name: str) -> float:
        value = getattr(self, name)
        return value if isinstance(value, (int, np.integer)) and not isinstance(value, bool) else math.nan

    def _check(self, name: str, ok: bool, right: str) -> None:
        if not ok:
            raise RequestError(f"{name}={getattr(self, name)!r} must be {right}.")

    @classmethod
    def make(cls, defaults: dict[str, Any], **given: Any) -> "SamplingParams":
        """Parameters from a checkpoint's `defaults`, with what the user gave (not None) in their place."""
        unknown = set(given) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            names = ", ".join(f.name for f in dataclasses.fields(cls))
            raise RequestError(f"unknown sampling parameter {sorted(unknown)[0]!r}; there are: {names}.")
        return cls(**{**defaults, **{k: v for k, v in given.items() if v is not None}})


class RowParams(NamedTuple):
    """SamplingParams of every row of a batch, as arrays."""

    temperature_B: Any  # float32
    top_k_B: Any  # int32
    top_p_B: Any  # float32
    min_p_B: Any  # float32
    seed_B2: Any  # uint32, high and low word


def pack_rows(params: Sequence[SamplingParams]) -> RowParams:
    """NumPy arrays of the rows' parameters. Every seed must have been chosen."""
    seeds = [int(p.seed) % 2**64 for p in params]
    return RowParams(
        temperature_B=np.array([p.temperature for p in params], np.float32),
        top_k_B=np.array([p.top_k for p in params], np.int32),
        top_p_B=np.array([p.top_p for p in params], np.float32),
        min_p_B=np.array([p.min_p for p in params], np.float32),
        seed_B2=np.array([(s >> 32, s & 0xFFFFFFFF) for s in seeds], np.uint32).reshape(-1, 2),
    )
