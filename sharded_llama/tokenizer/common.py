"""What the tokenizers share: checks of text and ids, special tokens in a text, and the one before it."""

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import RequestError, TokenizerError

MAX_ID = 2**32 - 1  # what the tokenizers library can hold


def encode_around(
    text: str, pattern: re.Pattern[str] | None, special_ids: Mapping[str, int], encode: Callable[[str], list[int]]
) -> list[int]:
    """Ids of `text`: `special_ids` of what `pattern` (with one group around it all) matches, `encode` between.

    None for `pattern`: all of it is plain text. Raises RequestError when `text` is no text that can be encoded.
    """
    try:
        text.encode()
    except (AttributeError, UnicodeEncodeError):
        raise RequestError(why_not_text(text)) from None
    ids: list[int] = []
    for i, part in enumerate(pattern.split(text) if pattern else [text]):
        ids += [special_ids[part]] if i % 2 else encode(part)
    return ids


def with_bos(ids: list[int], bos_id: int | None) -> list[int]:
    """`ids` after `bos_id`, which is not doubled. Raises TokenizerError when there is none."""
    if bos_id is None:
        raise TokenizerError("bos=True, but this tokenizer has no beginning-of-sequence token.")
    # Only text with special tokens can start with it: plain text never encodes to it.
    return ids if ids[:1] == [bos_id] else [bos_id, *ids]


def checked_id(token_id: Any) -> int:
    """`token_id` as an int. Raises TokenizerError for what is no id at all."""
    try:
        checked = operator.index(token_id)
    except TypeError:
        raise TokenizerError(f"{token_id!r} is not a token id: expected a whole number.") from None
    if not 0 <= checked <= MAX_ID:
        raise TokenizerError(f"{checked} is not a token id: expected 0..{MAX_ID}.")
    return checked


def why_not_text(text: Any) -> str:
    """What is wrong with a text that cannot be encoded."""
    if not isinstance(text, str):
        return f"the text to encode must be a string, not {type(text).__name__}."
    at = next(i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff")
    return (
        f"the text has half a character (the surrogate U+{ord(text[at]):04X}) at index {at}: it is not valid Unicode."
    )
