"""tokenizer.json: the ids and text of transformers, BOS once, and a user's special tokens as plain text."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sharded_llama.errors import RequestError, TokenizerError
from sharded_llama.tokenizer import TokenKind, load_tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces and trailing ",
    "\n\n\ttabs\r\n and 1234567890 numbers",
    "it's they'll WE'VE",
    "Grüße 你好,世界 こんにちは 안녕하세요 Привет",
    "e\u0301 combining, \u05e9\u05dc\u05d5\u05dd right to left, \u200d joiner",
    "😀👩‍👩‍👧🇩🇪 emoji \U0001f9d1\U0001f3fd",
    "\x00 nul, \ufffd replacement, \ufeff mark, \U0010ffff last",
    "a . b , c ! don 't",  # what clean_up_tokenization_spaces would spoil
    "<0x41> and <unk>",
]
SPECIAL_TEXTS = ["<s>hi</s>", "x <|eot_id|> y", "<|begin_of_text|>hello", "<s><s>", " <s> "]


def reference(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS + SPECIAL_TEXTS)
def test_encodes_and_decodes_as_transformers(folder, text):
    ours, theirs = load_tokenizer(folder), reference(folder)
    plain = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    special = theirs.encode(text, add_special_tokens=False, split_special_tokens=False)
    assert ours.encode(text) == plain
    assert ours.encode(text, special=True) == special
    for ids in (plain, special):
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("text", TEXTS)
def test_bos_as_transformers_adds_it(folder, text):
    ours = load_tokenizer(folder)
    assert ours.adds_bos
    assert ours.encode(text, bos=True, special=True) == reference(folder).encode(text)


def test_attributes(folder):
    ours, theirs = load_tokenizer(folder), reference(folder)
    assert ours.bos_id == theirs.bos_token_id
    assert ours.vocab_size == len(theirs)


def test_round_trip(folder):
    tokenizer = load_tokenizer(folder)
    for text in TEXTS + SPECIAL_TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_plain_text_are_text(folder):
    tokenizer = load_tokenizer(folder)
    bos = tokenizer.decode([tokenizer.bos_id], skip_special=False)
    assert tokenizer.encode(bos, special=True) == [tokenizer.bos_id]
    plain = tokenizer.encode(bos)
    assert tokenizer.bos_id not in plain
    assert tokenizer.decode(plain) == bos
    # The two settings do not disturb each other.
    assert tokenizer.encode(bos, special=True) == [tokenizer.bos_id]
    assert tokenizer.encode(bos) == plain


def test_bos_exactly_once(folder):
    tokenizer = load_tokenizer(folder)
    bos = tokenizer.decode([tokenizer.bos_id], skip_special=False)
    assert tokenizer.encode(f"{bos}hi", bos=True, special=True).count(tokenizer.bos_id) == 1
    assert tokenizer.encode(f"{bos}hi", bos=True)[0] == tokenizer.bos_id
    assert tokenizer.encode(f"{bos}hi", bos=True).count(tokenizer.bos_id) == 1
    assert tokenizer.encode("hi", bos=True)[1:] == tokenizer.encode("hi")
    # A second one in the middle of the text is the caller's wish.
    assert tokenizer.encode(f"hi{bos}", bos=True, special=True).count(tokenizer.bos_id) == 2


@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_the_post_processor_decides_about_bos(llama3_folder, tmp_path, add_bos_token):
    write_copy(llama3_folder, tmp_path, add_bos_token=add_bos_token)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.adds_bos == (reference(tmp_path).encode("a")[0] == tokenizer.bos_id)
    assert tokenizer.bos_id == load_tokenizer(llama3_folder).bos_id


@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_add_bos_token_decides_without_a_post_processor(llama3_folder, tmp_path, add_bos_token):
    write_copy(llama3_folder, tmp_path, post_processor=None, add_bos_token=add_bos_token)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.adds_bos is (add_bos_token is True)
    assert tokenizer.bos_id == load_tokenizer(llama3_folder).bos_id


@pytest.mark.parametrize("token", ["<|eot_id|>", {"content": "<|eot_id|>", "special": True}])
def test_bos_of_the_config_when_the_post_processor_adds_none(llama3_folder, tmp_path, token):
    write_copy(llama3_folder, tmp_path, post_processor=None, bos_token=token)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode([tokenizer.bos_id], skip_special=False) == "<|eot_id|>"
    assert not tokenizer.adds_bos


def test_without_any_bos(llama3_folder, tmp_path):
    write_copy(llama3_folder, tmp_path, post_processor=None, bos_token=None, add_bos_token=True)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id is None
    assert not tokenizer.adds_bos
    with pytest.raises(TokenizerError, match="no beginning-of-sequence token"):
        tokenizer.encode("a", bos=True)


def test_without_tokenizer_config(llama3_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((llama3_folder / "tokenizer.json").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.adds_bos
    assert tokenizer.bos_id == load_tokenizer(llama3_folder).bos_id


def test_stored_truncation_and_padding_are_off(llama3_folder, tmp_path):
    backend = Tokenizer.from_file(str(llama3_folder / "tokenizer.json"))
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "The quick brown fox jumps over the lazy dog. " * 3
    assert load_tokenizer(tmp_path).encode(text) == load_tokenizer(llama3_folder).encode(text)


@pytest.mark.parametrize("special", [False, True])
def test_what_is_no_text(folder, special):
    tokenizer = load_tokenizer(folder)
    with pytest.raises(RequestError, match=r"surrogate U\+D83D\) at index 3"):
        tokenizer.encode("abc\ud83d", special=special)
    with pytest.raises(RequestError, match="must be a string, not bytes"):
        tokenizer.encode(b"abc", special=special)


def test_ids_of_a_padded_vocabulary_decode_to_nothing(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("Hello, world!")
    assert tokenizer.decode([tokenizer.vocab_size, *ids, tokenizer.vocab_size + 1000]) == "Hello, world!"
    assert tokenizer.kind(tokenizer.vocab_size) is TokenKind.SKIPPED


@pytest.mark.parametrize("bad", [-1, 2**32, 1.5, None, "3"])
def test_what_is_no_id(folder, bad):
    tokenizer = load_tokenizer(folder)
    with pytest.raises(TokenizerError, match=str(bad)):
        tokenizer.decode([0, bad])
    with pytest.raises(TokenizerError, match=str(bad)):
        tokenizer.kind(bad)


def test_ids_may_be_numpy(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("Hello, world!")
    assert tokenizer.decode(np.asarray(ids, np.int32)) == "Hello, world!"


def test_kinds(llama2_folder, llama3_folder):
    tokenizer = load_tokenizer(llama2_folder)
    kinds = [tokenizer.kind(i) for i in range(tokenizer.vocab_size)]
    assert kinds[:3] == [TokenKind.SKIPPED] * 3
    assert kinds[3:259] == [TokenKind.BYTE] * 256
    assert set(kinds[259:]) == {TokenKind.TEXT}
    tokenizer = load_tokenizer(llama3_folder)
    kinds = [tokenizer.kind(i) for i in range(tokenizer.vocab_size)]
    assert set(kinds[:-3]) == {TokenKind.TEXT}
    assert kinds[-3:] == [TokenKind.SKIPPED] * 3


def test_byte_names_without_byte_fallback_are_text(tmp_path):
    backend = Tokenizer(models.BPE(vocab={"<0x41>": 0, "a": 1}, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.kind(0) is TokenKind.TEXT
    assert tokenizer.decode([0, 1]) == "<0x41>a"


def test_missing(tmp_path):
    with pytest.raises(TokenizerError, match=rf"{tmp_path} has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="nowhere is not a folder"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}', "\x00\x01"])
def test_unreadable(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_unreadable_tokenizer_config(llama3_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((llama3_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json must hold a JSON object"):
        load_tokenizer(tmp_path)


def test_bos_of_the_config_that_does_not_exist(llama3_folder, tmp_path):
    write_copy(llama3_folder, tmp_path, post_processor=None, bos_token="<nope>")
    with pytest.raises(TokenizerError, match="bos_token='<nope>' is not a token"):
        load_tokenizer(tmp_path)


def write_copy(source: Path, target: Path, post_processor: object = ..., **config: object) -> None:
    """Copies a tokenizer, with another post-processor and other fields of tokenizer_config.json if given."""
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    if post_processor is not ...:
        tokenizer["post_processor"] = post_processor
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    merged = json.loads((source / "tokenizer_config.json").read_text()) | config
    merged = {name: value for name, value in merged.items() if name != "add_bos_token" or value is not None}
    (target / "tokenizer_config.json").write_text(json.dumps(merged))
