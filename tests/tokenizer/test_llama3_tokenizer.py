"""tokenizer.model of Llama 3: the published vectors, the ids of tiktoken, special tokens, long runs, broken files."""

import base64
import itertools
import json
import sys
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings, strategies as st
from transformers.convert_slow_tokenizer import TikTokenConverter

from sharded_llama.errors import RequestError, TokenizerError
from sharded_llama.tokenizer import StreamDecoder, TokenKind, load_tokenizer
from sharded_llama.tokenizer.llama3 import MAX_FILE_BYTES, Llama3Tokenizer, read_ranks

DATA = Path(__file__).parents[2] / "../shared/data/tokenizers/llama3"
real = pytest.mark.skipif(not DATA.is_dir(), reason="needs Llama 3's tokenizer.model in ../shared/data/tokenizers")

PROPERTY = settings(max_examples=200, deadline=None)

TEXTS = [
    "",
    "  two  spaces and trailing ",
    "\n\n\ttabs\r\n and 1234567890 numbers, it's they'll WE'VE",
    "Grüße 你好,世界 こんにちは 안녕하세요 Привет 😀👩‍👩‍👧🇩🇪 e\u0301",
    "\x00 nul, \ufffd replacement, \ufeff mark, \U0010ffff last",
    "<|begin_of_text|>x <|eot_id|> y<|reserved_special_token_247|><|eot_id|>",
    "<|begin_of_<|eot_id|>text|> <|nothing|>",
]

# Name -> place among the special tokens, where Llama 3.1's tokenizer.json has it (128000 + place).
PLACES = {
    "<|begin_of_text|>": 0,
    "<|end_of_text|>": 1,
    "<|reserved_special_token_0|>": 2,
    "<|reserved_special_token_1|>": 3,
    "<|finetune_right_pad_id|>": 4,
    "<|reserved_special_token_2|>": 5,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "<|eom_id|>": 8,
    "<|eot_id|>": 9,
    "<|python_tag|>": 10,
    "<|reserved_special_token_3|>": 11,
    "<|reserved_special_token_4|>": 12,
    "<|reserved_special_token_247|>": 255,
}


@pytest.fixture(scope="module")
def tokenizer(llama3_model: Path) -> Llama3Tokenizer:
    return Llama3Tokenizer(llama3_model)


@pytest.fixture(scope="module")
def reference(llama3_model: Path) -> tiktoken.Encoding:
    """The library alone, with a few of the special tokens."""
    ranks = {}
    for line in llama3_model.read_text().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    special = {name: len(ranks) + place for name, place in PLACES.items()}
    return tiktoken.Encoding("test", pat_str=TikTokenConverter().pattern, mergeable_ranks=ranks, special_tokens=special)


@real
def test_the_published_vectors():
    tokenizer = load_tokenizer(DATA)
    texts = (DATA / "vectors.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    expected = [[int(i) for i in line.split()] for line in (DATA / "vectors.out").read_text().split("\n")]
    assert len(texts) == len(expected) == 47
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text


@real
def test_the_published_vocabulary():
    tokenizer = load_tokenizer(DATA)
    assert (tokenizer.bos_id, tokenizer.vocab_size, tokenizer.adds_bos) == (128000, 128256, True)
    assert tokenizer.encode("<|eot_id|><|python_tag|>", bos=True, special=True) == [128000, 128009, 128010]
    assert tokenizer.kind(127999) is TokenKind.TEXT
    assert tokenizer.kind(128000) is TokenKind.SKIPPED


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_tiktoken(tokenizer, reference, text):
    assert tokenizer.encode(text) == reference.encode(text, disallowed_special=())
    assert tokenizer.encode(text, special=True) == reference.encode(text, allowed_special="all")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, special=True), skip_special=False) == text


@PROPERTY
@given(text=st.text(max_size=60))
def test_any_text(tokenizer, reference, text):
    ids = tokenizer.encode(text)
    assert ids == reference.encode_ordinary(text)
    assert tokenizer.decode(ids) == text


def test_special_tokens(tokenizer):
    first = tokenizer.bos_id
    assert tokenizer.vocab_size == first + 256
    for name, place in PLACES.items():
        assert tokenizer.encode(name, special=True) == [first + place]
        assert tokenizer.decode([first + place], skip_special=False) == name
        assert max(tokenizer.encode(name)) < first
        assert tokenizer.decode(tokenizer.encode(name)) == name
    names = [tokenizer.decode([i], skip_special=False) for i in range(first, first + 256)]
    assert len(set(names)) == 256
    assert tokenizer.encode("".join(names), special=True) == list(range(first, first + 256))
    assert tokenizer.decode(range(first, first + 256)) == ""


def test_bos_exactly_once(tokenizer):
    bos, name = tokenizer.bos_id, "<|begin_of_text|>"
    assert tokenizer.encode("hi", bos=True) == [bos, *tokenizer.encode("hi")]
    assert tokenizer.encode("", bos=True) == [bos]
    assert tokenizer.encode(f"{name}hi", bos=True, special=True) == [bos, *tokenizer.encode("hi")]
    assert tokenizer.encode(f"hi{name}", bos=True, special=True) == [bos, *tokenizer.encode("hi"), bos]
    assert tokenizer.encode(f"{name}hi", bos=True) == [bos, *tokenizer.encode(f"{name}hi")]


def test_kinds(tokenizer):
    kinds = [tokenizer.kind(i) for i in range(tokenizer.vocab_size + 2)]
    assert set(kinds[: tokenizer.bos_id]) == {TokenKind.TEXT}
    assert kinds[tokenizer.bos_id :] == [TokenKind.SKIPPED] * 258


@PROPERTY
@given(data=st.data())
def test_any_ids_decode_to_their_bytes_whole_and_streamed(tokenizer, llama3_model, data):
    tokens = [base64.b64decode(line.split()[0]) for line in llama3_model.read_text().splitlines()]
    high = [i for i, token in enumerate(tokens) if token[-1] >= 0x80 or token[0] >= 0x80]
    ids = st.one_of(st.sampled_from(high), st.integers(0, tokenizer.vocab_size + 7))
    chunks = data.draw(st.lists(st.lists(ids, max_size=5), max_size=15))
    flat = list(itertools.chain(*chunks))
    text = tokenizer.decode(flat)
    assert text == b"".join(tokens[i] for i in flat if i < len(tokens)).decode("utf-8", "replace")
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.push(chunk) for chunk in chunks) + decoder.flush() == text


def meta_pieces(text: str, limit: int) -> list[str]:
    """The text cut after `limit` white-space characters of a run, written as Meta's tokenizer.py does it."""
    pieces, start, run = [], 0, 0
    for i, letter in enumerate(text):
        run = run + 1 if letter.isspace() else 0
        if run > limit:
            pieces.append(text[start:i])
            start, run = i, 1
    return [*pieces, text[start:]]


@pytest.mark.parametrize("spaces", [24_999, 25_000, 25_001, 50_000, 50_001])
@pytest.mark.parametrize("space", [" ", "\t", "\u00a0"])
def test_long_white_space_is_cut_as_meta_does(tokenizer, reference, spaces, space):
    run = "\n" + space * (spaces - 1)
    text = f"a b{run}cd {run}"[: -len(space)]
    pieces = meta_pieces(text, 25_000)
    assert (len(pieces) == 1) == (spaces <= 25_000)
    ids = [i for piece in pieces for i in reference.encode_ordinary(piece)]
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


def test_cutting_changes_ids(tokenizer, reference):
    """So that the test above can fail: here a pair of spaces is cut."""
    text = "\n" + " " * 25_000
    assert tokenizer.encode(text) != reference.encode_ordinary(text)
    assert tokenizer.encode(text[:-1]) == reference.encode_ordinary(text[:-1])


@pytest.mark.parametrize("unit", [" ", "\n", "\u3000", "a", "=", "你", "\t\tx", "\r\n"])
def test_very_long_runs(tokenizer, unit):
    text = unit * (1_200_000 // len(unit))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


def test_other_long_runs_are_not_cut(tokenizer, reference):
    for text in ("hello" * 100_000, "=" * 60_000):
        assert tokenizer.encode(text) == reference.encode_ordinary(text)


@pytest.mark.parametrize("special", [False, True])
def test_what_is_no_text(tokenizer, special):
    with pytest.raises(RequestError, match=r"surrogate U\+D83D\) at index 3"):
        tokenizer.encode("abc\ud83d", special=special)
    with pytest.raises(RequestError, match="must be a string, not bytes"):
        tokenizer.encode(b"abc", special=special)


@pytest.mark.parametrize("bad", [-1, 2**32, 1.5, None, "3"])
def test_what_is_no_id(tokenizer, bad):
    with pytest.raises(TokenizerError, match=str(bad)):
        tokenizer.decode([0, bad])
    with pytest.raises(TokenizerError, match=str(bad)):
        tokenizer.kind(bad)


def test_loads_from_a_folder(llama3_model, tokenizer):
    loaded = load_tokenizer(llama3_model.parent)
    assert isinstance(loaded, Llama3Tokenizer)
    assert loaded.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])


def lines(*changed: tuple[int, bytes | None]) -> bytes:
    """A file of all bytes in turn, with some lines (counted from 1) replaced or left out."""
    made = {byte + 1: b"%s %d" % (base64.b64encode(bytes([byte])), byte) for byte in range(256)} | dict(changed)
    return b"\n".join(line for line in made.values() if line is not None) + b"\n"


def test_every_byte_is_enough(tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(lines())
    assert read_ranks(file) == {bytes([byte]): byte for byte in range(256)}
    assert Llama3Tokenizer(file).encode("é ", bos=True) == [256, *"é ".encode()]
    file.write_bytes(lines().replace(b"\n", b"\r\n") + b"\r\n")
    assert list(read_ranks(file).values()) == list(range(256))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines((3, b"!!!! 2")), "line 3: b'!!!! 2' is not the base64 of a new token"),
        (lines((3, b"Ag= 2")), "line 3: "),
        (lines((3, b" 2")), "line 3: "),
        (lines((3, b"Ag==")), "line 3: .* and the rank 2"),
        (lines((3, b"Ag== 3")), "line 3: .* and the rank 2"),
        (lines((3, b"Ag== -2")), "line 3: "),
        (lines((3, b"Ag== 02")), "line 3: "),
        (lines((3, b"Ag== " + b"9" * 5000)), r"line 3: b'Ag== 9{35}\.\.\.' is not"),
        (lines((3, b"Ag== 2 2")), "line 3: "),
        (lines((3, b"AQ== 2")), "line 3: b'AQ== 2' repeats a token"),
        (lines((257, b"A" * 1400 + b" 256")), "line 257: .* at most 1024 bytes"),
        (lines((257, b"A" * 10**6 + b" 256")), "line 257: .* at most 1024 bytes"),
        (lines((256, None)), "1 of the 256 single bytes have no rank, the first is 0xFF"),
        (lines((3, None)), "line 3: .* and the rank 2"),
        (b"", "256 of the 256 single bytes have no rank"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "line 1: b'version https"),
        (b"\x80\x04\x95\x00 0\n", "line 1: "),
    ],
)
def test_broken_files(tmp_path, content, message):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(TokenizerError, match=rf"tokenizer\.model(, |: ){message}"):
        load_tokenizer(tmp_path)


def test_a_file_that_is_too_large(tmp_path):
    file = tmp_path / "tokenizer.model"
    with open(file, "wb") as stream:
        stream.write(b"A")
        stream.truncate(MAX_FILE_BYTES + 1)  # sparse
    with pytest.raises(TokenizerError, match="larger than 16 MiB"):
        load_tokenizer(tmp_path)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(TokenizerError, match=r"nowhere cannot be read: .*No such file"):
        Llama3Tokenizer(tmp_path / "nowhere")


def test_without_the_library(llama3_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(TokenizerError, match=r"needs the tiktoken library.*pip install 'sharded_llama\[meta\]'"):
        load_tokenizer(llama3_model.parent)


def test_the_longest_token(tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(lines((257, base64.b64encode(b"ab" * 512) + b" 256")))
    assert Llama3Tokenizer(file).encode("ab" * 512) == [256]


def test_no_settings_beside_it_are_read(llama3_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama3_model.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<nope>"}))
    assert load_tokenizer(tmp_path).adds_bos
