"""Llama 3's tokenizer.model as Meta publishes it, by the `tiktoken` library."""

import base64
import binascii
import os
import re
from collections.abc import Iterable, Iterator

from ..errors import TokenizerError
from .base import TokenKind
from .common import checked_id, encode_around, with_bos

# How text is split before byte pair encoding, in Meta's tokenizer.py and in the tokenizer.json of Llama 3.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# In the order of their ids, which follow the ranks. These are the names in the tokenizer.json of Llama 3.1 to 3.3.
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
)
BOS = SPECIAL_TOKENS[0]
EOS = SPECIAL_TOKENS[1]

MAX_FILE_BYTES = 16 << 20  # Llama 3's has 2 MB
MAX_TOKEN_BYTES = 1024  # Llama 3's longest has 128

# The library's regular expressions run out of stack in a run of about a million spaces. Meta's tokenizer cuts
# after as many.
MAX_SPACES = 25_000
_LONG_SPACES = re.compile(rf"(?<!\s)\s{{{MAX_SPACES + 1},}}")


class Llama3Tokenizer:
    """A `Tokenizer` (see `base`, which documents the methods) from a tokenizer.model of tiktoken ranks.

    The file holds no special tokens. They have the ids after the ranks and the names in the tokenizer.json of
    Llama 3.1, so that chat templates give the same ids from either file. Meta's own code calls 128005
    `<|step_id|>` instead of `<|reserved_special_token_2|>` and counts the reserved ones after it one lower.

    Ids are those of the tokenizer.json, but for a run of more than 25,000 white-space characters, which is encoded
    in pieces of that length, as Meta does. Meta's tokenizer also cuts other runs of that length, and every text
    after 400,000 characters; this one need not. Time grows a little faster than linearly with the longest word.

    Raises TokenizerError, naming file and line, when the file is missing or malformed, or `tiktoken` is not
    installed.
    """

    def __init__(self, file: str | os.PathLike) -> None:
        try:
            import tiktoken
        except ImportError:
            raise TokenizerError(
                f"{file} needs the tiktoken library; install it with: pip install 'sharded_llama[meta]'."
            ) from None
        ranks = read_ranks(file)
        self._encoding = tiktoken.Encoding("llama3", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
        self._special_ids = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, SPECIAL_TOKENS))})")
        self._first_special = len(ranks)
        self._bytes = [*ranks, *(name.encode() for name in SPECIAL_TOKENS)]  # of every id
        self.vocab_size = len(self._bytes)
        self.bos_id = self._special_ids[BOS]
        self.adds_bos = True

    def encode(self, text: str, bos: bool = False, special: bool = False) -> list[int]:
        pattern = self._special_pattern if special else None
        ids = encode_around(text, pattern, self._special_ids, self._encode_plain)
        return with_bos(ids, self.bos_id) if bos else ids

    def _encode_plain(self, text: str) -> list[int]:
        return [token for piece in _cut(text) for token in self._encoding.encode_ordinary(piece)]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        stop = self._first_special if skip_special else self.vocab_size
        return b"".join(self._bytes[i] for i in map(checked_id, ids) if i < stop).decode(errors="replace")

    def kind(self, token_id: int) -> TokenKind:
        return TokenKind.TEXT if checked_id(token_id) < self._first_special else TokenKind.SKIPPED


def read_ranks(file: str | os.PathLike) -> dict[bytes, int]:
    """Token -> rank, in the order of the ranks, from a file of lines `<base64 of the token> <rank>`.

    Raises TokenizerError, naming file and line, unless the ranks count up from 0, no token comes twice, and every
    single byte is a token.
    """
    try:
        with open(file, "rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as e:
        raise TokenizerError(f"{file} cannot be read: {e}.") from e
    if len(content) > MAX_FILE_BYTES:
        raise TokenizerError(f"{file} is larger than {MAX_FILE_BYTES >> 20} MiB: it is no file of tiktoken ranks.")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        token = _token(line, len(ranks))
        if token is None or token in ranks:
            shown = line if len(line) <= 40 else line[:40] + b"..."
            problem = "is not" if token is None else "repeats a token; expected"
            raise TokenizerError(
                f"{file}, line {number}: {shown!r} {problem} the base64 of a new token of at most {MAX_TOKEN_BYTES} "
                f"bytes, a space, and the rank {len(ranks)}."
            )
        ranks[token] = len(ranks)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(
            f"{file}: {len(missing)} of the 256 single bytes have no rank, the first is 0x{missing[0]:02X}; "
            "is the file complete?"
        )
    return ranks


def _token(line: bytes, rank: int) -> bytes | None:
    """The token of a line that has this rank, None when it is malformed."""
    encoded, _, number = line.partition(b" ")
    if number != b"%d" % rank or len(encoded) > 2 * MAX_TOKEN_BYTES:
        return None
    try:
        token = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        return None
    return token if 0 < len(token) <= MAX_TOKEN_BYTES else None


def _cut(text: str) -> Iterator[str]:
    """The text in pieces, none with more than MAX_SPACES white-space characters in a row."""
    start = 0
    for run in _LONG_SPACES.finditer(text):
        for stop in range(run.start() + MAX_SPACES, run.end(), MAX_SPACES):
            yield text[start:stop]
            start = stop
    yield text[start:]
