"""The sampler as a text: what it means, and that a mistake is shown where it is."""

import dataclasses

import pytest
from hypothesis import given, settings, strategies as st

from sharded_llama.errors import RequestError
from sharded_llama.sampling import SamplingParams
from sharded_llama.sampling.entropy_settings import EntropySettings
from sharded_llama.sampling.strings import MAX_CHARS, NAMES, parse_sampler


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("greedy", {"temperature": 0.0}),
        ("temperature(0.7) top_p(0.9) min_p(0.05)", {"temperature": 0.7, "top_p": 0.9, "min_p": 0.05}),
        ("top_k(40)", {"top_k": 40}),
        ("top_k(-1)", {"top_k": -1}),
        ("  temperature ( 1 )\n\ttop_k(4)\n", {"temperature": 1, "top_k": 4}),
        ("temperature(.5)top_p(1.)", {"temperature": 0.5, "top_p": 1.0}),
        ("temperature(1e-1) seed(7)", {"temperature": 0.1, "seed": 7}),
        ("greedy repetition_penalty(1.1)", {"temperature": 0.0, "repetition_penalty": 1.1}),
        ("presence_penalty(0.5) frequency_penalty(-2)", {"presence_penalty": 0.5, "frequency_penalty": -2}),
        ("min_tokens(500) greedy", {"min_tokens": 500, "temperature": 0.0}),  # max_tokens is not said here
        ("entropy", {"entropy": EntropySettings()}),
        ("entropy()", {"entropy": EntropySettings()}),
        (
            "entropy(temperature=0.7, high_entropy=4) seed(1)",
            {"entropy": EntropySettings(temperature=0.7, high_entropy=4), "seed": 1},
        ),
        (
            "entropy(low_entropy=4,medium_entropy=4.5,pause_token=none)",  # each alone would contradict the others
            {"entropy": EntropySettings(low_entropy=4, medium_entropy=4.5)},
        ),
        ("entropy(pause_token=12)", {"entropy": EntropySettings(pause_token=12)}),
    ],
)
def test_meaning(text, expected):
    parsed = parse_sampler(text)
    assert parsed == expected
    assert {name: type(value) for name, value in parsed.items()} == {n: type(v) for n, v in expected.items()}
    SamplingParams(max_tokens=1000, **parsed)


# What is wrong, the text, and under it a mark at the place.
MISTAKES = """
there is no setting 'temprature'; did you mean 'temperature'?
  top_k(4) temprature(0.7)
           ^^^^^^^^^^
there is no setting 'Greedy'; did you mean 'greedy'?
  Greedy
  ^^^^^^
there is no setting 'beam'; there are: greedy, entropy, temperature
  beam(4)
  ^^^^
temperature and greedy contradict each other; give one of them.
  greedy temperature(0.7)
         ^^^^^^^^^^^
greedy and top_k contradict each other; give one of them.
  top_k(4) greedy
           ^^^^^^
min_p and entropy contradict each other; give one of them.
  entropy(top_k=4) min_p(0.1)
                   ^^^^^
entropy and greedy contradict each other; give one of them.
  greedy entropy
         ^^^^^^^
top_p is given twice; give it once.
  top_p(0.9) top_p(0.9)
             ^^^^^
greedy is given twice; give it once.
  greedy greedy
         ^^^^^^
expected ')' at the end: write top_p(NUMBER).
  top_p(0.9
           ^
expected ')' in place of 'greedy': write top_p(NUMBER).
  top_p(0.9 greedy
            ^^^^^^
expected '(' in place of '0.9': write top_p(NUMBER).
  top_p 0.9
        ^^^
expected '(' in place of '=': write top_p(NUMBER).
  top_p=0.9
       ^
expected '(' at the end: write seed(NUMBER).
  seed
      ^
expected a number in place of ')': write seed(NUMBER).
  seed()
       ^
expected a number in place of 'many': write top_k(NUMBER).
  top_k(many)
        ^^^^
expected ')' in place of ',': write top_k(NUMBER).
  top_k(4, 5)
         ^
greedy stands alone, without a number.
  greedy(1)
        ^
expected the name of a setting in place of ')'; there are: greedy,
  greedy)
        ^
expected the name of a setting in place of '0.5'; there are: greedy,
  temperature(0.7) 0.5
                   ^^^
'$' has no meaning; a sampler has names, numbers, ( ) , and = alone.
  greedy $ seed(1)
         ^
top_p=2 must be a number above 0 and at most 1.
  seed(2) top_p(2)
          ^^^^^
top_k=1.5 must be a whole number
  top_k(1.5)
  ^^^^^
temperature=inf must be a number from 0
  temperature(1e999)
  ^^^^^^^^^^^
there is no setting of entropy 'hihg_entropy'; did you mean 'high_entropy'?
  entropy(hihg_entropy=4)
          ^^^^^^^^^^^^
temperature is given twice; give it once.
  entropy(temperature=1, temperature=2)
                         ^^^^^^^^^^^
expected '=' in place of '(': write entropy(NAME=NUMBER, ...), or entropy alone.
  entropy(temperature(1))
                     ^
expected the name of a setting of entropy in place of ')'; there are: temperature, top_p,
  entropy(temperature=1,)
                        ^
expected ')' at the end: write entropy(NAME=NUMBER, ...), or entropy alone.
  entropy(temperature=1
                       ^
temperature=-1 must be a number from 0
  entropy(pause_temperature=1, temperature=-1)
                               ^^^^^^^^^^^
low_entropy=4 must be at most medium_entropy=3
  entropy(high_entropy=9, low_entropy=4)
                          ^^^^^^^^^^^
medium_entropy=6 must be at most high_entropy=5
  entropy(medium_entropy=6)
          ^^^^^^^^^^^^^^
top_k=None must be a whole number
  entropy(top_k=none)
          ^^^^^
"""
LINES = MISTAKES.strip("\n").splitlines()


@pytest.mark.parametrize(("message", "text", "mark"), list(zip(*[iter(LINES)] * 3, strict=True)), ids=LINES[1::3])
def test_a_mistake_is_shown_where_it_is(message, text, mark):
    with pytest.raises(RequestError) as error:
        parse_sampler(text.removeprefix("  "))
    said, *shown = str(error.value).splitlines()
    assert message in said
    assert said.startswith("sampler: ")
    assert shown == [text, mark]


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_nothing(text):
    with pytest.raises(RequestError, match="it is empty; expected one or more of greedy, entropy, temperature"):
        parse_sampler(text)


def test_bounds():
    assert parse_sampler("greedy" + " " * (MAX_CHARS - 6)) == {"temperature": 0.0}
    for text in ("greedy" + " " * (MAX_CHARS - 5), None, 7):
        with pytest.raises(RequestError, match=f"expected a text of at most {MAX_CHARS} characters"):
            parse_sampler(text)
    with pytest.raises(RequestError, match="this number has more than 32 characters"):
        parse_sampler(f"seed({'9' * 33})")


def test_lines_and_strange_characters_keep_the_mark_in_place():
    with pytest.raises(RequestError) as error:
        parse_sampler("greedy\n\x1b[31m")
    assert str(error.value).splitlines()[1:] == ["  greedy  [31m", "         ^"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*NAMES, "(", ")", ",", "=", "0.5", "3", "-1", "none", " ", "x", "é"]), max_size=12))
def test_any_text_gives_parameters_or_an_error(words):
    text = "".join(words)
    try:
        parsed = parse_sampler(text)
    except RequestError as error:
        _, shown, mark = str(error).splitlines()
        assert shown == "  " + text
        assert 0 < mark.count("^") <= max(1, len(text))
        assert len(mark.rstrip("^")) <= 2 + len(text)
    else:
        assert set(parsed) <= {field.name for field in dataclasses.fields(SamplingParams)}
        SamplingParams(max_tokens=100, **parsed)
