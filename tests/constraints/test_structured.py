"""StructuredOutputs: exactly one form, within bounds."""

from typing import Any

import pytest

from sharded_llama.errors import RequestError
from sharded_llama.sampling.structured import (
    MAX_CHOICE_CHARS,
    MAX_CHOICES,
    MAX_GRAMMAR_CHARS,
    MAX_REGEX_CHARS,
    MAX_SCHEMA_BYTES,
    MAX_SCHEMA_DEPTH,
    StructuredOutputs,
)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def circular() -> dict[str, Any]:
    schema: dict[str, Any] = {}
    schema["items"] = schema
    return schema


def test_schemas_are_kept_as_compact_text_in_their_order():
    schema = {"type": "object", "properties": {"b": True, "a": {"const": "é"}}}
    text = '{"type":"object","properties":{"b":true,"a":{"const":"\\u00e9"}}}'
    given = [schema, text, ' {"type": "object",\n"properties": {"b": true, "a": {"const": "é"}}}']
    made = [StructuredOutputs(json=g) for g in given]
    assert [m.json for m in made] == [text] * 3
    assert len(set(made)) == 1
    assert made[0].form == "json"
    assert StructuredOutputs(json=True).json == "{}"


def test_the_form():
    assert StructuredOutputs(json_object=True).form == "json_object"
    assert StructuredOutputs(regex="a").form == "regex"
    assert StructuredOutputs(grammar="start: A").form == "grammar"
    choice = StructuredOutputs(choice=["b", "a", "b"])
    assert (choice.form, choice.choice) == ("choice", ("b", "a"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of json, json_object, regex, choice, grammar, but none is given"),
        ({"regex": "a", "choice": ["a"]}, "regex and choice is given"),
        ({"json": {}, "json_object": True}, "json and json_object is given"),
        ({"json": False}, "permits no answer"),
        ({"json_object": 1}, "json_object=1 must be True or False"),
        ({"json": "false"}, "must be a JSON schema"),
        ({"json": "[]"}, "must be a JSON schema"),
        ({"json": 3}, "must be a JSON schema"),
        ({"json": '{"a":'}, "is not valid JSON"),
        ({"json": {"const": float("inf")}}, "is not valid JSON"),
        ({"json": '{"const": 1e999}'}, "is not valid JSON"),
        ({"json": {"const": {1, 2}}}, "is not valid JSON"),
        ({"json": circular()}, "is not valid JSON"),
        ({"json": "[" * 100_000}, "is not valid JSON"),
        ({"json": nested(MAX_SCHEMA_DEPTH + 1)}, "nested at most 64 deep"),
        ({"json": nested(100_000)}, "is not valid JSON"),
        ({"json": {"const": "x" * MAX_SCHEMA_BYTES}}, "at most 262144 bytes"),
        ({"json": " " * (MAX_SCHEMA_BYTES + 1)}, "at most 262144 bytes"),
        ({"regex": ""}, "a text of 1 to 8192 characters"),
        ({"regex": b"a"}, "a text of 1 to"),
        ({"regex": "a" * (MAX_REGEX_CHARS + 1)}, "a text of 1 to"),
        ({"regex": "\ud800"}, "UTF-8"),
        ({"grammar": "a" * (MAX_GRAMMAR_CHARS + 1)}, "a text of 1 to 65536"),
        ({"choice": []}, "a list of 1 to 4096 texts"),
        ({"choice": "abc"}, "a list of"),
        ({"choice": ["a", ""]}, "a list of"),
        ({"choice": ["a", 1]}, "a list of"),
        ({"choice": ["a\udfff"]}, "a list of"),
        ({"choice": ["x" * (MAX_CHOICE_CHARS + 1)]}, "a list of"),
        ({"choice": [str(i) for i in range(MAX_CHOICES + 1)]}, "a list of"),
        ({"choice": [f"{i:040d}" for i in range(2000)]}, "65536 in all"),
        ({"regex": "a", "disable_any_whitespace": True}, "only for json"),
        ({"json": {}, "disable_any_whitespace": "yes"}, "must be True or False"),
        ({"json": {}, "whitespace_pattern": "x*"}, "white space of JSON"),
        ({"json": {}, "whitespace_pattern": "[ ?]*"}, "white space of JSON"),
        ({"json": {}, "whitespace_pattern": r"\s*"}, "white space of JSON"),
        ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "without disable_any_whitespace"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str):
    with pytest.raises(RequestError, match="structured_outputs") as caught:
        StructuredOutputs(**given)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_the_bounds_themselves_are_permitted():
    assert StructuredOutputs(json=nested(MAX_SCHEMA_DEPTH)).json.count("items") == MAX_SCHEMA_DEPTH - 1
    assert StructuredOutputs(regex="a" * MAX_REGEX_CHARS).form == "regex"
    assert len(StructuredOutputs(choice=[str(i) for i in range(MAX_CHOICES)]).choice) == MAX_CHOICES
    assert StructuredOutputs(json={}, whitespace_pattern=r"[ \n]{0,8}|\t").form == "json"
