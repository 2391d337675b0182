"""tokenizer.model of Llama 2: the ids of sentencepiece, the text of the tokenizer.json, byte runs, broken files."""

import contextlib
import itertools
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings, strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from sharded_llama.errors import RequestError, TokenizerError
from sharded_llama.tokenizer import StreamDecoder, TokenKind, load_tokenizer
from sharded_llama.tokenizer.llama2 import MAX_FILE_BYTES, Llama2Tokenizer, Piece, PieceType, read_sentencepiece

PROPERTY = settings(max_examples=200, deadline=None)

TEXTS = [
    "",
    " ",
    "hello world",
    " hello",
    "   three  spaces and trailing ",
    "\n\n\ttabs\r\n and 1234567890 numbers",
    "Grüße 你好,世界 こんにちは 안녕하세요 Привет 😀👩‍👩‍👧🇩🇪 e\u0301",
    "\x00 nul, \ufffd replacement, \ufeff mark, \U0010ffff last",
    "<s>x</s> <unk> <0x41>",
    "a" * 3000,
]

# Letters that the small vocabulary has, that it lacks, and spaces, which merge in many ways.
TEXT = st.text(st.one_of(st.sampled_from("  helothx\t"), st.characters(exclude_categories=["Cs"])), max_size=40)


@pytest.fixture(scope="module")
def tokenizer(llama2_model: Path) -> Llama2Tokenizer:
    return Llama2Tokenizer(llama2_model)


@pytest.fixture(scope="module")
def reference(llama2_model: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(llama2_model))


@pytest.fixture
def proto(llama2_model: Path) -> ModelProto:
    return ModelProto.FromString(llama2_model.read_bytes())


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_sentencepiece(tokenizer, reference, text):
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.encode(text, bos=True) == reference.encode(text, add_bos=True)
    assert tokenizer.decode(ids) == text


@PROPERTY
@given(text=TEXT)
def test_any_text(tokenizer, reference, text):
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    # The library writes a space for the letter that stands for one.
    assert tokenizer.decode(ids) == reference.decode(ids) == text.replace("▁", " ")


def test_attributes(tokenizer, reference):
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (1, True)
    assert tokenizer.vocab_size == reference.get_piece_size()


def test_special_tokens(tokenizer):
    hi = tokenizer.encode("hi")
    assert tokenizer.encode("<s>hi</s>hi<unk>", special=True) == [1, *hi, 2, *hi, 0]
    assert tokenizer.encode("<s><s></s>", special=True) == [1, 1, 2]
    assert tokenizer.decode([1, *hi, 2, 0]) == "hi"
    assert tokenizer.decode([1, *hi, 2], skip_special=False) == "<s> hi</s>"
    plain = tokenizer.encode("<s>hi</s><unk>")
    assert not {0, 1, 2} & set(plain)
    assert tokenizer.decode(plain) == "<s>hi</s><unk>"
    # The name of a byte token is text, too.
    (byte,) = tokenizer.encode("\x01")[1:]
    assert tokenizer.kind(byte) is TokenKind.BYTE
    assert byte not in tokenizer.encode("<0x01>", special=True)


def test_bos_exactly_once(tokenizer):
    hi = tokenizer.encode("hi")
    assert tokenizer.encode("", bos=True) == [1]
    assert tokenizer.encode("<s>hi", bos=True, special=True) == [1, *hi]
    assert tokenizer.encode("hi<s>", bos=True, special=True) == [1, *hi, 1]
    assert tokenizer.encode("<s>hi", bos=True) == [1, *tokenizer.encode("<s>hi")]


def test_kinds(tokenizer, reference):
    kinds = [tokenizer.kind(i) for i in range(tokenizer.vocab_size + 1)]
    assert kinds[:3] == [TokenKind.SKIPPED] * 3
    assert [i for i, kind in enumerate(kinds) if kind is TokenKind.BYTE] == list(range(3, 259))
    assert set(kinds[259:-1]) == {TokenKind.TEXT}
    assert kinds[-1] is TokenKind.SKIPPED
    assert all(reference.is_byte(i) for i in range(3, 259))


def test_runs_of_byte_tokens(tokenizer):
    euro = [3 + byte for byte in "€".encode()]
    bad = 3 + 0xFF
    (letter,) = tokenizer.encode("€a")[-1:]
    assert tokenizer.decode(euro) == "€"
    assert tokenizer.decode([*euro, letter]) == "€" + "a"
    assert tokenizer.decode([*euro, bad]) == "\ufffd" * 4
    assert tokenizer.decode([*euro, letter, bad]) == "€a\ufffd"
    # What is left out does not end a run; what is written does.
    assert tokenizer.decode([*euro, 1, tokenizer.vocab_size, bad]) == "\ufffd" * 4
    assert tokenizer.decode([*euro, 1, bad], skip_special=False) == "€<s>\ufffd"
    assert tokenizer.decode([3 + ord(" "), letter]) == "a"


@PROPERTY
@given(data=st.data())
def test_any_ids_streamed(tokenizer, data):
    byte = st.sampled_from([3 + b for b in "€😀a ".encode() + b"\x80\xff"])
    ids = st.one_of(byte, st.integers(0, tokenizer.vocab_size + 7))
    chunks = data.draw(st.lists(st.lists(ids, max_size=5), max_size=15))
    decoder = StreamDecoder(tokenizer)
    streamed = "".join(decoder.push(chunk) for chunk in chunks) + decoder.flush()
    assert streamed == tokenizer.decode(list(itertools.chain(*chunks)))


@PROPERTY
@given(text=TEXT, size=st.integers(1, 5))
def test_any_text_streamed(tokenizer, text, size):
    ids = tokenizer.encode(text, bos=True)
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert "".join(pieces) + decoder.flush() == text.replace("▁", " ")


@pytest.mark.parametrize("unit", [" ", "\n", "a", "hello ", "你", "1"])
def test_very_long_runs(tokenizer, unit):
    text = unit * (600_000 // len(unit))
    assert tokenizer.decode(tokenizer.encode(text)) == text


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


def test_the_reader_finds_what_protobuf_finds(llama2_model, proto):
    model = read_sentencepiece(llama2_model)
    expected = [Piece(piece.piece, piece.score, PieceType(piece.type)) for piece in proto.pieces]
    assert list(model.pieces) == expected
    assert (model.bos_id, model.eos_id) == (proto.trainer_spec.bos_id, proto.trainer_spec.eos_id) == (1, 2)


def test_loads_from_a_folder(llama2_model, tokenizer):
    loaded = load_tokenizer(llama2_model.parent)
    assert isinstance(loaded, Llama2Tokenizer)
    assert loaded.encode(TEXTS[6]) == tokenizer.encode(TEXTS[6])


def test_without_bos(tmp_path, proto):
    proto.trainer_spec.bos_id = -1
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (None, False)
    with pytest.raises(TokenizerError, match="no beginning-of-sequence token"):
        tokenizer.encode("a", bos=True)


def test_the_longer_of_two_special_tokens(tmp_path, proto):
    names = ("<a>", "<a><b>", "a.b")
    for name in names:
        proto.pieces.add(piece=name, score=0, type=PieceType.CONTROL)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizer = load_tokenizer(tmp_path)
    first = len(proto.pieces) - 3
    assert tokenizer.encode("<a><b><a>a.b", special=True) == [first + 1, first, first + 2]
    assert first + 2 not in tokenizer.encode("axb", special=True)


def unigram(proto):
    proto.trainer_spec.model_type = 1


def no_byte_fallback(proto):
    proto.trainer_spec.byte_fallback = False


def a_byte_missing(proto):
    proto.pieces[258].type = PieceType.NORMAL


def no_dummy_prefix(proto):
    proto.normalizer_spec.add_dummy_prefix = False


def white_space_removed(proto):
    proto.normalizer_spec.ClearField("remove_extra_whitespaces")  # the default is True


def spaces_kept(proto):
    proto.normalizer_spec.escape_whitespaces = False


def a_charsmap(proto):
    proto.normalizer_spec.precompiled_charsmap = b"\x01\x00\x00\x00x"


def a_piece_twice(proto):
    proto.pieces[300].piece = proto.pieces[301].piece


def an_empty_piece(proto):
    proto.pieces[300].piece = ""


def a_long_piece(proto):
    proto.pieces[300].piece = "a" * 1025


def no_unknown(proto):
    proto.pieces[0].type = PieceType.CONTROL


def two_unknown(proto):
    proto.pieces[2].type = PieceType.UNKNOWN


def bos_out_of_range(proto):
    proto.trainer_spec.bos_id = len(proto.pieces)


def negative_eos(proto):
    proto.trainer_spec.eos_id = -2


def bos_that_is_text(proto):
    proto.trainer_spec.bos_id = 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unigram, "model_type is not BPE"),
        (no_byte_fallback, "no byte_fallback"),
        (a_byte_missing, "no byte_fallback"),
        (no_dummy_prefix, "normalizer changes text"),
        (white_space_removed, "normalizer changes text"),
        (spaces_kept, "normalizer changes text"),
        (a_charsmap, "normalizer changes text"),
        (a_piece_twice, "same text"),
        (an_empty_piece, "piece 300 has 0 bytes; expected 1 to 1024"),
        (a_long_piece, "piece 300 has 1025 bytes; expected 1 to 1024"),
        (no_unknown, "exactly one unknown piece"),
        (two_unknown, "exactly one unknown piece"),
        (bos_out_of_range, "bos_id is not that of a control piece"),
        (negative_eos, "eos_id is not that of a control piece"),
        (bos_that_is_text, "bos_id is not that of a control piece"),
    ],
)
def test_models_of_another_make(tmp_path, proto, change, message):
    change(proto)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(
        TokenizerError, match=rf"tokenizer\.model is not a sentencepiece model as Llama 2's: .*{message}"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n", "ends within a number"),
        (b"\n\x05\n\x01a", "ends within a field of 5 bytes"),
        (b"\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "ends within a field"),
        (b"\n\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01", "ends within a number"),
        (b"\n\x02\x0f\x00", "begins no protobuf field"),
        (b"\n\x02\x08\x07", "piece 0 is malformed"),
        (b"\n\x02\x18\x07", "piece 0 is malformed"),
        (b"\n\x09\x11" + bytes(8), "piece 0 is malformed"),
        (b"\n\x03\n\x01\xff", "can't decode byte 0xff"),
        (b"\n\x03\n\x01a\x10\x01", "a number stands where a message"),
        (b"\n\x03\n\x01a", "model_type is not BPE"),
    ],
)
def test_broken_files(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=rf"tokenizer\.model is not .*{message}"):
        load_tokenizer(tmp_path)


def test_a_file_that_is_cut_short(tmp_path, llama2_model):
    content = llama2_model.read_bytes()
    for size in range(1, len(content), 97):
        (tmp_path / "tokenizer.model").write_bytes(content[:size])
        with pytest.raises(TokenizerError, match=r"tokenizer\.model is not"):
            load_tokenizer(tmp_path)


@PROPERTY
@given(data=st.data())
def test_changed_bytes_give_an_error_or_a_tokenizer(llama2_model, tmp_path_factory, data):
    content = bytearray(llama2_model.read_bytes())
    for at in data.draw(st.lists(st.integers(1, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "changed.model"
    file.write_bytes(content)
    with contextlib.suppress(TokenizerError):
        tokenizer = Llama2Tokenizer(file)
        assert set(tokenizer.encode("hello, 你 x")) <= set(range(tokenizer.vocab_size))


def test_a_file_that_is_too_large(tmp_path):
    file = tmp_path / "tokenizer.model"
    with open(file, "wb") as stream:
        stream.write(b"\n")
        stream.truncate(MAX_FILE_BYTES + 1)  # sparse
    with pytest.raises(TokenizerError, match="larger than 16 MiB"):
        load_tokenizer(tmp_path)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(TokenizerError, match=r"nowhere cannot be read: .*No such file"):
        Llama2Tokenizer(tmp_path / "nowhere")


def test_without_the_library(llama2_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(TokenizerError, match=r"needs the sentencepiece library.*pip install 'sharded_llama\[meta\]'"):
        load_tokenizer(llama2_model.parent)
