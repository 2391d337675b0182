"""The trained tokenizer, as this package and as transformers load it."""

import re

import pytest
from tiny_model import TEXT
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sharded_llama.errors import TrainingError
from sharded_llama.tokenizer import load_tokenizer
from sharded_llama.training.tokenizer import train_tokenizer

SAMPLES = ["", "green bottles", "  two  spaces\n\n\tand tabs ", "Äpfel 你好 😀\r\n", "<|end_of_text|> is text\x00"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "tokenizer"
    train_tokenizer(TEXT, folder, 300)
    return folder


def test_files(folder):
    assert {path.name for path in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert [path.name for path in folder.parent.iterdir()] == ["tokenizer"]


def test_ours(folder):
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.adds_bos) == (300, 0, True)
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {0, 1} & set(ids)
    assert tokenizer.encode("<|end_of_text|>", special=True) == [1]
    assert len(tokenizer.encode(" green bottles, hanging")) < 8


@pytest.mark.parametrize("load", [PreTrainedTokenizerFast, AutoTokenizer], ids=lambda c: c.__name__)
def test_theirs(folder, load):
    ours, theirs = load_tokenizer(folder), load.from_pretrained(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (0, 1, 300)
    for text in SAMPLES[:4]:
        ids = ours.encode(text, bos=True)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text


def test_the_same_text_gives_the_same_tokenizer(folder, tmp_path):
    train_tokenizer(TEXT, tmp_path / "again", 300)
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_short_text_gives_a_smaller_tokenizer(tmp_path):
    train_tokenizer("abab", tmp_path / "t", 300)
    assert load_tokenizer(tmp_path / "t").vocab_size == 260  # bytes, specials, "ab" and "abab"


def test_too_small_a_vocabulary(tmp_path):
    with pytest.raises(TrainingError, match=re.escape("vocab_size=257 is too small") + ".* 258 "):
        train_tokenizer(TEXT, tmp_path / "t", 257)
    assert not list(tmp_path.iterdir())
