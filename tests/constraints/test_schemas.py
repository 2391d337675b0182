"""JSON schemas: random answers to random schemas validate, and what cannot be enforced is refused."""

import datetime
import json
import random
from typing import Any

import jsonschema
import pytest
from random_schemas import random_schema
from random_walks import random_answer

from sharded_llama.constraints import GrammarCompiler
from sharded_llama.errors import ConstraintError, RequestError
from sharded_llama.sampling.structured import StructuredOutputs
from sharded_llama.tokenizer import Tokenizer

FORMATS = jsonschema.FormatChecker(("ipv4", "uuid"))


@FORMATS.checks("date", raises=ValueError)
def is_date(value: Any) -> bool:
    """A date of RFC 3339, which has a year 0 that Python lacks; it was a leap year like 2000."""
    if isinstance(value, str):
        datetime.date.fromisoformat(value.replace("0000-", "2000-", 1) if value.startswith("0000-") else value)
    return True


def reads_as(compiler: GrammarCompiler, tokenizer: Tokenizer, schema: Any, text: str) -> bool:
    """Whether the schema permits this answer, in the tokenizer's own tokens."""
    matcher = compiler.compile(StructuredOutputs(json=schema)).start()
    try:
        for token in tokenizer.encode(text):
            matcher.accept(token)
    except ConstraintError:
        return False
    return matcher.may_end


@pytest.mark.parametrize("part", range(4))
def test_random_answers_to_random_schemas_validate(part: int, compiler: GrammarCompiler, tokenizer: Tokenizer):
    refused = validated = 0
    for seed in range(100 * part, 100 * (part + 1)):
        rng = random.Random(seed)
        schema = random_schema(rng)
        jsonschema.Draft202012Validator.check_schema(schema)
        validator = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
        try:
            grammar = compiler.compile(StructuredOutputs(json=schema))
        except RequestError:
            refused += 1  # some ask for what cannot be, others for what is not supported
            continue
        for _ in range(2):
            answer = random_answer(grammar, tokenizer, 1024, 1, rng)
            if answer is not None:
                validator.validate(json.loads(answer))
                validated += 1
    assert refused <= 10
    assert validated >= 160


def test_any_object(compiler: GrammarCompiler, tokenizer: Tokenizer):
    grammar = compiler.compile(StructuredOutputs(json_object=True))
    answers = [random_answer(grammar, tokenizer, 1024, 1, random.Random(i)) for i in range(60)]
    parsed = [json.loads(answer) for answer in answers if answer is not None]
    assert len(parsed) >= 50
    assert all(isinstance(value, dict) for value in parsed)
    assert any(len(value) > 1 for value in parsed)


def test_white_space(compiler: GrammarCompiler, tokenizer: Tokenizer):
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3}
    none = compiler.compile(StructuredOutputs(json=schema, disable_any_whitespace=True))
    some = compiler.compile(StructuredOutputs(json=schema, whitespace_pattern=" {0,2}"))
    for i in range(30):
        compact = random_answer(none, tokenizer, 1024, 1, random.Random(i), free=8)
        assert compact == json.dumps(json.loads(compact), separators=(",", ":"))
        spaced = random_answer(some, tokenizer, 1024, 1, random.Random(i), free=8)
        assert len(json.loads(spaced)) in (2, 3)
        assert "   " not in spaced
        assert "\n" not in spaced


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        # A second spelling of a property's name must not escape the property's schema.
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, '{"a":1}', '{"\\u0061":"x"}'),
        ({"type": "object", "properties": {"a\n": {"type": "integer"}}}, '{"a\\n":1}', '{"a\\n":"x"}'),
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, '{"a":1,"b":"x"}', '{"a":1,"a":"x"}'),
        ({"type": "string"}, '"\\n\\"\\\\"', '"a\nb"'),
        ({"type": "string", "format": "date"}, '"2024-02-29"', '"2023-02-29"'),
        ({"type": "string", "format": "date"}, '"2000-02-29"', '"1900-02-29"'),
        ({"type": "string", "format": "date-time"}, '"2024-02-29T01:02:03Z"', '"2023-02-29T01:02:03Z"'),
        ({"type": "string", "pattern": "^a|b$"}, '"ax"', '"xa"'),
        ({"type": "string", "pattern": "^\\d$"}, '"7"', '"٣"'),
        ({"const": 2**53}, "9007199254740992", "9007199254740993"),
        ({"type": "string", "pattern": r"^a[^\x00-\x1f]c[\x00-\x40]$"}, '"abc "', '"ac "'),
        (True, '[null,{"a":1e5}]', "[null,]"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "null"}]}, '[null,"x"]', '["x"]'),
        (
            {"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 3, "exclusiveMinimum": True},
            "4",
            "3",
        ),
        ({"$id": "http://a/b", "$ref": "#/$defs/x~1y%20z", "$defs": {"x/y z": {"type": "null"}}}, "null", "1"),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}], "title": "recursive"}, "null", "1"),
        ({"x-order": 1, "type": "null", "deprecated": True}, "null", "1"),
    ],
)
def test_single_answers(schema: Any, good: str, bad: str, compiler: GrammarCompiler, tokenizer: Tokenizer):
    assert reads_as(compiler, tokenizer, schema, good)
    assert not reads_as(compiler, tokenizer, schema, bad)


DRAFT_7 = {"$schema": "http://json-schema.org/draft-07/schema#"}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        *[({"type": "array", key: value}, f"keyword '{key}' is not supported") for key, value in {
            "uniqueItems": True, "contains": {}, "minContains": 1, "unevaluatedItems": False, "not": {}, "if": {},
            "propertyNames": {}, "dependentRequired": {}, "dependentSchemas": {}, "dependencies": {}, "nullable": True,
            "unevaluatedProperties": False, "$dynamicRef": "#", "$recursiveRef": "#", "minlength": 3, "foo": 1,
            "x-guidance": {"lenient": True}, "contentSchema": {},
        }.items()],
        ({"properties": {"a": {"items": {"not": {}}}}}, "/properties/a/items"),
        ({"$defs": {"unused": {"not": {}}}}, "/$defs/unused"),
        ({"examples": {"hidden": {"not": {}}}, "$ref": "#/examples/hidden"}, "/examples/hidden"),
        ({"$ref": "http://json-schema.org/draft-07/schema#"}, "nothing is fetched"),
        ({"$ref": "other.json"}, "nothing is fetched"),
        ({"$ref": "#name", "$defs": {"a": {"$anchor": "name"}}}, "nothing is fetched"),
        ({"$ref": "#/$defs/none"}, "points to nothing"),
        ({"$ref": "#/allOf/7", "allOf": [{}]}, "points to nothing"),
        ({"$ref": 3}, "must point into"),
        ({"items": {"$id": "http://a/b"}}, "only the outermost"),
        ({"$schema": "http://example.com/mine"}, "unknown draft"),
        ({"items": [{"type": "null"}]}, "prefixItems"),
        ({**DRAFT_7, "prefixItems": [{}]}, "of draft 2020-12"),
        ({"items": {}, "additionalItems": False}, "of earlier drafts"),
        ({"minimum": 3, "exclusiveMinimum": True}, "exclusiveMinimum must be a number"),
        ({"const": 2**53 + 1}, "beyond 2**53"),
        ({"enum": [{"a": [-(2**60)]}]}, "beyond 2**53"),
        ({"type": "integer", "maximum": 10**20}, "beyond 2**53"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"type": "object", "required": [1]}, "required must be"),
        ({"type": "string", "pattern": "(?=a)b"}, "all engines share"),
        ({"type": "string", "pattern": "[a&&b]"}, "all engines share"),
        ({"type": "object", "patternProperties": {"\\bx": {}}}, "lookaround"),
        ({"const": {"a": ["x\x01"]}}, "control characters"),
        ({"enum": ["ok", "\x7f"]}, "control characters"),
        *[({"pattern": p}, "control character") for p in (r"^a\x01$", "a\x01", r"\v", r"[\u007F]", r"[\x02-\x02]")],
        ({"properties": {"a": 1}}, "must be an object, true or false"),
        ({"properties": []}, "expected an object of schemas"),
        ({"allOf": {}}, "expected a list of schemas"),
        ({"type": "strin"}, "Invalid type"),
        ({"type": "string", "format": "regex"}, "format"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"enum": []}, "nsatisfiable"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "nsatisfiable"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "nsatisfiable"),
        ({"properties": {f"p{i}": {} for i in range(1001)}}, "more than 1000 properties"),
    ],
)  # fmt: skip
def test_what_is_refused(schema: Any, message: str, compiler: GrammarCompiler):
    with pytest.raises(RequestError, match=r"structured_outputs\.json") as caught:
        compiler.compile(StructuredOutputs(json=schema))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 800
