"""Our tokenizers as the parser behind the grammars needs them."""

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ..errors import RequestError
from ..tokenizer import Tokenizer, TokenKind
from ..tokenizer.hf import HFTokenizer
from ..tokenizer.llama2 import Llama2Tokenizer
from ..tokenizer.llama3 import Llama3Tokenizer
from . import bits


class Vocabulary(NamedTuple):
    """A tokenizer's tokens, and which of them a grammar may use. Words are those of `bits`."""

    tokens: Any  # llguidance.LLTokenizer
    text_W: np.ndarray  # tokens that are text: not special, within the model's vocabulary
    first_W: np.ndarray  # of them, those that an answer can start with
    end_W: np.ndarray  # end-of-sequence tokens
    end_ids: frozenset[int]


def llguidance() -> ModuleType:
    """The library. Raises RequestError, naming the extra, where it is not installed."""
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise RequestError(
            "structured_outputs need the llguidance library; install it with: pip install 'sharded-llama[structured]'."
        ) from None


def make_vocabulary(tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]) -> Vocabulary:
    """Takes about a second for 128,000 tokens.

    Raises RequestError for a tokenizer of another kind than `load_tokenizer` returns, or without the library.
    """
    library = llguidance()
    table = _token_bytes(library, tokenizer)
    special = [i for i in range(len(table)) if tokenizer.kind(i) is TokenKind.SKIPPED]
    for i in special:
        table[i] = b""  # a grammar that names a special token is refused, as it could not have it
    # The parser is told of an end-of-sequence token that nobody has: where an answer may end is asked for instead,
    # so that any number of such tokens, none too, are treated alike.
    table += [b""] * (vocab_size - len(table)) + [b"<end>"]
    tokens = library.LLTokenizer(library.TokenizerWrapper(_Table(table, [*special, len(table) - 1], tokenizer)))
    text_V = np.zeros(vocab_size, bool)
    text_V[: tokenizer.vocab_size] = True
    text_V[[i for i in (*special, *eos_ids) if 0 <= i < vocab_size]] = False
    first_V = text_V.copy()
    first_V[_lost_spaces(tokenizer, table, text_V)] = False
    ends = [i for i in eos_ids if 0 <= i < vocab_size]
    return Vocabulary(
        tokens, bits.of_flags(text_V), bits.of_flags(first_V), bits.of_ids(ends, vocab_size), frozenset(ends)
    )


def _token_bytes(library: ModuleType, tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of every token of text; what special ones have is not used."""
    if isinstance(tokenizer, HFTokenizer):
        # The library knows what bytes the decoders of tokenizer.json make of each token. The id is any that there is.
        known = library.LLTokenizer(tokenizer._special.to_str(), eos_token=0, slices=[])
        # It takes the byte 0xFF, which no text has, for special too; the names of such tokens must not become text.
        ids = range(tokenizer.vocab_size)
        return [b"" if known.is_special_token(i) else known.decode_bytes([i]) for i in ids]
    if isinstance(tokenizer, Llama3Tokenizer):
        return list(tokenizer._bytes)
    if isinstance(tokenizer, Llama2Tokenizer):
        tokens = zip(tokenizer._kinds, tokenizer._texts, strict=True)
        return [bytes([int(text[3:5], 16)]) if kind is TokenKind.BYTE else text.encode() for kind, text in tokens]
    raise RequestError(f"structured_outputs cannot be used with a {type(tokenizer).__name__}.")


class _Table:
    """A vocabulary by the names that llguidance.TokenizerWrapper reads.

    Called with a text that a grammar leaves no choice about, it gives the tokens to use for it.
    """

    def __init__(self, tokens: list[bytes], special: list[int], tokenizer: Tokenizer) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = len(tokens) - 1
        self.bos_token_id = tokenizer.bos_id
        self._tokenizer = tokenizer
        self._ids = {token: i for i, token in enumerate(tokens[:-1]) if token}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text)
        # Llama 2's puts a space before the text, which the grammar would not permit.
        return ids if b"".join(self.tokens[i] for i in ids) == text.encode() else self._greedy(text.encode())

    def _greedy(self, text: bytes) -> list[int]:
        """The longest token that fits, again and again, up to a byte that no token has."""
        ids: list[int] = []
        while text:
            fits = (self._ids.get(text[:n]) for n in range(min(len(text), self._longest), 0, -1))
            token = next((i for i in fits if i is not None), None)
            if token is None:
                break
            ids.append(token)
            text = text[len(self.tokens[token]) :]
        return ids


def _lost_spaces(tokenizer: Tokenizer, table: list[bytes], text_V: np.ndarray) -> list[int]:
    """Tokens that start with a space which decoding leaves out at the start of an answer, as Llama 2's does.

    The grammar would count the space, and the answer would not have it.
    """
    spaced = [int(i) for i in np.flatnonzero(text_V) if table[i].startswith(b" ")]
    return spaced if spaced and not tokenizer.decode(spaced[:1]).startswith(" ") else []
