"""Conversion: a tokenizer.model and its tokenizer.json are one tokenizer, for transformers too, and ranks come back."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from sharded_llama.errors import ShardedLlamaError, TokenizerError
from sharded_llama.tokenizer import StreamDecoder, load_tokenizer, tokenizer_files
from sharded_llama.tokenizer.convert import to_hf_tokenizer, to_tiktoken
from sharded_llama.tokenizer.hf import HFTokenizer
from sharded_llama.tokenizer.llama2 import PieceType
from sharded_llama.tokenizer.llama3 import SPECIAL_TOKENS, Llama3Tokenizer

DATA = Path(__file__).parents[2] / "../shared/data/tokenizers/llama3"
real = pytest.mark.skipif(not DATA.is_dir(), reason="needs Llama 3's tokenizer.model in ../shared/data/tokenizers")

PROPERTY = settings(max_examples=200, deadline=None)

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces and trailing ",
    "\n\n\ttabs\r\n and 1234567890 numbers, it's they'll WE'VE",
    "Grüße 你好,世界 こんにちは 안녕하세요 Привет 😀👩‍👩‍👧🇩🇪 e\u0301 \u0130\u017f",
    "\x00 nul, \ufffd replacement, \ufeff mark, \U0010ffff last, a . b , c ! don 't",
    "<s>hi</s> <unk> <0x41> <s><s>",
    "x <|eot_id|> y<|begin_of_text|>hello <|reserved_special_token_9|>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
]

Twins = tuple[object, HFTokenizer, object]  # of tokenizer.model, of the tokenizer.json made from it, transformers'


def convert(file: Path, folder: Path) -> Twins:
    to_hf_tokenizer(file, folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return load_tokenizer(file.parent), load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def llama3(llama3_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return convert(llama3_model, tmp_path_factory.mktemp("llama3_hf"))


@pytest.fixture(scope="module")
def llama2(llama2_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """With the scores that Llama's runs of spaces have: all the same, below every other."""
    proto = ModelProto.FromString(llama2_model.read_bytes())
    spaces = [piece for piece in proto.pieces if len(piece.piece) > 1 and set(piece.piece) == {"▁"}]
    spaces.append(proto.pieces.add())
    for length, piece in enumerate(spaces, 2):
        piece.piece, piece.score = "▁" * length, -1e9
    assert len(spaces) == 3
    folder = tmp_path_factory.mktemp("llama2_meta")
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return convert(folder / "tokenizer.model", tmp_path_factory.mktemp("llama2_hf"))


@pytest.fixture(scope="module", params=["llama3", "llama2"])
def twins(request: pytest.FixtureRequest) -> Twins:
    return request.getfixturevalue(request.param)


def check_text(twins: Twins, text: str) -> None:
    meta, hf, reference = twins
    for special in (False, True):
        ids = meta.encode(text, special=special)
        assert ids == hf.encode(text, special=special)
        assert ids == reference.encode(text, add_special_tokens=False, split_special_tokens=not special)
        for skip in (False, True):
            assert meta.decode(ids, skip) == hf.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)
        assert meta.encode(text, bos=True, special=special) == hf.encode(text, bos=True, special=special)


@pytest.mark.parametrize("text", TEXTS)
def test_same_ids_and_text(twins, text):
    check_text(twins, text)


@pytest.mark.parametrize("spaces", range(12))
def test_same_for_runs_of_spaces(twins, spaces):
    check_text(twins, f"{' ' * spaces}the{' ' * spaces}\n{' ' * spaces}")


@PROPERTY
@given(text=st.text(st.one_of(st.sampled_from("  helothx\n'"), st.characters(exclude_categories=["Cs"])), max_size=40))
def test_same_for_any_text(twins, text):
    check_text(twins, text)


@PROPERTY
@given(data=st.data())
def test_same_text_of_any_ids(twins, data):
    meta, hf, reference = twins
    ids = data.draw(st.lists(st.one_of(st.integers(0, 258), st.integers(0, meta.vocab_size - 1)), max_size=30))
    for skip in (False, True):
        assert meta.decode(ids, skip) == hf.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)
    decoder = StreamDecoder(meta)
    assert "".join(decoder.push([i]) for i in ids) + decoder.flush() == hf.decode(ids)


def test_same_attributes(twins):
    meta, hf, reference = twins
    assert (meta.bos_id, meta.adds_bos, meta.vocab_size) == (hf.bos_id, hf.adds_bos, hf.vocab_size)
    assert (meta.bos_id, meta.vocab_size) == (reference.bos_token_id, len(reference))
    assert [meta.kind(i) for i in range(meta.vocab_size + 3)] == [hf.kind(i) for i in range(meta.vocab_size + 3)]


def test_same_errors(twins):
    meta, hf, _ = twins
    calls: list[Callable] = [
        lambda tokenizer: tokenizer.encode("abc\ud83d"),
        lambda tokenizer: tokenizer.encode(None),
        lambda tokenizer: tokenizer.decode([-1]),
        lambda tokenizer: tokenizer.kind(2**32),
        lambda tokenizer: tokenizer.kind("3"),
    ]
    for call in calls:
        errors = []
        for tokenizer in (meta, hf):
            with pytest.raises(ShardedLlamaError) as raised:
                call(tokenizer)
            errors.append((type(raised.value), str(raised.value)))
        assert errors[0] == errors[1]


def test_transformers_adds_bos(twins):
    meta, _, reference = twins
    for text in TEXTS[:7]:
        assert reference.encode(text) == meta.encode(text, bos=True)
    pair = reference.encode("a", "b")
    assert pair == [*meta.encode("a", bos=True), *meta.encode("b", bos=True)]


def test_transformers_knows_the_special_tokens(llama3, llama2):
    assert (llama3[2].bos_token, llama3[2].eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")
    assert (llama2[2].bos_token, llama2[2].eos_token, llama2[2].unk_token) == ("<s>", "</s>", "<unk>")
    assert llama2[2].eos_token_id == 2


def test_llama3_vocabulary_and_merges_are_those_of_transformers(llama3_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # or tiktoken.load would keep a copy by path
    converter = TikTokenConverter(vocab_file=str(llama3_model), extra_special_tokens=list(SPECIAL_TOKENS))
    expected = json.loads(converter.converted().to_str())
    to_hf_tokenizer(llama3_model, tmp_path)
    made = json.loads((tmp_path / "tokenizer.json").read_text())
    for section in ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder"):
        assert made[section] == expected[section]
    assert len(made["model"]["merges"]) > 100


@real
def test_the_published_llama3(tmp_path):
    meta, hf, reference = convert(DATA / "tokenizer.model", tmp_path)
    # As many as in the published tokenizer.json.
    assert len(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]) == 280_147
    for text in [*TEXTS, *(DATA / "vectors.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")]:
        check_text((meta, hf, reference), text)
    file = tmp_path / "back.model"
    assert to_tiktoken(tmp_path / "tokenizer.json", file)
    assert file.read_bytes() == (DATA / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("kind", [PieceType.USER_DEFINED, PieceType.UNUSED])
def test_pieces_without_a_counterpart(llama2_model, tmp_path, kind):
    proto = ModelProto.FromString(llama2_model.read_bytes())
    proto.pieces[300].type = kind
    file = tmp_path / "tokenizer.model"
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(TokenizerError, match=r"tokenizer\.model has 1 user-defined or unused pieces, the first is"):
        to_hf_tokenizer(file, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"


def test_without_bos_and_eos(llama2_model, tmp_path):
    proto = ModelProto.FromString(llama2_model.read_bytes())
    proto.trainer_spec.bos_id = proto.trainer_spec.eos_id = -1
    file = tmp_path / "tokenizer.model"
    file.write_bytes(proto.SerializeToString())
    to_hf_tokenizer(file, tmp_path)
    hf = load_tokenizer(tmp_path)
    assert isinstance(hf, HFTokenizer)
    assert (hf.bos_id, hf.adds_bos) == (None, False)


@pytest.mark.parametrize("content", [b"", b"\n", b"\n\x00", b"!"])
def test_broken_files_are_not_converted(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        to_hf_tokenizer(tmp_path / "tokenizer.model", tmp_path)
    with pytest.raises(TokenizerError, match="nowhere cannot be read"):
        to_hf_tokenizer(tmp_path / "nowhere", tmp_path)


# --- to_tiktoken ---


@pytest.fixture(scope="module")
def trained(llama3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json as training makes it, with one merge for each token, and all special tokens."""
    content = json.loads((llama3_folder / "tokenizer.json").read_text())
    content["added_tokens"] = []
    content["post_processor"] = None
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL_TOKENS])
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    file = tmp_path_factory.mktemp("trained") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


def test_ranks_come_back(llama3_model, tmp_path):
    to_hf_tokenizer(llama3_model, tmp_path)
    assert to_tiktoken(tmp_path / "tokenizer.json", tmp_path / "back.model")
    assert (tmp_path / "back.model").read_bytes() == llama3_model.read_bytes()


@pytest.fixture(scope="module")
def trained_twins(trained: Path) -> tuple[Llama3Tokenizer, HFTokenizer]:
    file = trained.with_name("tokenizer.model")
    assert to_tiktoken(trained, file)
    return Llama3Tokenizer(file), HFTokenizer(trained.parent)


@PROPERTY
@given(text=st.text(st.one_of(st.sampled_from("  helothx\n'"), st.characters(exclude_categories=["Cs"])), max_size=60))
def test_a_trained_tokenizer_gives_the_same_ids(trained_twins, text):
    ranks, hf = trained_twins
    assert ranks.encode(text, bos=True) == hf.encode(text, bos=True)


def test_one_merge_for_each_token_is_enough(trained):
    merges = json.loads(trained.read_text())["model"]["merges"]
    made = ["".join(merge) for merge in merges]
    assert len(made) == len(set(made)) == 400 - 256


def changed(trained: Path, folder: Path, change: Callable[[dict], None]) -> Path:
    content = json.loads(trained.read_text())
    change(content)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content))
    return file


def names_of_llama30(content):
    """Other names for the reserved ones, also where Llama 3.1 has given them a meaning."""
    count = itertools.count()
    for token in content["added_tokens"]:
        if token["content"] not in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", *SPECIAL_TOKENS[6:8]):
            token["content"] = f"<|reserved_special_token_{next(count)}|>"


def unused_merges(content):
    """Every other way to each token, which no text takes."""
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    more = []
    for left, right in merges:
        token = left + right
        ways = [[token[:i], token[i:]] for i in range(1, len(token))]
        more += [[left, right], *(way for way in ways if way[0] in vocab and way[1] in vocab and way[0] != left)]
    assert len(more) > len(merges)
    content["model"]["merges"] = more


def ignored_merges_off(content):
    content["model"]["ignore_merges"] = False


def whole_word_only(content):
    """A token that no merge makes: with ignore_merges, a word that is it."""
    content["model"]["merges"].pop()


@pytest.mark.parametrize("change", [names_of_llama30, unused_merges, ignored_merges_off])
def test_what_makes_no_difference(trained, tmp_path, change):
    file = changed(trained, tmp_path, change)
    assert to_tiktoken(file, tmp_path / "out.model")
    assert (tmp_path / "out.model").read_bytes() == trained.with_name("tokenizer.model").read_bytes()


def another_pattern(content):
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"


def another_behavior(content):
    content["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"


def no_pre_tokenizer(content):
    content["pre_tokenizer"] = None


def a_prefix_space(content):
    content["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def a_normalizer(content):
    content["normalizer"] = {"type": "NFC"}


def another_decoder(content):
    content["decoder"] = None


def dropout(content):
    content["model"]["dropout"] = 0.1


def merges_out_of_order(content):
    merges = content["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


def ids_not_dense(content):
    vocab = content["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    content["model"]["merges"].pop()
    del vocab[last]
    vocab["abcabc"] = len(vocab) + 1


def a_byte_missing(content):
    vocab = content["model"]["vocab"]
    vocab["abcabc"] = vocab.pop("¿")


def a_letter_that_is_no_byte(content):
    vocab = content["model"]["vocab"]
    vocab["你"] = vocab.pop("¿")


def a_token_too_long(content):
    vocab = content["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    content["model"]["merges"].pop()
    vocab["a" * 1025] = vocab.pop(last)


def another_special_token(content):
    content["added_tokens"][9]["content"] = "<|im_end|>"


def one_special_token_less(content):
    content["added_tokens"].pop()


def special_token_that_strips(content):
    content["added_tokens"][9]["lstrip"] = True


def plain_added_token(content):
    content["added_tokens"][9]["special"] = False


def no_bos(content):
    content["post_processor"] = None


@pytest.mark.parametrize(
    "change",
    [
        another_pattern,
        another_behavior,
        no_pre_tokenizer,
        a_prefix_space,
        a_normalizer,
        another_decoder,
        dropout,
        merges_out_of_order,
        ids_not_dense,
        a_byte_missing,
        a_letter_that_is_no_byte,
        a_token_too_long,
        another_special_token,
        one_special_token_less,
        special_token_that_strips,
        plain_added_token,
        no_bos,
        whole_word_only,
    ],
)
def test_what_ranks_cannot_say(trained, tmp_path, change):
    file = changed(trained, tmp_path, change)
    assert to_tiktoken(file, tmp_path / "out.model") is False
    assert not (tmp_path / "out.model").exists()


def test_a_word_that_merging_does_not_reach(trained, tmp_path):
    """A token that ranks do not put together either: only whole words become it, if merges are ignored for them."""

    def change(content):
        whole_word_only(content)
        vocab = content["model"]["vocab"]
        vocab["qzqzqz"] = vocab.pop(max(vocab, key=vocab.get))

    file = changed(trained, tmp_path, change)
    assert to_tiktoken(file, tmp_path / "out.model")
    ranks, hf = Llama3Tokenizer(tmp_path / "out.model"), HFTokenizer(tmp_path)
    assert ranks.encode("qzqzqz") == hf.encode("qzqzqz") == [399]
    assert ranks.encode("qzqzqzq") == hf.encode("qzqzqzq")
    (tmp_path / "out.model").unlink()
    content = json.loads(file.read_text())
    ignored_merges_off(content)
    file.write_text(json.dumps(content))
    assert not to_tiktoken(file, tmp_path / "out.model")


def test_other_kinds_of_tokenizers(llama2, llama3_folder, llama2_folder, tmp_path):
    for folder in (llama2_folder, llama3_folder):  # the second has three special tokens only
        assert not to_tiktoken(folder / "tokenizer.json", tmp_path / "out.model")
    content = {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert not to_tiktoken(tmp_path / "tokenizer.json", tmp_path / "out.model")
    assert not (tmp_path / "out.model").exists()


def test_a_tokenizer_json_that_cannot_be_read(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer"):
        to_tiktoken(tmp_path / "tokenizer.json", tmp_path / "out.model")


# --- finding the files ---


def test_tokenizer_json_comes_first(llama3_model, llama2_folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama3_model.read_bytes())
    assert isinstance(load_tokenizer(tmp_path), Llama3Tokenizer)
    (tmp_path / "tokenizer.json").write_bytes((llama2_folder / "tokenizer.json").read_bytes())
    assert isinstance(load_tokenizer(tmp_path), HFTokenizer)
    names = [file.name for file in tokenizer_files(tmp_path)]
    assert names == ["tokenizer.json", "tokenizer.model"]


def test_beside_a_folder_of_meta(llama2_model, llama3_model, tmp_path):
    folder = tmp_path / "llama-2-7b"
    folder.mkdir()
    (tmp_path / "tokenizer.model").write_bytes(llama2_model.read_bytes())
    with pytest.raises(TokenizerError, match=r"llama-2-7b has no tokenizer\.json and no tokenizer\.model"):
        load_tokenizer(folder)
    assert tokenizer_files(folder) == []
    (folder / "params.json").write_text("{}")
    assert load_tokenizer(folder).vocab_size == 440
    assert tokenizer_files(folder) == [tmp_path / "tokenizer.model"]
    (folder / "chat_template.jinja").touch()
    assert tokenizer_files(folder) == [folder / "chat_template.jinja", tmp_path / "tokenizer.model"]
    (folder / "tokenizer.model").write_bytes(llama3_model.read_bytes())
    assert isinstance(load_tokenizer(folder), Llama3Tokenizer)
    assert tmp_path / "tokenizer.model" not in tokenizer_files(folder)


def test_nothing_to_load(tmp_path):
    with pytest.raises(TokenizerError, match="nowhere is not a folder"):
        load_tokenizer(tmp_path / "nowhere")
    assert tokenizer_files(tmp_path / "nowhere") == []
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(TokenizerError, match=rf"{tmp_path} has no tokenizer\.json and no tokenizer\.model"):
        load_tokenizer(tmp_path)
    assert tokenizer_files(tmp_path) == [tmp_path / "tokenizer_config.json"]
