"""Damage to JSON documents, for fuzz tests: of values, names and structure, or of the bytes."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from mutations import mutated


class Raw(str):
    """Text that stands in a document as it is, whether or not it is JSON."""


class Pairs(list[tuple[Any, Any]]):
    """An object whose names may occur twice."""


VALUES = [
    *(
        Raw(text)
        for text in ("null", "true", "false", "[]", "{}", "NaN", "Infinity", "-Infinity", "", "01", "1.", "+1")
    ),
    *(Raw(text) for text in ("0", "1", "2", "-1", "-0", "4", "0.5", "4.0", "1e0", "-1.5", "1e999", "1e-999", "1e308")),
    *(Raw(str(2**n + d)) for n in (16, 31, 32, 53, 62, 63, 64) for d in (-1, 0)),
    *(Raw("9" * digits) for digits in (30, 400, 4300, 4301)),
    *(Raw(text) for text in ('"', '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"a\nb"', '"\\x"', "'a'")),
    *("", "1", "None", "\u00fc", "\U0001f600", "x" * 1000),
    *(Raw("[" * depth + "]" * depth) for depth in (2, 130, 900)),
    *(Raw('{"a":' * depth + "1" + "}" * depth) for depth in (1, 130, 900)),
    Raw("[" * 100_000),
    Raw("[" + ",".join(["1"] * 100) + "]"),
    Raw("[[1],[2,3]]"),
]
STYLES = [  # what stands before, after commas, after colons, and behind
    ("", ",", ":", ""),
    *(("", ", ", ": ", "") for _ in range(3)),
    ("", " ,\n\t", " :\r\n", " \n\t\r "),
    (" ", ",", ":", ""),
    ("\n", ",", ":", ""),
    ("\ufeff", ",", ":", ""),
    ("\xa0", ",", ":", ""),
    ("", ",\x0c", ":", ""),
    ("", ",,", ":", ""),
    ("", ",", ":", "\0"),
    ("", ",", ":", "{}"),
    ("", ",", ":", "// end"),
]


def parse(document: bytes) -> Any:
    """A document whose objects are `Pairs`."""
    return json.loads(document, object_pairs_hook=Pairs)


def to_text(value: Any, comma: str = ",", colon: str = ":") -> str:
    """A document of dictionaries with repeated names (`Pairs`) and text that is no JSON (`Raw`)."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, Pairs):
        return "{" + comma.join(to_text(k) + colon + to_text(v, comma, colon) for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + comma.join(to_text(item, comma, colon) for item in value) + "]"
    return json.dumps(value)


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@st.composite
def mutated_json(draw: DrawFn, document: bytes, values: Sequence[Any] = ()) -> bytes:
    """The document with one to three places changed, some of them to `values`, and perhaps set in another way."""
    root, pool = parse(document), [*VALUES, *(list(values) * (1 + len(VALUES) // max(1, len(values))))]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        root = _edit(draw, root, pool)
    before, comma, colon, after = draw(st.sampled_from([*STYLES, *STYLES[:5] * 10]))
    return as_bytes(before + to_text(root, comma, colon) + after)


def damaged_json(document: bytes, values: Sequence[Any] = ()) -> st.SearchStrategy[bytes]:
    """Mutations of what the document says, and of its bytes."""
    return st.one_of(mutated_json(document, values), mutated_json(document, values), mutated(document))


def _edit(draw: DrawFn, root: Any, pool: list[Any]) -> Any:
    """A copy with one value changed, moved, added or dropped."""
    places = list(_places(root, ()))
    path = draw(st.sampled_from(places))
    if not path:  # all of it
        return draw(st.sampled_from(pool)) if draw(st.integers(0, 9)) == 0 else root
    others = [other for other in places if other]
    kind = draw(st.sampled_from(["value", "nudge", "copy", "alike", "exchange", "delete", "repeat", "name", "add"]))
    value = _get(root, path)
    match kind:
        case "nudge" if type(value) is int:
            return _changed(root, path, lambda _: value + draw(st.integers(-16, 16)))
        case "copy":  # from somewhere else
            source = _get(root, draw(st.sampled_from(others)))
            return _changed(root, path, lambda _: source)
        case "alike":  # from a place of the same name or index
            alike = [other for other in others if other[-1] == path[-1] or _name(root, other) == _name(root, path)]
            source = _get(root, draw(st.sampled_from(alike)))
            return _changed(root, path, lambda _: source)
        case "exchange":
            other = draw(st.sampled_from([o for o in others if len(o) == len(path)]))
            source = _get(root, other)
            return _changed(_changed(root, path, lambda _: source), other, lambda _: value)
        case "delete":
            return _spliced(root, path, [])
        case "repeat":
            return _spliced(root, path, [_item(root, path)] * 2)
        case "name" if isinstance(_get(root, path[:-1]), Pairs):
            names = [_name(root, other) for other in others if _name(root, other) is not None]
            new = draw(
                st.sampled_from([*names, *(x for x in pool if isinstance(x, str) and x[:1] not in "{[0123456789")])
            )
            return _spliced(root, path, [(new, value)])
        case "add":
            new = draw(st.sampled_from(pool))
            item = (draw(st.sampled_from(["a", "shape", "x" * 300])), new) if _name(root, path) is not None else new
            return _spliced(root, path, [_item(root, path), item])
    new = draw(st.sampled_from(pool))
    return _changed(root, path, lambda _: new)


def _places(value: Any, path: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The path of every value: the position in each container on the way."""
    yield path
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _places(item[1] if isinstance(value, Pairs) else item, (*path, i))


def _item(root: Any, path: tuple[int, ...]) -> Any:
    """A pair of an object, or an item of a list."""
    return _get(root, path[:-1])[path[-1]]


def _name(root: Any, path: tuple[int, ...]) -> Any:
    return _item(root, path)[0] if isinstance(_get(root, path[:-1]), Pairs) else None


def _get(root: Any, path: tuple[int, ...]) -> Any:
    for i in path:
        root = root[i][1] if isinstance(root, Pairs) else root[i]
    return root


def _changed(root: Any, path: tuple[int, ...], change: Callable[[Any], Any]) -> Any:
    """A copy with another value at `path`; the same where that has gone."""
    if not path:
        return change(root)
    at = path[0]
    if not isinstance(root, list) or at >= len(root):
        return root
    item = root[at]
    new = (
        (item[0], _changed(item[1], path[1:], change)) if isinstance(root, Pairs) else _changed(item, path[1:], change)
    )
    return type(root)([*root[:at], new, *root[at + 1 :]])


def _spliced(root: Any, path: tuple[int, ...], items: list[Any]) -> Any:
    """A copy with `items` instead of the item at `path`."""
    at = path[-1]
    return _changed(root, path[:-1], lambda parent: type(parent)([*parent[:at], *items, *parent[at + 1 :]]))
