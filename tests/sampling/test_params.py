"""What one request can ask for: every bound, and what contradicts itself."""

import dataclasses

import numpy as np
import pytest

from sharded_llama.errors import RequestError
from sharded_llama.sampling import MAX_LOGPROBS, SamplingParams, pack_rows
from sharded_llama.sampling.entropy_settings import EntropySettings
from sharded_llama.sampling.structured import StructuredOutputs

NAN, INF = float("nan"), float("inf")

# Name: the values at the bounds, values beyond them or of other types, and what the message says would be right.
BOUNDS = {
    "n": ([1, 64, np.int64(3)], [0, 65, -1, 1.0, True, "2", None], "a whole number from 1 to 64"),
    "best_of": ([None, 1, 64], [0, 65, 2.0, True], "None or a whole number from 1 to 64"),
    "temperature": ([0, 0.0, 100.0, np.float32(0.5)], [-0.1, 100.1, NAN, INF, "1", True, None], "from 0 (greedy) to 1"),
    "top_k": ([-1, 0, 1, 2**31 - 1], [-2, 2**31, 1.5, True, "1", None], "a whole number: 0 or -1 (all tokens) or"),
    "top_p": ([1e-9, 1.0, 1], [0, 0.0, 1.01, -1, NAN, True, None], "a number above 0 and at most 1"),
    "min_p": ([0, 1.0], [-0.01, 1.01, NAN, True, "0", None], "a number from 0 to 1"),
    "presence_penalty": ([-2, 2.0], [-2.01, 2.01, NAN, None], "a number from -2 to 2"),
    "frequency_penalty": ([-2, 2.0], [-2.01, 2.01, INF, None], "a number from -2 to 2"),
    "repetition_penalty": ([0.01, 1, 100.0], [0, 0.009, 1e-40, -1, 100.1, NAN, None], "from 0.01 to 100"),
    "max_tokens": ([1, 2**31 - 1], [0, -1, 2**31, 1.0, True, None], "a whole number of at least 1"),
    "min_tokens": ([0, 16], [-1, 2**31, 0.5, True, None], "a whole number of at least 0"),
    "logprobs": ([None, 0, MAX_LOGPROBS], [-1, MAX_LOGPROBS + 1, 1.0, True], "None or a whole number from 0 to 20"),
    "prompt_logprobs": ([None, 0, 20], [-1, 21, "1", False], "None or a whole number from 0 to 20"),
    "seed": ([None, -(2**63), 2**64 - 1], [-(2**63) - 1, 2**64, 0.5, True], "a whole number of at most 64 bits"),
    "ignore_eos": ([True, False], [None, 1, "yes"], "True or False"),
    "include_stop_str_in_output": ([True, False], [None, 0], "True or False"),
    "skip_special_tokens": ([True, False], [None, "no"], "True or False"),
    "stop": (
        ["x", "x" * 1024, ["x"] * 32, (), None],
        ["", "x" * 1025, ["x"] * 33, ["a", ""], [1], 5, b"x", {"x": 1}],
        "at most 32 texts, each of 1 to 1024 characters",
    ),
    "bad_words": (
        [["x"] * 128, ("x" * 256,), []],
        [["x"] * 129, ["x" * 257], [""], "word", [None]],
        "at most 128 texts, each of 1 to 256 characters",
    ),
    "stop_token_ids": (
        [[], [0, 2**31 - 1], range(256)],
        [[-1], [2**31], range(257), [1.0], [True], 5, "5"],
        "a list of at most 256 token ids",
    ),
    "allowed_token_ids": ([None, [0], range(1000)], [[-1], [2**31], ["a"], 7, "7"], "token ids"),
    "logit_bias": (
        [None, {0: -100, 5: 100.0}, {i: 1 for i in range(300)}],
        [{0: 100.5}, {-1: 1}, {1.5: 1}, {"5": 1}, {1: NAN}, {1: True}, {i: 1 for i in range(301)}, [(1, 2)], 5],
        "a mapping of at most 300 token ids to numbers from -100 to 100",
    ),
    "structured_outputs": ([None, StructuredOutputs(choice=["a"])], [{}, "a", True], "None or StructuredOutputs(...)"),
    "entropy": ([None, EntropySettings()], [True, {}, "on"], "None or EntropySettings(...)"),
}


def cases(which):
    return [pytest.param(name, v, id=f"{name}={v!r:.30}") for name, found in BOUNDS.items() for v in found[which]]


def test_every_parameter_is_here():
    assert set(BOUNDS) == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(("name", "value"), cases(0))
def test_within_bounds(name, value):
    made = getattr(SamplingParams(**{name: value}), name)
    if name not in ("stop", "bad_words", "stop_token_ids", "allowed_token_ids"):  # lists: below
        assert made == value


@pytest.mark.parametrize(("name", "value"), cases(1))
def test_beyond_bounds(name, value):
    with pytest.raises(RequestError) as error:
        SamplingParams(**{name: value})
    message = str(error.value)
    assert message.startswith(f"{name}={value!r}"[:100])
    assert " must be " in message
    assert BOUNDS[name][2] in message


def test_a_long_value_is_cut_short_in_the_message():
    with pytest.raises(RequestError) as error:
        SamplingParams(stop="x" * 100_000)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_tokens": 17}, "min_tokens=17 must be at most max_tokens=16"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 must be at most max_tokens=4"),
        ({"allowed_token_ids": []}, "allowed_token_ids=.* must be None or a list of at least one token id"),
        ({"n": 3, "best_of": 2}, "best_of=2 must be None or a whole number from 3 to 64"),
    ],
    ids=str,
)
def test_contradictions(settings, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**settings)


def test_how_many_answers_are_made():
    assert SamplingParams().n_sequences == 1
    assert SamplingParams(n=3).n_sequences == 3
    assert SamplingParams(n=3, best_of=5).n_sequences == 5
    assert SamplingParams(n=3, best_of=3).n_sequences == 3


def test_lists_become_tuples():
    made = SamplingParams(
        stop="end",
        bad_words=["a", "b"],
        stop_token_ids=iter([5, np.int32(7), 5]),
        allowed_token_ids=[9, 8, 9],
        logit_bias={np.int64(3): 1},
    )
    assert made.stop == ("end",)
    assert made.bad_words == ("a", "b")
    assert made.stop_token_ids == (5, 7)
    assert made.allowed_token_ids == (9, 8)
    assert made.logit_bias == {3: 1.0}
    assert [type(i) for i in (*made.stop_token_ids, *made.logit_bias)] == [int, int, int]
    assert SamplingParams(stop=["end", "and"]).stop == ("end", "and")
    assert SamplingParams(stop=None).stop == SamplingParams(stop=[]).stop == ()
    assert SamplingParams(logit_bias={}).logit_bias is None
    assert dataclasses.replace(made, seed=1) == dataclasses.replace(made, seed=1), "a copy keeps them"


def test_negative_and_large_seeds():
    rows = pack_rows([SamplingParams(seed=s) for s in (-1, 2**64 - 1, 2**32 + 5)])
    np.testing.assert_array_equal(rows.seed_R2, [[2**32 - 1] * 2, [2**32 - 1] * 2, [1, 5]])


def test_given_values_take_the_place_of_defaults():
    made = SamplingParams.make({"temperature": 0.6, "top_p": 0.9}, top_p=0.5, top_k=None)
    assert (made.temperature, made.top_p, made.top_k) == (0.6, 0.5, 0)


def test_an_unknown_name():
    with pytest.raises(RequestError, match="unknown sampling parameter 'heat'; there are: n, best_of, temperature"):
        SamplingParams.make({}, heat=1)
