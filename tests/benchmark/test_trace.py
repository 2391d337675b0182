"""Traces: what is read of them, and every way in which a line can be broken."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from sharded_llama.benchmark import trace as trace_module
from sharded_llama.benchmark.trace import TraceLine, read_trace, requests_of, tokens_beyond
from sharded_llama.errors import RequestError

REAL = Path(__file__).parents[2] / "../shared/data/traces/sharegpt-llama-3.1-8b-300-sps10.jsonl"
GOOD = {"input_toks": 3, "output_toks": 5, "arrival_time_ns": 1_500_000_000, "input_tok_ids": [7, 8, 2000]}


def write(folder, *lines):
    path = folder / "trace.jsonl"
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def test_lines(tmp_path):
    later = {"input_toks": 2, "output_toks": 1, "arrival_time_ns": 2.5e9, "more": [1]}
    trace = read_trace(write(tmp_path, GOOD, b"", later))
    assert trace.has_arrivals
    assert trace.lines == [TraceLine(1, 3, 5, 1.5, (7, 8, 2000)), TraceLine(3, 2, 1, 2.5, None)]
    assert read_trace(write(tmp_path, GOOD, b"broken"), limit=1).lines == trace.lines[:1]


def test_requests(tmp_path):
    without_ids = {"input_toks": 4, "output_toks": 1, "arrival_time_ns": 2_000_000_000}
    trace = read_trace(write(tmp_path, GOOD, without_ids))
    first, second = requests_of(trace, 1024, np.random.default_rng(0))
    assert (first.prompt, first.n_out, first.arrival_s) == ([7, 8, 2000 - 1024], 5, 0.0)
    assert (len(second.prompt), second.arrival_s) == (4, 0.5)
    assert all(0 <= i < 1024 for i in second.prompt)
    assert tokens_beyond(trace, 1024) == 1
    shifted, _ = requests_of(trace, 1024, np.random.default_rng(0), shift=1020)
    assert shifted.prompt == [3, 4, (2000 + 1020) % 1024]


def test_a_trace_without_times(tmp_path):
    line = {"input_toks": 4, "output_toks": 1}
    assert not read_trace(write(tmp_path, line, line)).has_arrivals
    with pytest.raises(RequestError, match="line 2: arrival_time_ns has to be in all lines, or in none"):
        read_trace(write(tmp_path, line, GOOD))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"input_toks": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"[1]", "expected a JSON object, found a list"),
        (b"null", "expected a JSON object"),
        (GOOD | {"input_toks": 0}, "input_toks must be a whole number from 1 to 16777216, not 0"),
        (GOOD | {"input_toks": -3}, "input_toks must be .* not -3"),
        (GOOD | {"input_toks": True}, "input_toks must be .* not True"),
        (GOOD | {"input_toks": "3"}, "input_toks must be .* not '3'"),
        (GOOD | {"output_toks": 2.0}, "output_toks must be .* not 2.0"),
        (GOOD | {"output_toks": None}, "output_toks must be"),
        (GOOD | {"output_toks": 10**12}, "output_toks must be .* not 1000000000000"),
        (GOOD | {"output_toks": [1]}, "output_toks must be .* not a list"),
        ({"input_toks": 1}, "lacks output_toks"),
        (GOOD | {"arrival_time_ns": -1}, "arrival_time_ns must be a finite number"),
        (GOOD | {"arrival_time_ns": float("nan")}, "arrival_time_ns must be a finite number"),
        (GOOD | {"arrival_time_ns": float("inf")}, "arrival_time_ns must be a finite number"),
        (GOOD | {"arrival_time_ns": 10**400}, "arrival_time_ns must be a finite number"),
        (GOOD | {"arrival_time_ns": "soon"}, "arrival_time_ns must be a finite number"),
        (GOOD | {"arrival_time_ns": 1}, "arrival_time_ns is before that of the request above it"),
        (GOOD | {"input_tok_ids": [1, 2]}, "input_toks is 3, but input_tok_ids has 2 ids"),
        (GOOD | {"input_tok_ids": [1, 2, -1]}, "has -1, which is no token id"),
        (GOOD | {"input_tok_ids": [1, 2, 2**31]}, "has 2147483648, which is no token id"),
        (GOOD | {"input_tok_ids": [1, 2, 3.0]}, "has 3.0, which is no token id"),
        (GOOD | {"input_tok_ids": [1, 2, None]}, "has None, which is no token id"),
        (GOOD | {"input_tok_ids": [1, 2, False]}, "has False, which is no token id"),
        (GOOD | {"input_tok_ids": "abc"}, "input_tok_ids must be a list"),
    ],
    ids=str,
)
def test_a_broken_line_is_named(line, message, tmp_path):
    with pytest.raises(RequestError, match=f"line 2: .*{message}") as raised:
        read_trace(write(tmp_path, GOOD, line))
    assert len(str(raised.value)) < 400 + len(str(tmp_path))


def test_files_that_are_no_traces(tmp_path):
    for path, message in (
        (tmp_path / "nothing", "there is no such file"),
        (tmp_path, "there is no such file"),
        (write(tmp_path, b""), "has no requests"),
    ):
        with pytest.raises(RequestError, match=message):
            read_trace(path)


def test_bounds(tmp_path, monkeypatch):
    line = {"input_toks": 4, "output_toks": 1}
    path = write(tmp_path, line, line, line)
    for name, value, message in (
        ("MAX_LINES", 2, "line 3: a trace has at most 2 lines"),
        ("MAX_LINE_BYTES", 20, "line 1: has more than 20 bytes"),
        ("MAX_TOKENS", 12, "line 3: with this request the trace has more than 12 tokens"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(trace_module, name, value)
            with pytest.raises(RequestError, match=message):
                read_trace(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.fixed_dictionaries({}, optional=dict.fromkeys(GOOD, JSON))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=40) | FIELDS, max_size=4))
def test_garbage_is_refused_or_read_with_all_bounds(tmp_path_factory, lines):
    path = write(tmp_path_factory.mktemp("trace"), *lines)
    trace = None
    with contextlib.suppress(RequestError):
        trace = read_trace(path)
    for line in [] if trace is None else trace.lines:
        assert line.n_in >= 1
        assert line.n_out >= 1
        assert line.arrival_s >= 0
        assert line.ids is None or len(line.ids) == line.n_in
    assert trace is None or trace.lines


@pytest.mark.skipif(not REAL.is_file(), reason="needs the real trace of ../shared/data/traces")
def test_the_real_trace():
    trace = read_trace(REAL)
    assert (len(trace.lines), trace.has_arrivals) == (300, True)
    assert sum(line.n_in for line in trace.lines) == 257_239
    assert tokens_beyond(trace, 128_256) == 0
    requests = requests_of(trace, 128_256, np.random.default_rng(0))
    assert [len(r.prompt) for r in requests] == [line.n_in for line in trace.lines]
    assert requests[0].prompt == list(trace.lines[0].ids)
    assert requests[-1].arrival_s == pytest.approx(29.183763203 - 0.046926808)
