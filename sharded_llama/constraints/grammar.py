"""Grammars: what may come next in an answer of a given form, by the llguidance library.

The library keeps a parser per answer and, shared by all answers of a grammar, a lexer that is built as it is used. Both
are bounded by `LIMITS`; what exceeds them is refused when it is compiled, or ends the answer with an error. Nothing
is ever let through. An answer that hits a limit is tried once more with a lexer of its own: others may have used up
the one that it shared.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import ConstraintError, RequestError
from ..sampling.structured import StructuredOutputs
from ..tokenizer import Tokenizer
from . import bits
from .patterns import check_portable
from .schema import schema_definition
from .trial import GrammarTrial
from .vocabulary import Vocabulary, llguidance, make_vocabulary

MAX_CACHED = 16  # compiled grammars

# The library's own units; the defaults that are not named stay.
LIMITS = {
    "initial_lexer_fuel": 200_000,  # building a grammar's regular expressions: about 0.1 s
    "max_items_in_row": 10_000,  # alternatives at one place, such as properties of an object that may all be left out
    "max_lexer_states": 100_000,  # of all answers of a grammar: 1 to 2 kB each
    "max_grammar_size": 200_000,
    "verbose_errors": False,  # which would carry the whole grammar
}
PROBED = 4  # tokens of a first answer, when a grammar is compiled
MAX_MESSAGE = 300

MAX_GBNF_CHARS, MAX_GBNF_RULES = 16 << 10, 200  # converting them takes time that grows with the square


class GrammarCompiler:
    """Makes grammars for one tokenizer and keeps the last ones. May be used by several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        """Nothing is imported or built before `compile` is called.

        Args:
            tokenizer: from `load_tokenizer`.
            vocab_size: of the model, which may be padded beyond the tokenizer's.
            eos_ids: tokens that end a sequence.
        """
        self._arguments = (tokenizer, vocab_size, eos_ids)
        self._vocabulary: Vocabulary | None = None
        self._cache: OrderedDict[StructuredOutputs, Grammar] = OrderedDict()
        self._lock = threading.Lock()
        self._trial = GrammarTrial(LIMITS)

    def compile(self, structured: StructuredOutputs) -> "Grammar":
        """The grammar of a form, from the cache if it is there.

        Raises RequestError when a part of it is not supported (it is never ignored), when it permits no answer,
        when it is beyond the limits of time and memory, and where llguidance is not installed.
        """
        with self._lock:
            if structured in self._cache:
                self._cache.move_to_end(structured)
                return self._cache[structured]
            if self._vocabulary is None:
                self._vocabulary = make_vocabulary(*self._arguments)
        definition = _definition(structured)
        self._trial.run(definition, structured.form)
        try:
            grammar = Grammar(definition, self._vocabulary, structured.form)
        except (Exception, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the library
            raise RequestError(f"structured_outputs.{structured.form} cannot be used: {error}") from None
        with self._lock:
            self._cache[structured] = grammar
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return grammar


class Grammar:
    """A compiled form. Made by `GrammarCompiler`; may be used by several threads."""

    def __init__(self, definition: str, vocabulary: Vocabulary, form: str) -> None:
        """Raises RequestError when the library refuses the definition, or it permits no answer."""
        self._definition = definition
        self.vocabulary = vocabulary
        self.first_W = np.zeros_like(vocabulary.text_W)  # (W,) uint32: what an answer may start with
        self._root = self._new_root()
        self._lock = threading.Lock()
        try:
            self._probe()
        except ConstraintError as e:
            raise RequestError(f"structured_outputs.{form} cannot be used: {e}") from None
        self.first_W.setflags(write=False)

    def start(self) -> "Matcher":
        """The state before the first token of an answer."""
        return Matcher(self, self._root)

    def renew(self, worn: Any) -> Any:
        """A root with an empty lexer in place of `worn`, for the answers to come too."""
        with self._lock:
            if self._root is worn:
                self._root = self._new_root()
            return self._root

    def _new_root(self) -> Any:
        """An llguidance.LLMatcher at the start; its copies share its lexer."""
        library = llguidance()
        limits = library.LLParserLimits(**LIMITS)
        return library.LLMatcher(self.vocabulary.tokens, self._definition, log_level=0, limits=limits)

    def _probe(self) -> None:
        """Makes the start of an answer: what is too complex shows after a token or two. Raises ConstraintError."""
        matcher = Matcher(self, self._root, renewable=False)
        matcher.mask(self.first_W)
        words_W = self.first_W.copy()
        for _ in range(PROBED):
            token = bits.lowest(words_W)
            if token is None or token in self.vocabulary.end_ids:
                return
            matcher.accept(token)
            matcher.mask(words_W)


class Matcher:
    """How far one answer has come in its grammar."""

    def __init__(self, grammar: Grammar, root: Any, renewable: bool = True) -> None:
        """Args: root: llguidance.LLMatcher at the start. renewable: try again once where a limit is hit."""
        self._grammar = grammar
        self._vocabulary = grammar.vocabulary
        self._root = root
        self._renewable = renewable
        self._parser = root.deep_copy()
        self._tokens: list[int] = []
        self._ended = False  # by an end-of-sequence token

    @property
    def end_W(self) -> np.ndarray:
        """End-of-sequence tokens (W,) uint32."""
        return self._vocabulary.end_W

    @property
    def may_end(self) -> bool:
        """Whether the answer so far is complete, though it may be able to go on."""
        return self._ended or (self._parser.is_accepting() and not self._parser.is_error())

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and nothing but an end-of-sequence token can follow."""
        return self._ended or (self.may_end and self._parser.is_stopped())

    def mask(self, out_W: np.ndarray) -> None:
        """Writes the tokens that may come next into `out_W` (W,) uint32, W = ceil(vocab_size / 32).

        They are tokens of text, and the end-of-sequence tokens where the answer may end; no other special token. It is
        empty for a finished answer of a model without end-of-sequence tokens. Raises ConstraintError when the grammar
        has hit a limit, or no token can go on.
        """
        out_W[:] = 0
        if not self.finished:
            words_W = np.frombuffer(self._parser.compute_bitmask(), "<u4")
            if self._parser.is_error() and self._renew():
                words_W = np.frombuffer(self._parser.compute_bitmask(), "<u4")
            self._check()
            np.bitwise_and(words_W[: len(out_W)], self._text_W, out=out_W)
        if self.may_end:
            out_W |= self._vocabulary.end_W
        elif not out_W.any():
            raise ConstraintError("the grammar permits no token of text here.")

    def accept(self, token: int) -> None:
        """Goes on by one token. Raises ConstraintError for one that was not permitted, or when a limit is hit."""
        if token in self._vocabulary.end_ids and self.may_end:
            self._ended = True
            return
        if self._ended or not bits.has(self._text_W, token):
            raise ConstraintError(f"token {token} is not permitted by the grammar here.")
        if not self._parser.consume_token(token) and not (self._renew() and self._parser.consume_token(token)):
            self._check()
            raise ConstraintError(f"token {token} is not permitted by the grammar here.")
        self._tokens.append(token)

    @property
    def _text_W(self) -> np.ndarray:
        return self._vocabulary.text_W if self._tokens else self._vocabulary.first_W

    def _renew(self) -> bool:
        """Comes to the same place with an unused lexer. Returns whether that was possible; it is so once."""
        if not self._renewable:
            return False
        self._renewable = False
        self._root = self._grammar.renew(self._root)
        self._parser = self._root.deep_copy()
        return not self._tokens or self._parser.consume_tokens(self._tokens)

    def _check(self) -> None:
        if self._parser.is_error():
            why = " ".join(self._parser.get_error().replace("<non-verbose/>", "").split())[:MAX_MESSAGE]
            raise ConstraintError(f"the grammar cannot go on: {why}")


def _definition(structured: StructuredOutputs) -> str:
    """What llguidance compiles. Raises RequestError for what is refused before that."""
    library = llguidance()
    matcher = library.LLMatcher
    if structured.json is not None or structured.json_object:
        options: dict[str, Any] = {"whitespace_flexible": not structured.disable_any_whitespace}
        if structured.whitespace_pattern is not None:
            options["whitespace_pattern"] = structured.whitespace_pattern
        text = structured.json if structured.json is not None else '{"type":"object"}'
        return matcher.grammar_from_json_schema(schema_definition(text, **options))
    if structured.regex is not None:
        check_portable(structured.regex, "structured_outputs.regex")
        ascii_classes = library.regex_to_lark(structured.regex, "dws")  # \d, \w, \s: every Unicode differs a little
        return matcher.grammar_from_lark(f"start: /{ascii_classes}/")
    if structured.choice is not None:
        # A terminal (upper case) is a regular expression, which takes many alternatives better than a rule.
        return matcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, structured.choice)))
    return matcher.grammar_from_lark("".join(_checked_lark(_as_lark(structured.grammar))))


def _as_lark(grammar: str) -> str:
    """The grammar in Lark's syntax; one without its `start:` that has GBNF's `::=` is taken for GBNF."""
    lines = [line.strip() for line in grammar.split("\n")]
    if any(re.match(r"%llguidance\b|start[ \t]*:(?!:=)", line) for line in lines) or "::=" not in grammar:
        return grammar
    n_rules = grammar.count("::=")
    if len(grammar) > MAX_GBNF_CHARS or n_rules > MAX_GBNF_RULES:
        raise RequestError(
            f"structured_outputs.grammar has {len(grammar)} characters and {n_rules} rules; as EBNF (GBNF) it can have "
            f"{MAX_GBNF_CHARS} and {MAX_GBNF_RULES}; larger ones can be written in Lark's syntax."
        )
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(grammar)
    except Exception as e:  # a parser in Python, which raises nothing narrower
        why = str(e)[:MAX_MESSAGE] or type(e).__name__
        raise RequestError(f"structured_outputs.grammar cannot be read as EBNF (GBNF): {why}.") from None


def _checked_lark(grammar: str) -> Iterator[str]:
    """The parts of the grammar, each schema after `%json` checked and with our options."""
    first, *rest = grammar.split("%json")
    yield first
    for part in rest:
        begin = len(part) - len(part.lstrip())
        try:
            schema, end = json.JSONDecoder().raw_decode(part, begin)
            text = json.dumps(schema, allow_nan=False)
        except (ValueError, RecursionError):
            raise RequestError("structured_outputs.grammar: %json must be followed by a schema, {...}.") from None
        if not isinstance(schema, dict):
            raise RequestError("structured_outputs.grammar: %json must be followed by a schema, {...}.")
        yield "%json " + schema_definition(text) + part[end:]
