"""The forms that an answer can be asked to have."""

import dataclasses
import json
import re
from typing import Any

from ..errors import RequestError

MAX_SCHEMA_BYTES = 256 << 10  # of a schema as compact JSON
MAX_SCHEMA_DEPTH = 64  # objects and lists inside one another
MAX_REGEX_CHARS = 8 << 10
MAX_GRAMMAR_CHARS = 64 << 10
MAX_CHOICES, MAX_CHOICE_CHARS = 4096, 4096
MAX_CHOICES_CHARS = 64 << 10  # of all choices together
MAX_WHITESPACE_CHARS = 64

FORMS = ("json", "json_object", "regex", "choice", "grammar")

# Characters that JSON takes for white space, one or one of a list, each with a count; alternatives. Nothing else could
# be put between the parts of a JSON text.
_SPACE = r"(?: |\\n|\\r|\\t|\n|\r|\t)"
_SPACES = rf"(?:{_SPACE}|\[{_SPACE}+\])(?:[?*+]|\{{\d{{1,3}}(?:,\d{{0,3}})?\}})?"
_WHITESPACE_PATTERN = re.compile(rf"(?:{_SPACES})+(?:\|(?:{_SPACES})+)*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """A form that every answer has; exactly one is given. Names are those of vLLM's `StructuredOutputsParams`.

    The forms are enforced token by token; an answer that stops early (`max_tokens`, a stop string) is a beginning of
    such a text. What a form may contain is checked further by `constraints.GrammarCompiler`.

    Raises RequestError on anything but one form, on wrong types, and on what is too large.
    """

    json: str | dict[str, Any] | bool | None = None  # a JSON schema, or its text; kept as compact JSON text
    json_object: bool = False  # any JSON object
    regex: str | None = None  # matched by the whole answer; \d, \w, \s are ASCII; no look-around, no back-references
    choice: tuple[str, ...] | list[str] | None = None  # the answer is one of these
    grammar: str | None = None  # in the Lark dialect of llguidance, or EBNF as in llama.cpp (GBNF)
    disable_any_whitespace: bool = False  # of json and json_object: none between the parts of the text
    whitespace_pattern: str | None = None  # of json and json_object: a regex of what may stand between them

    def __post_init__(self) -> None:
        for name in ("json_object", "disable_any_whitespace"):
            _check(name, isinstance(getattr(self, name), bool), getattr(self, name), "True or False")
        given = [name for name in FORMS if getattr(self, name) is not None and getattr(self, name) is not False]
        if self.json is False:
            raise RequestError("structured_outputs.json=false permits no answer; give a schema that permits one.")
        if len(given) != 1:
            shown = " and ".join(given) or "none"
            raise RequestError(f"structured_outputs needs exactly one of {', '.join(FORMS)}, but {shown} is given.")
        if self.json is not None:
            object.__setattr__(self, "json", _canonical_schema(self.json))
        self._check_text("regex", MAX_REGEX_CHARS)
        self._check_text("grammar", MAX_GRAMMAR_CHARS)
        self._check_text("whitespace_pattern", MAX_WHITESPACE_CHARS)
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        self._check_whitespace()

    @property
    def form(self) -> str:
        """Which of the forms is given."""
        return next(name for name in FORMS if getattr(self, name) not in (None, False))

    def _check_text(self, name: str, most: int) -> None:
        value = getattr(self, name)
        if value is not None:
            right = f"a text of 1 to {most} characters that can be written as UTF-8"
            fits = isinstance(value, str) and 1 <= len(value) <= most and _is_unicode(value) and "\0" not in value
            _check(name, fits, value, right)

    def _check_whitespace(self) -> None:
        if not self.disable_any_whitespace and self.whitespace_pattern is None:
            return
        if self.json is None and not self.json_object:
            raise RequestError("structured_outputs: white space can be chosen only for json and json_object.")
        if self.whitespace_pattern is not None:
            right = r"white space of JSON with counts, such as '[ \n]{0,8}', without disable_any_whitespace"
            fits = _WHITESPACE_PATTERN.fullmatch(self.whitespace_pattern) and not self.disable_any_whitespace
            _check("whitespace_pattern", bool(fits), self.whitespace_pattern, right)


def _canonical_schema(schema: Any) -> str:
    """Compact JSON text of a schema. The order of keys stays: properties of an answer come in it."""
    _check("json", isinstance(schema, str | dict | bool), schema, "a JSON schema: an object, true, or the text of one")
    try:
        if isinstance(schema, str):
            # What is compact has no more bytes than what was given, but for escapes: six for one character.
            _check("json", len(schema) <= MAX_SCHEMA_BYTES, schema, f"at most {MAX_SCHEMA_BYTES} bytes of JSON")
            schema = json.loads(schema)
        text = json.dumps(schema, separators=(",", ":"), allow_nan=False)
        schema = json.loads(text)  # keys that were no texts have become such
    except (ValueError, TypeError, RecursionError) as e:
        if isinstance(e, RequestError):
            raise
        raise RequestError(f"structured_outputs.json is not valid JSON: {e or type(e).__name__}.") from None
    _check("json", len(text) <= MAX_SCHEMA_BYTES, text, f"at most {MAX_SCHEMA_BYTES} bytes of JSON")
    _check("json", schema is True or isinstance(schema, dict), schema, "a JSON schema: an object or true")
    _check("json", _depth(schema) <= MAX_SCHEMA_DEPTH, text, f"nested at most {MAX_SCHEMA_DEPTH} deep")
    return "{}" if schema is True else text


def _depth(value: Any) -> int:
    depth, layer = 0, [value]
    while layer := [v for v in layer if isinstance(v, dict | list)]:
        depth += 1
        layer = [inner for v in layer for inner in (v.values() if isinstance(v, dict) else v)]
    return depth


def _choices(choice: Any) -> tuple[str, ...]:
    right = f"a list of 1 to {MAX_CHOICES} texts of 1 to {MAX_CHOICE_CHARS} characters, {MAX_CHOICES_CHARS} in all"
    _check("choice", isinstance(choice, list | tuple) and 1 <= len(choice) <= MAX_CHOICES, choice, right)
    fits = all(isinstance(c, str) and 1 <= len(c) <= MAX_CHOICE_CHARS and _is_unicode(c) for c in choice)
    _check("choice", fits and sum(map(len, choice)) <= MAX_CHOICES_CHARS, choice, right)
    return tuple(dict.fromkeys(choice))


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _check(name: str, ok: bool, value: Any, right: str) -> None:
    if not ok:
        shown = repr(value)
        shown = shown if len(shown) <= 100 else shown[:100] + "..."
        raise RequestError(f"structured_outputs.{name}={shown} must be {right}.")
