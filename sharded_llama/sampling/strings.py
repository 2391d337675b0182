"""A sampler written as a text, such as `temperature(0.7) top_p(0.9)`: for flags and config files.

    sampler  = setting, or several with spaces between them
    setting  = "greedy" | "entropy" [ "(" [ NAME "=" value { "," NAME "=" value } ] ")" ] | NAME "(" number ")"
    value    = number | "none"

The NAMEs are `NUMBERS` here, and inside `entropy(...)` the fields of `EntropySettings`.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

from ..errors import RequestError
from .entropy_settings import EntropySettings
from .params import SamplingParams

MAX_CHARS = 2000
MAX_NUMBER_CHARS = 32

# What says how a token is chosen, and what `greedy` and `entropy`, each by itself, say in its place.
FILTERS = ("temperature", "top_k", "top_p", "min_p")
NUMBERS = (*FILTERS, "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "min_tokens")
NAMES = ("greedy", "entropy", *NUMBERS)

_TOKEN = re.compile(
    r"\s*(?:(?P<name>[A-Za-z_]\w*)|(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)|(?P<mark>[(),=])"
    r"|(?P<other>\S))",
    re.ASCII | re.IGNORECASE,
)


class _Token(NamedTuple):
    kind: str  # "name", "number", "mark", or "end" of the text
    text: str
    start: int


def parse_sampler(text: str) -> dict[str, Any]:
    """The fields of `SamplingParams` that a sampler text gives; each value is one that SamplingParams takes.

    Raises RequestError: what is wrong, what would be right, and the text with a mark under the place.
    """
    if not isinstance(text, str) or len(text) > MAX_CHARS:
        raise RequestError(f"sampler: expected a text of at most {MAX_CHARS} characters, such as 'temperature(0.7)'.")
    return _Parser(text).sampler()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(self._read_tokens())
        self._at = 0

    def _read_tokens(self) -> Iterable[_Token]:
        at, end = 0, len(self._text.rstrip())
        while at < end:
            found = _TOKEN.match(self._text, at)
            kind = found.lastgroup
            token = _Token(kind, found[kind], found.start(kind))
            if kind == "other":
                self._fail(token, f"{token.text!r} has no meaning; a sampler has names, numbers, ( ) , and = alone.")
            yield token
            at = found.end()
        yield _Token("end", "", end)

    def sampler(self) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        words: dict[str, _Token] = {}
        if self._next.kind == "end":
            self._fail(self._next, f"it is empty; expected one or more of {_listed(NAMES)}.")
        while self._next.kind != "end":
            word = self._take_name(NAMES, words, "setting")
            for other in words:
                self._check_together(word, other)
            words[word.text] = word
            if word.text == "greedy":
                if self._next.text == "(":
                    self._fail(self._next, "greedy stands alone, without a number.")
                settings["temperature"] = 0.0
            elif word.text == "entropy":
                settings["entropy"] = self._entropy(word)
            else:
                settings[word.text] = self._number_of(word)
        return settings

    def _number_of(self, word: _Token) -> int | float:
        """The number in brackets after a word."""
        usage = f"write {word.text}(NUMBER)"
        self._take("(", usage)
        value = self._number(usage)
        self._take(")", usage)
        self._check([word], lambda: SamplingParams(max_tokens=2**31 - 1, **{word.text: value}))
        return value

    def _entropy(self, word: _Token) -> EntropySettings:
        names = [field.name for field in dataclasses.fields(EntropySettings)]
        usage = "write entropy(NAME=NUMBER, ...), or entropy alone"
        words: dict[str, _Token] = {}
        values: dict[str, int | float | None] = {}
        if self._next.text != "(":
            return EntropySettings()
        self._take("(", usage)
        while self._next.text != ")" or words:
            name = self._take_name(names, words, "setting of entropy")
            words[name.text] = name
            self._take("=", usage)
            values[name.text] = self._none_or_number(usage)
            if self._next.text != ",":
                break
            self._take(",", usage)
        self._take(")", usage)
        return self._check([*words.values(), word], lambda: EntropySettings(**values))

    def _check_together(self, word: _Token, other: str) -> None:
        """What says all of how a token is chosen says it alone."""
        alone = {"greedy", "entropy"} & {word.text, other}
        if alone and {word.text, other} <= {"greedy", "entropy", *FILTERS}:
            self._fail(word, f"{word.text} and {other} contradict each other; give one of them.")

    def _check(self, words: list[_Token], make: Callable[[], Any]) -> Any:
        """Points at the word whose value a class refuses: the first that its message names, else the last."""
        try:
            return make()
        except RequestError as error:
            message = str(error)
            found = {at: w for w in words if (at := _mention(w.text, message)) >= 0}
            self._fail(found[min(found)] if found else words[-1], message)

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _take(self, mark: str, usage: str) -> None:
        if self._next.text != mark:
            self._fail(self._next, f"expected {mark!r} {_instead(self._next)}: {usage}.")
        self._at += 1

    def _take_name(self, names: Iterable[str], given: Iterable[str], what: str) -> _Token:
        """The next token, which must be one of the names, and none that was given before."""
        token = self._next
        if token.kind != "name":
            self._fail(token, f"expected the name of a {what} {_instead(token)}; there are: {_listed(names)}.")
        if token.text not in names:
            close = difflib.get_close_matches(token.text.lower(), names, n=1)
            right = f"did you mean {close[0]!r}?" if close else f"there are: {_listed(names)}."
            self._fail(token, f"there is no {what} {token.text!r}; {right}")
        if token.text in given:
            self._fail(token, f"{token.text} is given twice; give it once.")
        self._at += 1
        return token

    def _none_or_number(self, usage: str) -> int | float | None:
        if self._next.text == "none":
            self._at += 1
            return None
        return self._number(usage)

    def _number(self, usage: str) -> int | float:
        token = self._next
        if token.kind != "number":
            self._fail(token, f"expected a number {_instead(token)}: {usage}.")
        if len(token.text) > MAX_NUMBER_CHARS:
            self._fail(token, f"this number has more than {MAX_NUMBER_CHARS} characters; write a shorter one.")
        self._at += 1
        return int(token.text) if token.text.lstrip("+-").isdigit() else float(token.text)

    def _fail(self, token: _Token, message: str) -> NoReturn:
        shown = "".join(c if c.isprintable() else " " for c in self._text)
        mark = " " * token.start + "^" * max(1, len(token.text))
        raise RequestError(f"sampler: {message}\n  {shown}\n  {mark}")


def _instead(token: _Token) -> str:
    return "at the end" if token.kind == "end" else f"in place of {token.text!r}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _mention(name: str, message: str) -> int:
    """Where a message says `name=...`; -1: nowhere."""
    found = re.search(rf"(?<!\w){re.escape(name)}=", message)
    return found.start() if found else -1
