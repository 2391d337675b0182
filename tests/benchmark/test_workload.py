"""Workloads: what flags say, when requests come, and the statistics of what came out."""

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from sharded_llama.benchmark.serving import Served, result_of
from sharded_llama.benchmark.statistics import median, summarise
from sharded_llama.benchmark.workload import (
    Lengths,
    Request,
    Rows,
    check_rate,
    fixed,
    parse_lengths,
    parse_rows,
    parse_sizes,
    poisson,
)
from sharded_llama.engine.engine import EngineStats, StepSeconds
from sharded_llama.errors import ConfigError, EngineError


def test_lengths_and_rows():
    assert parse_lengths("256x1000x200") == Lengths(256, 1000, 200)
    assert str(Lengths(256, 1000, 200)) == "256x1000x200"
    assert parse_rows("8x2048") == Rows(8, 2048)
    assert parse_sizes(["1", "64"], "--batches") == [1, 64]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("256x1000", "'256x1000' is not NxINxOUT"),
        ("1x2x3x4", "is not NxINxOUT"),
        ("-1x2x3", "is not NxINxOUT"),
        ("1x²x3", "is not NxINxOUT"),
        ("0x2x3", "0 must be from 1"),
        ("1x99999999x3", "99999999 must be from 1 to 16777216"),
        ("2000000x1x1", "at most 1000000 requests"),
        ("1000000x16000x1", "at most 1000000 requests and 67108864 tokens"),
        ("9" * 5000, "is not NxINxOUT"),
    ],
)
def test_lengths_that_are_none(text, message):
    with pytest.raises(ConfigError, match=message) as raised:
        parse_lengths(text)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("texts", [[], ["0"], ["-1"], ["1.5"], [""], ["1"] * 65, ["9" * 100]])
def test_sizes_that_are_none(texts):
    with pytest.raises(ConfigError, match=r"--batches"):
        parse_sizes(texts, "--batches")


def test_prompts_are_of_the_vocabulary_and_differ():
    requests = fixed(Lengths(50, 20, 3), 100, np.random.default_rng(0))
    assert {len(r.prompt) for r in requests} == {20}
    assert {token for r in requests for token in r.prompt} == set(range(100))
    assert len({tuple(r.prompt) for r in requests}) == 50
    assert {(r.n_out, r.arrival_s) for r in requests} == {(3, 0.0)}


def test_poisson_arrivals():
    requests = [Request([1], 1)] * 20_000
    arrivals = np.array([r.arrival_s for r in poisson(requests, 8.0, np.random.default_rng(1))])
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0
    assert (gaps > 0).all()
    # Mean and standard deviation of exponential gaps are both 1/8; the bounds are 4 standard errors.
    assert gaps.mean() == pytest.approx(1 / 8, rel=4 / math.sqrt(20_000))
    assert gaps.std() == pytest.approx(1 / 8, rel=0.05)
    assert (gaps > 1 / 8).mean() == pytest.approx(math.exp(-1), abs=0.015)
    again = poisson(requests, 8.0, np.random.default_rng(1))
    assert [r.arrival_s for r in again] == arrivals.tolist()
    assert poisson(requests, 8.0, np.random.default_rng(2))[-1].arrival_s != arrivals[-1]


def test_an_infinite_rate_is_all_at_once():
    late = [Request([1], 1, 5.0)]
    assert poisson(late, math.inf, np.random.default_rng(0)) == [Request([1], 1, 0.0)]


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, -math.inf, 1e9, 1e-9])
def test_rates_that_are_none(rate):
    with pytest.raises(ConfigError, match="--request_rate"):
        check_rate(rate)


def test_percentiles():
    summary = summarise([4.0, 1.0, 3.0, 2.0, 5.0])
    assert summary == (3.0, 3.0, pytest.approx(4.6), pytest.approx(4.8), pytest.approx(4.96))
    assert summarise([7.0]) == (7.0,) * 5
    assert summarise([]) is None
    assert median([3, 1, 2]) == 2
    with pytest.raises(EngineError, match="nothing was measured"):
        median([])


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles_grow_and_lie_between(values):
    _, *percentiles = summarise(values)
    assert percentiles == sorted(percentiles)
    assert min(values) <= percentiles[0]
    assert percentiles[-1] <= max(values)


def stats(cached, preemptions):
    class Counts:
        cached_tokens = cached

    Counts.preemptions = preemptions
    return EngineStats(Counts, StepSeconds(), 0)


def test_what_users_ask_of_a_run():
    first = Served(sent=1.0, arrivals=[(1.5, 1), (2.0, 2), (3.0, 1)], n_in=10, n_out=4)
    second = Served(sent=2.0, arrivals=[(2.25, 1)], n_in=6, n_out=1)
    result = result_of([first, second], stats(5, 1), stats(9, 3))
    assert (result.seconds, result.requests, result.input_tokens, result.output_tokens) == (3.0, 2, 16, 5)
    assert (result.cached_tokens, result.preemptions) == (4, 2)
    assert result.ttft.mean == pytest.approx(0.375)
    assert result.tpot == (0.5,) * 5, "1.5 s for the 3 tokens after the first; an answer of one token has none"
    assert result.itl.mean == pytest.approx(0.75), "gaps of 0.5 and 1.0 s between deliveries"
    assert result.e2e.mean == pytest.approx((2.0 + 0.25) / 2)
