"""What is asked of the engine: requests of fixed lengths, and when they come."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError

LARGEST = 1 << 24  # of any size that a flag gives
MAX_ITEMS = 64  # of any list that a flag gives
MAX_REQUESTS = 1_000_000
MAX_TOKENS = 1 << 26  # of all prompts and answers of a run: some 2.5 GB as Python's numbers
MAX_RATE = 1e6  # requests per second


class Request(NamedTuple):
    """One request of a run."""

    prompt: list[int]  # token ids
    n_out: int  # tokens to generate, exactly
    arrival_s: float = 0.0  # after the start of the run


class Lengths(NamedTuple):
    """Requests of fixed lengths, in tokens."""

    n: int
    n_in: int
    n_out: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


class Rows(NamedTuple):
    """Prompts of one length that are computed together."""

    rows: int
    tokens: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


def bounded(size: int, what: str) -> int:
    if not 1 <= size <= LARGEST:
        raise ConfigError(f"{what}: {size} must be from 1 to {LARGEST}.")
    return size


def parse_lengths(text: str, flag: str = "--requests") -> Lengths:
    """NxINxOUT, such as 256x1000x1000. Raises ConfigError for anything else."""
    lengths = Lengths(*_parse_product(text, 3, flag, "NxINxOUT, such as 256x1000x200"))
    if lengths.n > MAX_REQUESTS or lengths.n * (lengths.n_in + lengths.n_out) > MAX_TOKENS:
        raise ConfigError(f"{flag}={text}: at most {MAX_REQUESTS} requests and {MAX_TOKENS} tokens make a run.")
    return lengths


def parse_rows(text: str, flag: str = "--prefill") -> Rows:
    """ROWSxTOKENS, such as 8x2048. Raises ConfigError for anything else."""
    rows = Rows(*_parse_product(text, 2, flag, "ROWSxTOKENS, such as 8x2048"))
    if rows.rows * rows.tokens > MAX_TOKENS:
        raise ConfigError(f"{flag}={text}: at most {MAX_TOKENS} tokens are measured at a time.")
    return rows


def parse_sizes(texts: Sequence[str], flag: str) -> list[int]:
    """A list of whole numbers above 0. Raises ConfigError for anything else."""
    if not 1 <= len(texts) <= MAX_ITEMS:
        raise ConfigError(f"{flag}: give from 1 to {MAX_ITEMS} numbers, separated by commas.")
    if not all(_is_size(text) for text in texts):
        raise ConfigError(f"{flag}={','.join(texts)[:80]}: expected whole numbers above 0, such as 64,256.")
    return [int(text) for text in texts]


def fixed(lengths: Lengths, vocab_size: int, rng: np.random.Generator) -> list[Request]:
    """Requests of random prompts, no two alike, that all come at the start."""
    return [Request(random_prompt(vocab_size, lengths.n_in, rng), lengths.n_out) for _ in range(lengths.n)]


def random_prompt(vocab_size: int, length: int, rng: np.random.Generator) -> list[int]:
    return rng.integers(0, vocab_size, int(length)).tolist()


def poisson(requests: Sequence[Request], rate: float, rng: np.random.Generator) -> list[Request]:
    """The requests with arrivals at `rate` per second: the first at 0, exponentially distributed gaps after it.

    An infinite rate has them all come at the start.
    """
    if math.isinf(rate):
        return [r._replace(arrival_s=0.0) for r in requests]
    gaps = rng.exponential(1 / rate, len(requests))
    arrivals = np.cumsum(gaps) - gaps[:1].sum()
    return [r._replace(arrival_s=float(at)) for r, at in zip(requests, arrivals, strict=True)]


def check_rate(rate: float, flag: str = "--request_rate") -> None:
    """Raises ConfigError for a number of requests per second that cannot be."""
    if not (math.isinf(rate) and rate > 0) and not 1 / MAX_RATE <= rate <= MAX_RATE:
        raise ConfigError(f"{flag}={rate:g} must be from {1 / MAX_RATE:g} to {MAX_RATE:g} per second, or inf.")


def _parse_product(text: str, n: int, flag: str, form: str) -> list[int]:
    parts = text.split("x")
    if len(parts) != n or not all(part.isascii() and part.isdigit() and len(part) < 9 for part in parts):
        raise ConfigError(f"{flag}: {text[:80]!r} is not {form}.")
    return [bounded(int(part), f"{flag}={text}") for part in parts]


def _is_size(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 9 and int(text) > 0
