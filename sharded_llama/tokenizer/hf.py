"""Hugging Face tokenizer.json, by the `tokenizers` library."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import RequestError, TokenizerError
from ..json_file import read_json_object
from .base import TokenKind
from .common import checked_id, why_not_text, with_bos


class HFTokenizer:
    """A `Tokenizer` (see `base`, which documents the methods) from `tokenizer.json` and `tokenizer_config.json`.

    `bos_id` is what the file's own post-processor puts before a text, else the `bos_token` of
    tokenizer_config.json. `adds_bos` is whether the post-processor does so, as in transformers 5, which ignores
    `add_bos_token` beside a tokenizer.json; only when there is no post-processor at all does that field decide, as
    in transformers 4. The post-processor is never run otherwise, so that BOS is added once or not at all.

    Ids and text are those of transformers. In particular a run of byte-fallback tokens (`<0xE2>`) is decoded as
    a whole: if it is not valid UTF-8, each of its bytes becomes U+FFFD.

    Raises TokenizerError, naming the file, when one of the two is missing or malformed.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        file = Path(folder) / "tokenizer.json"
        config_file = file.with_name("tokenizer_config.json")
        config = read_json_object(config_file, TokenizerError) if config_file.exists() else {}
        # Two instances, because recognising special tokens is a setting of the instance, not of the call.
        self._special = load_library_tokenizer(file)
        self._plain = _twin(self._special) or load_library_tokenizer(file)
        self._plain.encode_special_tokens = True

        added = self._special.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._byte_ids = _byte_ids(self._special)
        self.vocab_size = max(self._special.get_vocab().values(), default=-1) + 1

        self.bos_id = _leading_special_id(self._special)
        self.adds_bos = self.bos_id is not None
        if self.bos_id is None:
            self.bos_id = _token_id(self._special, config.get("bos_token"), config_file)
            has_post_processor = self._special.post_processor is not None
            self.adds_bos = self.bos_id is not None and not has_post_processor and config.get("add_bos_token") is True

    def encode(self, text: str, bos: bool = False, special: bool = False) -> list[int]:
        tokenizer = self._special if special else self._plain
        try:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise RequestError(why_not_text(text)) from None
        return with_bos(ids, self.bos_id) if bos else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return self._special.decode([checked_id(i) for i in ids], skip_special_tokens=skip_special)

    def kind(self, token_id: int) -> TokenKind:
        token_id = checked_id(token_id)
        if token_id in self._byte_ids:
            return TokenKind.BYTE
        if token_id in self._special_ids or self._special.id_to_token(token_id) is None:
            return TokenKind.SKIPPED
        return TokenKind.TEXT


def load_library_tokenizer(file: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises nothing narrower
        raise TokenizerError(f"{file} is not a tokenizer that the tokenizers library can read: {e}.") from e
    # Files saved while training often carry these: they would cut or lengthen prompts silently.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _twin(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer | None:
    """A second instance that shares the vocabulary: reading Llama 3's again takes a second and 100 MB.

    None when the added tokens do not get their ids again, which follow from their order in every known file.
    """
    twin = tokenizers.Tokenizer(tokenizer.model)
    twin.normalizer = tokenizer.normalizer
    twin.pre_tokenizer = tokenizer.pre_tokenizer
    added = tokenizer.get_added_tokens_decoder()
    twin.add_tokens([added[i] for i in sorted(added)])
    return twin if twin.get_added_tokens_decoder() == added else None


def _leading_special_id(tokenizer: tokenizers.Tokenizer) -> int | None:
    """The id that the post-processor puts before a text, None if it puts none there."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    return encoding.ids[0] if encoding.ids and encoding.special_tokens_mask[0] else None


def _token_id(tokenizer: tokenizers.Tokenizer, token: Any, file: Path) -> int | None:
    """Id of a token as tokenizer_config.json writes it: null, a string, or an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return None
    token_id = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if token_id is None:
        raise TokenizerError(f"{file}: bos_token={token!r} is not a token of the tokenizer.json beside it.")
    return token_id


def _byte_ids(tokenizer: tokenizers.Tokenizer) -> frozenset[int]:
    """The ids of `<0x00>` to `<0xFF>` when the decoder takes them for bytes."""
    if tokenizer.decoder is None or tokenizer.decoder.decode(["<0x61>"]) != "a":
        return frozenset()
    ids = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(i for i in ids if i is not None)
