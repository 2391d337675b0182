"""Which JSON schemas are taken: those whose every keyword is enforced, or says nothing about the answer.

JSON Schema ignores keywords that it does not know, and so would the parser behind the grammars; here an answer
would then break what its schema was meant to say. So all of a schema is looked at before it is compiled.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

from ..errors import RequestError
from .patterns import UNWRITABLE, check_portable, check_writable

# fmt: off
ENFORCED = (
    "$ref", "allOf", "anyOf", "oneOf", "const", "enum", "type", "items", "additionalItems", "prefixItems",
    "minItems", "maxItems", "properties", "patternProperties", "additionalProperties", "required",
    "minProperties", "maxProperties", "minLength", "maxLength", "pattern", "format", "minimum", "maximum",
    "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
)
# They describe. discriminator (OpenAPI) only says which branch of a oneOf will match.
ANNOTATIONS = (
    "$anchor", "$comment", "$defs", "$id", "$schema", "contentEncoding", "contentMediaType", "default",
    "definitions", "deprecated", "description", "discriminator", "example", "examples", "id", "readOnly",
    "title", "writeOnly",
)
# fmt: on
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
MAPS = ("$defs", "definitions", "patternProperties", "properties")
SINGLE = ("items", "additionalItems", "additionalProperties")

DRAFTS = {  # `$schema` without scheme and '#' -> a number that orders them
    "json-schema.org/draft-04/schema": 4,
    "json-schema.org/draft-06/schema": 6,
    "json-schema.org/draft-07/schema": 7,
    "json-schema.org/draft/2019-09/schema": 8,
    "json-schema.org/draft/2020-12/schema": 9,
}
LATEST = 9

MAX_PROPERTIES = 1000  # that a schema names, in all: compiling an object takes time that grows with their square
MAX_EXACT = 2**53  # whole numbers up to here are exact as float64, in which bounds are held

# The library takes February 29 of any year for a date. This is what is left: other days, and those of leap years.
LEAP_YEAR = r"(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
REAL_DAY = rf"^(?:\d{{4}}-(?:(?:0[13-9]|1[0-2])-\d\d|02-(?:[01]\d|2[0-8]))|{LEAP_YEAR}-02-29)"

# \uXXXX would be a second way to write a character: a property of another spelling would escape its own schema.
OPTIONS = {"lenient": False, "coerce_one_of": False, "json_allowed_escapes": 'nrbtf\\"'}


def schema_definition(text: str, **options: Any) -> str:
    """JSON text of a checked schema with the options of its compilation (llguidance's `JsonCompileOptions`) in it.

    Raises RequestError, naming the place as a JSON pointer, for keywords that are not enforced and values that would
    be read otherwise than JSON Schema means.
    """
    schema = json.loads(text)
    for part in check_schema(schema):
        if part.get("format") in ("date", "date-time"):
            part["allOf"] = [*part.get("allOf", ()), {"pattern": REAL_DAY}]
    return json.dumps({**schema, "x-guidance": {**OPTIONS, **options}}, separators=(",", ":"))


def check_schema(schema: Any) -> list[dict[str, Any]]:
    """All parts of a schema (parsed JSON) that are schemas themselves.

    Raises RequestError unless each can be enforced as it is meant.
    """
    if not isinstance(schema, dict):
        raise _refused("", "a schema must be an object here")
    draft = _draft(schema)
    todo: list[tuple[str, Any]] = [("", schema)]
    parts: list[dict[str, Any]] = []
    n_properties = 0
    seen: set[int] = set()  # schemas are parsed once and stay where they are: an id is one schema
    while todo:
        at, part = todo.pop()
        if isinstance(part, bool) or id(part) in seen:
            continue
        if not isinstance(part, dict):
            raise _refused(at, "a schema must be an object, true or false")
        seen.add(id(part))
        parts.append(part)
        _check_keywords(at, part, draft)
        _check_values(at, part, draft)
        todo += _inner(at, part, draft)
        n_properties += len(part.get("properties", ())) + len(part.get("patternProperties", ()))
        if n_properties > MAX_PROPERTIES:
            raise _refused(at, f"more than {MAX_PROPERTIES} properties in all")
        if "$ref" in part:
            todo.append((str(part["$ref"])[1:], _target(schema, part["$ref"], at)))
    return parts


def _draft(schema: dict[str, Any]) -> int:
    uri = schema.get("$schema", "https://json-schema.org/draft/2020-12/schema")
    name = uri.removesuffix("#").removeprefix("https://").removeprefix("http://") if isinstance(uri, str) else None
    if name not in DRAFTS:
        raise _refused("/$schema", f"unknown draft; there are {', '.join(DRAFTS)}")
    return DRAFTS[name]


def _check_keywords(at: str, part: dict[str, Any], draft: int) -> None:
    for key in part:
        if key not in ENFORCED and key not in ANNOTATIONS and (not key.startswith("x-") or key == "x-guidance"):
            raise _refused(at, f"the keyword {key!r} is not supported, and is not ignored either")
    if at and not {"$id", "id", "$schema"}.isdisjoint(part):
        raise _refused(at, "only the outermost schema may have $id, id or $schema")
    if "prefixItems" in part and draft < LATEST:
        raise _refused(at, "prefixItems is of draft 2020-12; earlier ones give a list as items")
    if "additionalItems" in part and draft == LATEST:
        raise _refused(at, "additionalItems is of earlier drafts; in 2020-12 items follow prefixItems")


def _check_values(at: str, part: dict[str, Any], draft: int) -> None:
    for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "const", "enum"):
        if key in part:
            _check_exact(f"{at}/{key}", part[key])
    for key in ("exclusiveMinimum", "exclusiveMaximum"):
        if key in part and isinstance(part[key], bool) != (draft == 4):
            raise _refused(at, f"{key} must be {'true or false in draft 4' if draft == 4 else 'a number'}")
    patterns = [part["pattern"]] if "pattern" in part else []
    patterns += part["patternProperties"] if isinstance(part.get("patternProperties"), dict) else []
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise _refused(at, "pattern must be a text")
        where = f"structured_outputs.json at {at[:200] or '/'}"
        check_portable(pattern, where)
        check_writable(pattern, where)
    required, least = part.get("required", []), part.get("minProperties", 0)
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise _refused(at, "required must be a list of texts")
    # A property that the schema does not name can come twice in an answer, and then counts once.
    if not isinstance(least, int) or least > len(set(required)) + 1:
        raise _refused(at, "minProperties is enforced up to one more than the properties that are required")


def _check_exact(at: str, value: Any) -> None:
    """Raises RequestError if a number anywhere in `value` is more than a float64 tells, a text more than JSON's short
    escapes can write."""
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, list | dict):
            todo += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int) and abs(value) > MAX_EXACT:
            raise _refused(at, f"whole numbers beyond 2**53 are not enforced exactly, as {str(value)[:30]}")
        elif isinstance(value, str) and re.search(UNWRITABLE, value):
            raise _refused(at, "control characters that need an escape \\uXXXX are not supported")


def _inner(at: str, part: dict[str, Any], draft: int) -> Iterator[tuple[str, Any]]:
    """The schemas right inside `part`, each with its place."""
    for key in SINGLE:
        if key in part and not (key == "items" and isinstance(part[key], list)):
            yield f"{at}/{key}", part[key]
    old_items = ("items",) if isinstance(part.get("items"), list) else ()
    if old_items and draft == LATEST:
        raise _refused(at, "items must be a schema; since draft 2020-12 a list of schemas is prefixItems")
    for key in (*LISTS, *old_items):
        if key in part:
            yield from _members(f"{at}/{key}", part[key], list, enumerate)
    for key in MAPS:
        if key in part:
            yield from _members(f"{at}/{key}", part[key], dict, dict.items)


def _members(at: str, value: Any, of: type, items: Callable) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, of):
        raise _refused(at, f"expected {'a list' if of is list else 'an object'} of schemas")
    for key, member in items(value):
        yield f"{at}/{key}", member


def _target(schema: dict[str, Any], ref: Any, at: str) -> Any:
    """What a `$ref` within the schema points to (RFC 6901)."""
    if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
        raise _refused(at, f"$ref {str(ref)[:80]!r} must point into this schema, as '#/$defs/name'; nothing is fetched")
    value: Any = schema
    for step in unquote(ref[1:]).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list) and step.isascii() and step.isdigit() and len(step) < 8 and int(step) < len(value):
            value = value[int(step)]
        elif isinstance(value, dict) and step in value:
            value = value[step]
        else:
            raise _refused(at, f"$ref {ref[:80]!r} points to nothing in this schema")
    return value


def _refused(at: str, why: str) -> RequestError:
    return RequestError(f"structured_outputs.json at {at[:200] or '/'}: {why}.")
