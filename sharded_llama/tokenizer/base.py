"""What the rest of the package needs of a tokenizer, whatever file it was read from."""

import enum
from collections.abc import Iterable
from typing import Protocol


class TokenKind(enum.Enum):
    """What decoding makes of a token, as far as streaming has to know."""

    TEXT = enum.auto()  # at least one byte of text of its own
    BYTE = enum.auto()  # a byte whose text depends on the run of such tokens that it stands in
    SKIPPED = enum.auto()  # nothing: special, or an id that the tokenizer does not have


class Tokenizer(Protocol):
    """Text to token ids and back. Instances are immutable and may be shared by threads."""

    bos_id: int | None  # the id that starts a sequence, None when there is none
    adds_bos: bool  # whether a plain prompt starts with bos_id, as the checkpoint's makers intend
    vocab_size: int  # highest id + 1; the model's vocabulary may be padded beyond it

    def encode(self, text: str, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
            text: any Unicode text without lone surrogates.
            bos: start with `bos_id`, which is not doubled when `special` text starts with it already.
            special: recognise special tokens written in the text, as chat templates need. Otherwise they are
                encoded as the plain text they are, as text of a user must be.

        Raises RequestError when `text` is not such text; TokenizerError for `bos` without a `bos_id`.
        """
        ...

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`, special tokens left out or written out; what is no valid UTF-8 becomes U+FFFD.

        An id that the tokenizer does not have decodes to nothing: the model's vocabulary may be padded. Raises
        TokenizerError, naming it, for what is no id at all (negative, beyond 32 bits, not a whole number).
        """
        ...

    def kind(self, token_id: int) -> TokenKind:
        """What `decode` with special tokens left out makes of the token. Raises TokenizerError as `decode` does."""
        ...
