"""Which special tokens of a rendered text are the template's, and which the caller wrote.

A template is a program, so its output does not tell. The messages are therefore rendered twice: as they are, and with
characters of the caller's strings replaced one by one by marks, private-use characters that occur nowhere in the
messages or in the first text. If the second text is the first one when the marks are replaced back, then special
tokens in the second text are the template's, and others in the first are the caller's. Templates that look at a text
or rewrite it may take another way for a marked one; then fewer characters are marked. If no way of marking is
understood, the request is refused.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..base import Tokenizer, TokenKind

MARKS = [chr(i) for i in range(0xE000, 0xF900)]  # the private-use area
MAX_MARKED = 1000  # different characters


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer, and what rendering needs to know of them; made by `of`."""

    ids: Mapping[str, int]  # by their texts
    pattern: re.Pattern[str]  # matches any of them; of two that match, the longer one
    names: frozenset[str]  # without signs around them: eot_id of <|eot_id|>
    ways: tuple[frozenset[str], ...]  # which characters to mark: the first way that works is taken

    @staticmethod
    def of(ids: Mapping[str, int]) -> "SpecialTokens":
        """Those with these ids, by their texts."""
        pattern = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
        names = frozenset(re.sub(r"^\W+|\W+$", "", text) for text in ids)
        return SpecialTokens(dict(ids), re.compile(pattern or "(?!)"), names, tuple(_ways_to_mark(ids)))


class Piece(NamedTuple):
    """A part of a rendered chat."""

    text: str
    special: bool  # whether special tokens written in it are the template's, and are to be recognised


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """The tokenizer's special tokens. Goes through the whole vocabulary: 0.1 s for Llama 3's."""
    tokens = {}
    for i in range(tokenizer.vocab_size):
        if tokenizer.kind(i) is TokenKind.SKIPPED:
            text = tokenizer.decode([i], skip_special=False)
            if text and i in tokenizer.encode(text, special=True):
                tokens[text] = i
    return SpecialTokens.of(tokens)


def _ways_to_mark(special: Collection[str]) -> Iterator[frozenset[str]]:
    """Which characters to mark, from all that can be to the fewest that are part of every special token.

    Never white space, which templates trim, nor quotes and backslashes, which `tojson` escapes, unless a special token
    has them.
    """
    letters = frozenset("".join(special)) - set(" \t\r\n")
    yield letters | {chr(i) for i in range(0x21, 0x7F)} - set("\"'\\")
    signs = frozenset(c for c in letters if not c.isalnum())
    yield signs
    few, left = frozenset(), [token for token in special if token.strip(" \t\r\n")]
    while left:
        # Of equal ones, one that ordinary text and the logic of templates have less often.
        usual = "</>_-.\"'\\"
        choice = sorted(signs & set("".join(left))) or sorted(letters & set("".join(left)))
        few |= {max(choice, key=lambda c: (sum(c in token for token in left), c not in usual))}
        left = [token for token in left if not few & set(token)]
    yield few


def free_marks(used: Collection[str]) -> list[str]:
    """The characters that may be marks: those that are not in `used`."""
    return [c for c in MARKS if c not in used][:MAX_MARKED]


def with_marks(chat: dict[str, Any], marks: Mapping[str, str], names: Collection[str]) -> dict[str, Any]:
    """The chat with marks for characters, but not in words that templates ask for: roles, types, names of fields."""
    table = str.maketrans(dict(marks))

    def word(text: str) -> str:
        return text if text.isidentifier() and text not in names else text.translate(table)

    def mark(value: Any, name: str = "") -> Any:
        if isinstance(value, str):
            return word(value) if name == "type" else value.translate(table)
        if isinstance(value, dict):
            return {word(key): mark(item, key) for key, item in value.items()}
        return [mark(item) for item in value] if isinstance(value, list) else value

    messages = [mark(message) | {"role": message["role"]} for message in chat["messages"]]
    rest = {name: mark(value) for name, value in chat.items() if name != "messages"}
    return rest | {"messages": messages}


def cut_pieces(text: str, marked: str, pattern: re.Pattern[str]) -> tuple[Piece, ...]:
    """Cuts out what lies between two special tokens of the template and is spelled like one."""
    pieces, start, at = [], 0, 0  # text[start:at] needs no cut
    for stop, after in [*(m.span() for m in pattern.finditer(marked)), (len(text), len(text))]:
        if pattern.search(text, at, stop):
            pieces += [Piece(text[start:at], True), Piece(text[at:stop], False)]
            start = stop
        at = after
    pieces.append(Piece(text[start:], True))
    return tuple(piece for piece in pieces if piece.text)
