"""Llama 2's tokenizer.model, a sentencepiece model, by the `sentencepiece` library."""

import enum
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..errors import TokenizerError
from .base import TokenKind
from .common import checked_id, encode_around, with_bos

SPACE = "\u2581"  # how pieces write a space

MAX_FILE_BYTES = 16 << 20  # Llama 2's has 0.5 MB
MAX_PIECE_BYTES = 1024  # sentencepiece makes none of more than 16 characters


class PieceType(enum.IntEnum):
    """What a piece is. Numbers and names are those of sentencepiece_model.proto."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """A token: its text, and how early it is put together (higher first)."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class SentencePieceModel:
    """What the package needs of a sentencepiece model. The index of a piece is its id."""

    pieces: tuple[Piece, ...]
    bos_id: int | None
    eos_id: int | None
    serialized: bytes


class Llama2Tokenizer:
    """A `Tokenizer` (see `base`, which documents the methods) from a tokenizer.model of sentencepiece.

    Ids are those of the library, which puts a space before the text; with `special`, before every part between
    special tokens, as the tokenizer.json of Llama 2 does. Text is that of the tokenizer.json: one space at the start
    is left out, and a run of byte tokens that is not valid UTF-8 becomes one U+FFFD for each byte.

    Raises TokenizerError, naming the file, when it is missing, malformed, or not made as Llama 2's is, or when
    `sentencepiece` is not installed.
    """

    def __init__(self, file: str | os.PathLike) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise TokenizerError(
                f"{file} needs the sentencepiece library; install it with: pip install 'sharded_llama[meta]'."
            ) from None
        model = read_sentencepiece(file)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model.serialized)
        except Exception as e:  # the library raises nothing narrower
            raise TokenizerError(f"{file} is not a model that the sentencepiece library can read: {e}.") from e
        pieces = model.pieces
        skipped = {PieceType.CONTROL, PieceType.UNKNOWN}
        kinds = {PieceType.BYTE: TokenKind.BYTE} | dict.fromkeys(skipped, TokenKind.SKIPPED)
        self._kinds = [kinds.get(piece.type, TokenKind.TEXT) for piece in pieces]
        self._texts = [piece.text.replace(SPACE, " ") for piece in pieces]
        self._special_ids = {piece.text: i for i, piece in enumerate(pieces) if piece.type in skipped}
        names = sorted(self._special_ids, key=len, reverse=True)  # of two that match, the longer one
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, names))})")
        self.vocab_size = len(pieces)
        self.bos_id = model.bos_id
        self.adds_bos = self.bos_id is not None

    def encode(self, text: str, bos: bool = False, special: bool = False) -> list[int]:
        pattern = self._special_pattern if special else None
        ids = encode_around(text, pattern, self._special_ids, self._processor.EncodeAsIds)
        return with_bos(ids, self.bos_id) if bos else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        parts: list[str] = []
        run = bytearray()  # of byte tokens
        for i in ids:
            kind = self.kind(i)
            if kind is TokenKind.BYTE:
                run.append(_byte(self._texts[i]))
            elif kind is TokenKind.TEXT or (not skip_special and i < self.vocab_size):
                parts += [_utf8(run), self._texts[i]]
                run.clear()
        text = "".join(parts) + _utf8(run)
        return text.removeprefix(" ")

    def kind(self, token_id: int) -> TokenKind:
        token_id = checked_id(token_id)
        return self._kinds[token_id] if token_id < self.vocab_size else TokenKind.SKIPPED


def _byte(text: str) -> int:
    return int(text[3:5], 16)


def _utf8(run: bytearray) -> str:
    try:
        return run.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(run)


def read_sentencepiece(file: str | os.PathLike) -> SentencePieceModel:
    """Reads a sentencepiece model (sentencepiece_model.proto) without the library.

    Raises TokenizerError, naming the file, when it is missing or malformed, or is not made as Llama 2's is: byte
    pair encoding with a token for every byte, text taken as it is but for a space put before it.
    """
    try:
        with open(file, "rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as e:
        raise TokenizerError(f"{file} cannot be read: {e}.") from e
    try:
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"it is larger than {MAX_FILE_BYTES >> 20} MiB")
        return _parse_model(content)
    except ValueError as e:  # among them UnicodeDecodeError
        raise TokenizerError(f"{file} is not a sentencepiece model as Llama 2's: {e}.") from e


def _parse_model(content: bytes) -> SentencePieceModel:
    """Numbers are those of the fields in sentencepiece_model.proto. Raises ValueError."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(content):
        if number == 1:
            pieces.append(_piece(value, len(pieces)))
        elif number == 2:
            trainer.update(_fields(value))
        elif number == 3:
            normalizer.update(_fields(value))

    if trainer.get(3, 1) != 2:
        raise ValueError("its model_type is not BPE")
    byte_texts = [piece.text for piece in pieces if piece.type is PieceType.BYTE]
    if trainer.get(35, 0) != 1 or sorted(byte_texts) != [f"<0x{byte:02X}>" for byte in range(256)]:
        raise ValueError("it has no byte_fallback with a piece for every byte")
    if normalizer.get(2, b"") or normalizer.get(3, 1) != 1 or normalizer.get(4, 1) != 0 or normalizer.get(5, 1) != 1:
        raise ValueError(
            "its normalizer changes text; expected the identity with add_dummy_prefix and escape_whitespaces and "
            "without remove_extra_whitespaces"
        )
    if len({piece.text for piece in pieces}) != len(pieces):
        raise ValueError("two of its pieces have the same text")
    if sum(piece.type is PieceType.UNKNOWN for piece in pieces) != 1:
        raise ValueError("it does not have exactly one unknown piece")
    bos_id = _control_id(trainer.get(41, 1), pieces, "bos_id")
    eos_id = _control_id(trainer.get(42, 2), pieces, "eos_id")
    return SentencePieceModel(tuple(pieces), bos_id, eos_id, content)


def _piece(value: int | bytes, index: int) -> Piece:
    fields = dict(_fields(value))
    text, score, kind = fields.get(1, b""), fields.get(2, bytes(4)), fields.get(3, PieceType.NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4 or kind not in list(PieceType):
        raise ValueError(f"piece {index} is malformed")
    if not 0 < len(text) <= MAX_PIECE_BYTES:
        raise ValueError(f"piece {index} has {len(text)} bytes; expected 1 to {MAX_PIECE_BYTES}")
    return Piece(text.decode(), struct.unpack("<f", score)[0], PieceType(kind))


def _control_id(value: int | bytes, pieces: list[Piece], name: str) -> int | None:
    """The id in a field of trainer_spec: None for -1, which says that there is no such token."""
    if value == 2**64 - 1:
        return None
    if not isinstance(value, int) or value >= len(pieces) or pieces[value].type is not PieceType.CONTROL:
        raise ValueError(f"its {name} is not that of a control piece")
    return value


def _fields(content: int | bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protobuf message: whole numbers as such, everything else as its bytes.

    Wire format: https://protobuf.dev/programming-guides/encoding. Raises ValueError when it is malformed.
    """
    if not isinstance(content, bytes):
        raise ValueError("a number stands where a message is expected")
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(content, at)
        else:
            if wire == 2:
                size, at = _varint(content, at)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                raise ValueError(f"byte {at} begins no protobuf field")
            if size > len(content) - at:
                raise ValueError(f"it ends within a field of {size} bytes; is the file complete?")
            value = content[at : at + size]
            at += size
        yield tag >> 3, value


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """The number that begins at byte `at`, and where the next byte is."""
    value = 0
    for i, byte in enumerate(content[at : at + 10]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    raise ValueError("it ends within a number; is the file complete?")
