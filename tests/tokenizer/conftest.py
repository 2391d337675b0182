"""Small tokenizers with the pipelines of Llama 3 and Llama 2, trained here and saved as checkpoints have them."""

import base64
import io
import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock,\n\nand they'll say: hello, hello world!",
    "    def f(x):\n\t\treturn x + 1\n",
    "Grüße aus Köln, où l'été est là. Ça va? Привет, мир! 你好,世界。こんにちは世界 안녕하세요 😀😀 👩‍👩‍👧 €100",
] * 4

# The pattern of the Llama 3 tokenizer.json.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE, as Llama 3: special tokens after the vocabulary, BOS by the post-processor."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
        special_tokens=[("<|begin_of_text|>", bos)],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """Character BPE with byte fallback, as the tokenizer.json that Llama 2's sentencepiece model is converted to."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizer
    # Too few letters for the corpus, so that rarer ones fall back to bytes.
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=250, limit_alphabet=60, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *model["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[tuple(m) for m in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer, **config: object) -> Path:
    """Writes tokenizer.json and tokenizer_config.json into `folder`."""
    folder.mkdir(exist_ok=True, parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def llama3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "clean_up_tokenization_spaces": True}
    return save_tokenizer(tmp_path_factory.mktemp("llama3"), byte_level_tokenizer(), **config)


@pytest.fixture(scope="session")
def llama2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": False}
    return save_tokenizer(tmp_path_factory.mktemp("llama2"), byte_fallback_tokenizer(), **config)


@pytest.fixture(params=["llama3", "llama2"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Each of the two in turn."""
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture(scope="session")
def llama3_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model of tiktoken ranks: the vocabulary of `byte_level_tokenizer` without its special tokens."""
    vocab = byte_level_tokenizer().get_vocab(with_added_tokens=False)
    byte = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    file = tmp_path_factory.mktemp("meta_llama3") / "tokenizer.model"
    with open(file, "wb") as stream:
        for rank, token in enumerate(sorted(vocab, key=vocab.get)):
            stream.write(b"%s %d\n" % (base64.b64encode(bytes(byte[symbol] for symbol in token)), rank))
    return file


@pytest.fixture(scope="session")
def llama2_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model of sentencepiece, trained with the settings of Llama 2's."""
    lines = [line for text in CORPUS for line in text.replace("\n", "  ").split("  ") if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, " " * 9 + "x", "  x" * 9] * 2),
        model_writer=model,
        model_type="bpe",
        vocab_size=440,
        character_coverage=0.98,  # so that rarer letters fall back to bytes
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    file = tmp_path_factory.mktemp("meta_llama2") / "tokenizer.model"
    file.write_bytes(model.getvalue())
    return file
