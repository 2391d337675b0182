"""Text of a token stream, piece by piece as the tokens come.

Decoding tokens one at a time would be wrong: a character may be spread over several tokens, and decoders strip the
space before the first one. Decoding everything each time would cost quadratic time. So, as in vLLM and Hugging
Face TGI, the new tokens are decoded together with a few before them, and what those alone give is cut off.
"""

import functools
from collections.abc import Iterable

from .base import Tokenizer, TokenKind

# Tokens of context before the new ones. One is enough for stripped spaces. UTF-8 needs four bytes: after at most
# three that continue a character begun earlier, decoding is in step again, however little of it was valid.
CONTEXT = 4

REPLACEMENT = "\ufffd"


class StreamDecoder:
    """Turns the tokens of one sequence into text, never returning half a character.

    What `push` returned and then `flush`, put together, is exactly `tokenizer.decode` of all ids, special tokens left
    out or written out. Time is linear in the number of tokens.

    Text is held back while it may still change: a U+FFFD at the end, which can be the beginning of a character,
    until the next token; and byte-fallback tokens, until one that is not.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decode_ids = tokenizer.decode if skip_special else functools.partial(tokenizer.decode, skip_special=False)
        self._context: list[int] = []  # the last tokens that were read
        self._unread: list[int] = []  # byte tokens whose run is still open

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is final now that these tokens have come; often empty.

        Raises TokenizerError for what is not a token id.
        """
        settled = 0
        for token_id in token_ids:
            kind = self._kind(token_id)
            if kind is not TokenKind.SKIPPED:
                self._unread.append(token_id)
            if kind is TokenKind.TEXT:
                settled = len(self._unread)
        if not settled:
            return ""
        new, self._unread = self._unread[:settled], self._unread[settled:]
        seen = len(_final(self._decode(self._context)))
        text = self._decode(self._context + new)
        self._context = (self._context + new)[-CONTEXT:]
        return _final(text)[seen:]

    def flush(self) -> str:
        """The rest of the text. The sequence is over: push no more."""
        seen = len(_final(self._decode(self._context)))
        return self._decode(self._context + self._unread)[seen:]

    def _kind(self, token_id: int) -> TokenKind:
        kind = self._tokenizer.kind(token_id)
        if kind is TokenKind.SKIPPED and not self._skip_special and self._decode_ids([token_id]):
            return TokenKind.TEXT  # a special token, which is written out
        return kind

    def _decode(self, ids: list[int]) -> str:
        return self._decode_ids(ids) if ids else ""


def _final(text: str) -> str:
    """`text` without the one character at its end that more bytes could complete."""
    return text[:-1] if text.endswith(REPLACEMENT) else text
