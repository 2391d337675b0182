"""Streaming: the pieces put together are the whole, no piece holds half a character, and the cost is linear."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sharded_llama.errors import TokenizerError
from sharded_llama.tokenizer import StreamDecoder, load_tokenizer

PROPERTY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

TEXT = "Hello wörld! 你好,世界。 e\u0301 😀👩‍👩‍👧🇩🇪\n\n  two spaces, \ufffd, 안녕 <s> </s> end "


def stream(tokenizer, chunks) -> list[str]:
    """What each push returns, then what flush returns."""
    decoder = StreamDecoder(tokenizer)
    return [decoder.push(chunk) for chunk in chunks] + [decoder.flush()]


def one_by_one(ids) -> list[list[int]]:
    return [[i] for i in ids]


@pytest.fixture(scope="session")
def fragments(tmp_path_factory):
    """A byte-level tokenizer of all bytes and of fragments that begin and end within characters."""
    parts = [
        b"\xe2\x82",
        b"\x82\xac",
        b"\xac\xe2",
        b"\x82\xac\xe2",
        b"\xf0\x9f",
        b"\x98\x80",
        b"\x80a",
        b"a\xf0\x9f\x98",
    ]
    parts += ["€".encode(), "😀".encode(), "�".encode(), b"hello", b"\xff\xff"]
    parts = [bytes([b]) for b in range(256)] + parts
    symbols = byte_symbols()
    backend = Tokenizer(models.BPE(vocab={"".join(symbols[b] for b in p): i for i, p in enumerate(parts)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("fragments")
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder), parts


def byte_symbols() -> dict[int, str]:
    """The letter by which byte-level tokenizers write each byte (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    symbols = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    assert set(symbols.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return symbols


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_pieces_are_the_whole_text(folder, size):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(TEXT, bos=True)
    pieces = stream(tokenizer, batched(ids, size))
    assert "".join(pieces) == TEXT


def batched(ids, size):
    """itertools.batched, which Python 3.11 lacks."""
    return [ids[i : i + size] for i in range(0, len(ids), size)]


@pytest.mark.parametrize("text", ["€", "😀", "a😀b", "你好", "👩‍👩‍👧", "e\u0301", "é", "안녕"])
def test_never_half_a_character(folder, text):
    tokenizer = load_tokenizer(folder)
    pieces = stream(tokenizer, one_by_one(tokenizer.encode(text)))
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text


def test_a_complete_character_comes_at_once(fragments):
    tokenizer, _ = fragments
    assert stream(tokenizer, one_by_one("a€😀".encode())) == ["a", "", "", "€", "", "", "", "😀", ""]


def test_text_waits_for_one_token_at_most_when_bytes_are_invalid(fragments):
    tokenizer, _ = fragments
    assert stream(tokenizer, one_by_one(b"\xff\xff\x80a")) == ["", "\ufffd", "\ufffd", "\ufffda", ""]


def test_a_truncated_character_is_flushed(fragments):
    tokenizer, _ = fragments
    assert stream(tokenizer, one_by_one("a😀".encode()[:-1])) == ["a", "", "", "", "\ufffd"]


def test_byte_fallback_waits_for_the_end_of_the_run(llama2_folder):
    tokenizer = load_tokenizer(llama2_folder)
    byte = {b: 3 + b for b in range(256)}
    (letter,) = tokenizer.encode("€a")[-1:]  # without a space before it, which a merge may have taken in
    euro = [byte[b] for b in "€".encode()]
    assert stream(tokenizer, one_by_one([*euro, letter])) == ["", "", "", "€" + tokenizer.decode([letter]), ""]
    assert stream(tokenizer, one_by_one(euro)) == ["", "", "", "€"]
    # The run is decoded as a whole: had the character gone out early, it could not be taken back. A special token
    # in between is left out before decoding, and so does not end the run.
    broken = [*euro, 1, byte[0xFF], letter]
    assert tokenizer.decode(broken).startswith("\ufffd" * 4)
    assert "".join(stream(tokenizer, one_by_one(broken))) == tokenizer.decode(broken)


def test_spaces_at_the_start(llama2_folder):
    tokenizer = load_tokenizer(llama2_folder)
    for text in ("hello world", " hello", "   hello  world ", " ", "  "):
        for bos in (False, True):
            pieces = stream(tokenizer, one_by_one(tokenizer.encode(text, bos=bos)))
            assert "".join(pieces) == text


def test_nothing(folder):
    tokenizer = load_tokenizer(folder)
    assert stream(tokenizer, []) == [""]
    assert stream(tokenizer, [[], []]) == ["", "", ""]
    assert stream(tokenizer, [[tokenizer.bos_id]]) == ["", ""]


def test_what_is_no_id(folder):
    with pytest.raises(TokenizerError, match="-1"):
        StreamDecoder(load_tokenizer(folder)).push([-1])


def check_invariant(tokenizer, chunks) -> None:
    whole = tokenizer.decode(list(itertools.chain(*chunks)))
    assert "".join(stream(tokenizer, chunks)) == whole


def chunked(ids: st.SearchStrategy[int]) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(ids, max_size=6), max_size=20)


@PROPERTY
@given(data=st.data())
def test_any_ids(folder, data):
    tokenizer = tokenizers(folder)
    special = st.sampled_from([0, 1, 2, tokenizer.vocab_size - 1, tokenizer.bos_id, tokenizer.vocab_size + 7])
    byte = st.integers(3, 258)
    anything = st.integers(0, tokenizer.vocab_size - 1)
    check_invariant(tokenizer, data.draw(chunked(st.one_of(anything, byte, special))))


@PROPERTY
@given(text=st.text(max_size=40), size=st.integers(1, 5))
def test_any_text(folder, text, size):
    tokenizer = tokenizers(folder)
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, batched(ids, size))
    if "llama2" in folder.name:  # sentencepiece writes spaces as U+2581, so that both come back as a space
        text = text.replace("\u2581", " ")
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert text.count("\ufffd") == "".join(pieces).count("\ufffd")


@PROPERTY
@given(data=st.data())
def test_any_bytes(fragments, data):
    tokenizer, parts = fragments
    # Mostly bytes of multi-byte characters, whole, cut and shuffled.
    rest = st.integers(256, len(parts) - 1)
    byte = st.sampled_from(b"a\x80\x82\xac\xe2\xf0\x9f\x98\xed\xa0\xc0\xff\xc3\xa9")
    chunks = data.draw(chunked(st.one_of(rest, byte)))
    check_invariant(tokenizer, chunks)
    raw = b"".join(parts[i] for i in itertools.chain(*chunks))
    assert "".join(stream(tokenizer, chunks)) == raw.decode("utf-8", "replace")


_loaded = {}


def tokenizers(folder):
    """Loads once for all examples of a property."""
    if folder not in _loaded:
        _loaded[folder] = load_tokenizer(folder)
    return _loaded[folder]


class Counting:
    """A tokenizer that counts the ids it has decoded."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer, self.kind, self.decoded = tokenizer, tokenizer.kind, 0

    def decode(self, ids) -> str:
        self.decoded += len(ids)
        return self._tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["text", "invalid bytes", "byte tokens", "special tokens"])
def test_cost_is_linear(folder, fragments, name):
    tokenizer = load_tokenizer(folder)
    ids = {
        "text": tokenizer.encode(TEXT * 10),
        "invalid bytes": [0x80] * 500 + [0xE2] * 500,
        "byte tokens": [3 + 0x80] * 1000,
        "special tokens": [tokenizer.bos_id] * 1000,
    }[name]
    counting = Counting(fragments[0] if name == "invalid bytes" else tokenizer)
    stream(counting, one_by_one(ids))
    assert counting.decoded <= 10 * len(ids)
