"""Random JSON schemas of everything that is enforced."""

import random
from typing import Any

PATTERNS = ["^[a-z]{2,5}$", "^a|b$", "x\\d+", "^(foo|bar)_[0-9]{1,3}$", "[A-F]{2}$", "^\\S*$", "^\\u0041-\\/?\\.$"]
FORMATS = ["date", "ipv4", "uuid"]


def random_schema(rng: random.Random) -> dict[str, Any]:
    """One with two definitions, of which the second can hold itself."""
    tree = {
        "type": "object",
        "properties": {"v": _leaf(rng), "children": {"type": "array", "items": {"$ref": "#/$defs/b"}, "maxItems": 2}},
        "required": ["v"],
        "additionalProperties": False,
    }
    return {**_schema(rng, 3), "$defs": {"a": _leaf(rng), "b": tree}}


def _schema(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth <= 0:
        return _leaf(rng)
    make = rng.choice([_object, _object, _array, _any_of, _all_of, _leaf, _reference])
    return make(rng, depth) if make is not _leaf else _leaf(rng)


def _reference(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{rng.choice('ab')}", "description": "a part that is described elsewhere"}


def _leaf(rng: random.Random) -> dict[str, Any]:
    return rng.choice([_string, _string, _integer, _number, _fixed])(rng)


def _string(rng: random.Random) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    kind = rng.randrange(4)
    if kind == 0:
        schema["minLength"] = rng.randrange(4)
        schema["maxLength"] = schema["minLength"] + rng.randrange(5)
    elif kind == 1:
        schema["pattern"] = rng.choice(PATTERNS)
    elif kind == 2:
        schema["format"] = rng.choice(FORMATS)
    return schema


def _integer(rng: random.Random) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    low = rng.randrange(-1000, 1000)
    if rng.random() < 0.6:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.6:
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = low + 20 + rng.randrange(10**6)
    if rng.random() < 0.3:
        schema["multipleOf"] = rng.choice([2, 5, 7])
    return schema


def _number(rng: random.Random) -> dict[str, Any]:
    low = round(rng.uniform(-100, 100), rng.randrange(5))
    low_key, high_key = rng.choice(["minimum", "exclusiveMinimum"]), rng.choice(["maximum", "exclusiveMaximum"])
    return {"type": "number", low_key: low, high_key: low + round(rng.uniform(0.5, 1000), 3)}


def _fixed(rng: random.Random) -> dict[str, Any]:
    values = [None, True, False, 0, -17, 2.5, "", 'a"b\\c\n', "grüße 你好", [1, "x"], {"k": [None], "l": 0}]
    kind = rng.randrange(4)
    if kind == 0:
        return {"const": rng.choice(values)}
    if kind == 1:
        return {"enum": rng.sample(values, rng.randint(1, 6))}
    return {"type": rng.choice(["boolean", "null", ["string", "null"], ["integer", "boolean"]])}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["a", "b", "name", 'quo"te', "new\nline", "ключ", "a b", ""], rng.randrange(5))
    schema: dict[str, Any] = {"type": "object", "properties": {name: _schema(rng, depth - 1) for name in names}}
    schema["required"] = [name for name in names if rng.random() < 0.6]
    other = rng.randrange(4)
    if other == 0:
        schema["additionalProperties"] = False
    elif other == 1:
        schema["additionalProperties"] = _leaf(rng)
    elif other == 2:
        schema["patternProperties"] = {"^p_": _leaf(rng), "^q_[0-9]$": _leaf(rng)}
    if rng.random() < 0.2:
        schema["required"] = names
        schema["maxProperties"] = len(names) + 1
        if other:
            schema["minProperties"] = len(names) + 1
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array", "items": _schema(rng, depth - 1)}
    if rng.random() < 0.3:
        schema["prefixItems"] = [_schema(rng, depth - 1) for _ in range(rng.randint(1, 2))]
    schema["minItems"] = rng.randrange(3)
    schema["maxItems"] = schema["minItems"] + rng.randrange(3)
    return schema


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.3:
        return {"oneOf": [_string(rng), _integer(rng), {"type": "null"}]}
    return {"anyOf": [_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}


def _all_of(rng: random.Random, depth: int) -> dict[str, Any]:
    part = {"type": "object", "properties": {"both": _leaf(rng)}, "required": ["both"]}
    return {"allOf": [part, {**_object(rng, depth - 1), "maxProperties": 99}] if rng.random() < 0.2 else [part]}
