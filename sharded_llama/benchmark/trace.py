"""Traces of real requests: a JSON object on each line, checked before anything is run.

    {"input_toks": 3, "output_toks": 20, "arrival_time_ns": 46926808, "input_tok_ids": [5971, 2927, 220]}

`input_tok_ids` and `arrival_time_ns` may be missing; other fields are not looked at.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import RequestError
from .workload import MAX_TOKENS, Request, random_prompt

MAX_LINES = 100_000
MAX_LINE_BYTES = 16 << 20
MAX_LENGTH = 1 << 24  # tokens of a prompt or of an answer
MAX_TOKEN_ID = 2**31 - 1
MAX_SECONDS = 10 * 86_400.0  # of the last arrival


class TraceLine(NamedTuple):
    """One request of a trace."""

    number: int  # of the line, from 1
    n_in: int
    n_out: int
    arrival_s: float
    ids: tuple[int, ...] | None


class Trace(NamedTuple):
    """Requests in the order of the file."""

    lines: list[TraceLine]
    has_arrivals: bool


def read_trace(path: str | os.PathLike[str], limit: int | None = None) -> Trace:
    """Reads the requests of a trace, the first `limit` of them.

    Raises RequestError, naming the line and what is wrong with it, for a file that is not such a trace: lines that are
    too long or too many, that are not JSON objects, counts that are missing, of a wrong type, below 1 or beyond
    MAX_LENGTH, ids that do not agree with them, arrivals that decrease or are not finite.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise RequestError(f"--trace={path}: there is no such file.")
    lines: list[TraceLine] = []
    timed: list[bool] = []
    tokens, number = 0, 0
    try:
        with path.open("rb") as file:
            while limit is None or len(lines) < limit:
                raw = file.readline(MAX_LINE_BYTES + 1)
                number += 1
                if not raw:
                    break
                where = f"--trace={path}, line {number}"
                if len(raw) > MAX_LINE_BYTES:
                    raise RequestError(f"{where}: has more than {MAX_LINE_BYTES} bytes.")
                if number > MAX_LINES:
                    raise RequestError(f"{where}: a trace has at most {MAX_LINES} lines.")
                if not raw.strip():
                    continue
                line, has_arrival = _parse(raw, number, where)
                if lines and line.arrival_s < lines[-1].arrival_s:
                    raise RequestError(f"{where}: arrival_time_ns is before that of the request above it.")
                timed.append(has_arrival)
                if has_arrival != timed[0]:
                    raise RequestError(f"{where}: arrival_time_ns has to be in all lines, or in none.")
                tokens += line.n_in + line.n_out
                if tokens > MAX_TOKENS:
                    raise RequestError(f"{where}: with this request the trace has more than {MAX_TOKENS} tokens.")
                lines.append(line)
    except OSError as error:
        raise RequestError(f"--trace={path}: cannot be read: {error.strerror or error}.") from error
    if not lines:
        raise RequestError(f"--trace={path}: has no requests.")
    return Trace(lines, timed[0])


def requests_of(trace: Trace, vocab_size: int, rng: np.random.Generator, shift: int = 0) -> list[Request]:
    """The trace as requests for a model. The first arrives at 0.

    Prompts without ids are random. An id that the vocabulary does not have is taken modulo its size, so that prompts
    that begin alike still do. `shift` is added to every id, modulo the size: another run of the same trace, which finds
    nothing of this one in the prefix cache.
    """
    start = trace.lines[0].arrival_s
    requests = []
    for line in trace.lines:
        if line.ids is None:
            prompt = random_prompt(vocab_size, line.n_in, rng)
        else:
            prompt = ((np.asarray(line.ids, np.int64) + shift) % vocab_size).tolist()
        requests.append(Request(prompt, line.n_out, line.arrival_s - start))
    return requests


def tokens_beyond(trace: Trace, vocab_size: int) -> int:
    """How many ids of the trace the vocabulary does not have."""
    return sum(int((np.asarray(line.ids) >= vocab_size).sum()) for line in trace.lines if line.ids is not None)


def _parse(raw: bytes, number: int, where: str) -> tuple[TraceLine, bool]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number without end, nested without end
        raise RequestError(f"{where}: is not JSON: {str(error)[:100]}.") from error
    if not isinstance(value, dict):
        raise RequestError(f"{where}: expected a JSON object, found a {type(value).__name__}.")
    n_in, n_out = _count(value, "input_toks", where), _count(value, "output_toks", where)
    arrival = value.get("arrival_time_ns")
    return TraceLine(number, n_in, n_out, _seconds(arrival, where), _ids(value, n_in, where)), arrival is not None


def _count(value: dict[str, Any], name: str, where: str) -> int:
    if name not in value:
        raise RequestError(f"{where}: lacks {name}, a number of tokens.")
    count = value[name]
    if not _is_whole(count) or not 1 <= count <= MAX_LENGTH:
        raise RequestError(f"{where}: {name} must be a whole number from 1 to {MAX_LENGTH}, not {_short(count)}.")
    return count


def _seconds(arrival: Any, where: str) -> float:
    if arrival is None:
        return 0.0
    is_number = isinstance(arrival, int | float) and not isinstance(arrival, bool)
    if not is_number or not 0 <= arrival <= 1e9 * MAX_SECONDS or not math.isfinite(arrival):
        raise RequestError(
            f"{where}: arrival_time_ns must be a finite number of nanoseconds from 0 to {1e9 * MAX_SECONDS:g}, not "
            f"{_short(arrival)}."
        )
    return arrival / 1e9


def _ids(value: dict[str, Any], n_in: int, where: str) -> tuple[int, ...] | None:
    ids = value.get("input_tok_ids")
    if ids is None:
        return None
    if not isinstance(ids, list):
        raise RequestError(f"{where}: input_tok_ids must be a list of token ids, not {_short(ids)}.")
    if len(ids) != n_in:
        raise RequestError(f"{where}: input_toks is {n_in}, but input_tok_ids has {len(ids)} ids.")
    bad = [i for i in ids if not _is_whole(i) or not 0 <= i <= MAX_TOKEN_ID]
    if bad:
        raise RequestError(f"{where}: input_tok_ids has {_short(bad[0])}, which is no token id.")
    return tuple(ids)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"a {type(value).__name__}"
    try:
        text = repr(value)
    except ValueError:  # more digits than Python writes
        return "a huge number"
    return text if len(text) <= 40 else text[:40] + "..."
