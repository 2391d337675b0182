"""Regular expressions that mean the same wherever they are read.

The parser behind the grammars reads Rust's syntax. A JSON schema means that of ECMAScript, and users think in Python's.
They differ in little, and what differs is refused rather than taken for something else.
"""

import re

from ..errors import RequestError

# After a backslash: classes, control characters, code points, punctuation. Not \< and \>, which are ends of words in
# Rust, nor letters that only one of the languages knows. \b and \B are look-around, refused later.
_ESCAPE = r"\\(?:[dDwWsSnrtfvbB]|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[pP]\{[A-Za-z0-9_=]+\}|[!-/:;=?@\[-`{-~])"
_GROUP = r"\((?:\?(?::|P?<[A-Za-z_]\w*>|[is]{1,2}[:)]))?(?!\?)"
# In a class, an opening bracket and doubled operators make nested classes and set operations in Rust.
_CLASS = rf"\[\^?(?:{_ESCAPE}|(?!&&|--|~~)[^\]\[\\])+\]"
_REPEAT = r"(?:[*+?]|\{\d+(?:,\d*)?\})(?!\+)"  # in Python, one more + would make it possessive
_PORTABLE = re.compile(rf"(?:{_ESCAPE}|{_GROUP}|{_CLASS}|{_REPEAT}|[^\\\[\]{{}}()*+?]|\))*+", re.ASCII)

# Characters that JSON writes only as \uXXXX, raw or escaped.
UNWRITABLE = r"[\x00-\x07\x0b\x0e-\x1f\x7f]"
_UNWRITABLE_CODE = rf"(?:{UNWRITABLE}|\\v|\\(?:x|u00)(?:0[0-7BbEeFf]|1[0-9A-Fa-f]|7[Ff]))"
_NEGATED_CLASS = re.compile(rf"\[\^(?:{_ESCAPE}|[^\]\[\\])+\]")
_RANGE = re.compile(rf"({_UNWRITABLE_CODE})-(?!\1)(?:{_ESCAPE}|[^\]\[\\])")


def check_portable(pattern: str, where: str) -> None:
    """Raises RequestError, naming `where`, unless `pattern` means the same in Rust, ECMAScript and Python."""
    end = _PORTABLE.match(pattern).end()
    if end < len(pattern):
        raise RequestError(
            f"{where}: {pattern[end : end + 20]!r} at character {end} of the regular expression has no meaning that "
            "all engines share; write literal brackets and braces as \\[ \\] \\{ \\}, and use no look-around, "
            "back-references, set operations in classes, or flags but i and s."
        )


def check_writable(pattern: str, where: str) -> None:
    """Raises RequestError if a JSON string that matches `pattern` needs a character that only \\uXXXX can write.

    That escape is never permitted. The library takes such a character for nothing at all: 'a\\x01b' would match 'ab'.
    As one of many, in a range or as what a class leaves out, it is simply never chosen.
    """
    rest = _RANGE.sub("", _NEGATED_CLASS.sub("", pattern))
    if re.search(_UNWRITABLE_CODE, rest):
        raise RequestError(f"{where}: a regular expression cannot ask for a control character in a JSON string.")
