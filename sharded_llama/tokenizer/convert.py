"""Meta's tokenizer.model to Hugging Face's tokenizer.json, and the ranks of Llama 3 back."""

import base64
import itertools
import json
import os
from collections.abc import Container
from pathlib import Path
from typing import Any, AnyStr

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..errors import TokenizerError
from .hf import load_library_tokenizer
from .llama2 import SPACE, PieceType, SentencePieceModel, read_sentencepiece
from .llama3 import BOS, EOS, MAX_TOKEN_BYTES, SPECIAL_TOKENS, SPLIT_PATTERN, read_ranks


def is_sentencepiece(file: str | os.PathLike) -> bool:
    """Whether a tokenizer.model is Llama 2's kind: a protobuf, whose first byte is the tag of its first piece.

    Lines of base64 cannot begin with that byte, a line feed. Raises TokenizerError when it cannot be read.
    """
    try:
        with open(file, "rb") as stream:
            return stream.read(1) == b"\n"
    except OSError as e:
        raise TokenizerError(f"{file} cannot be read: {e}.") from e


def to_hf_tokenizer(file: Path, folder: Path) -> None:
    """Writes a tokenizer.model of either kind into `folder` as tokenizer.json and tokenizer_config.json.

    They are made like those that Meta publishes: transformers' AutoTokenizer loads them unchanged, and ids and text
    are those of the tokenizer.model. The one exception is Llama 3's runs of more than 25,000 white-space
    characters (see `Llama3Tokenizer`).

    The end-of-sequence token is the base model's, since a tokenizer.model does not tell what a chat model's is.
    Neither tiktoken nor sentencepiece is needed. Raises TokenizerError when the file cannot be read or has no
    counterpart, OSError when `folder` cannot be written.
    """
    if is_sentencepiece(file):
        tokenizer, config = _llama2(read_sentencepiece(file), file)
    else:
        tokenizer, config = _llama3(read_ranks(file)), {"bos_token": BOS, "eos_token": EOS}
    config |= {
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        # With "LlamaTokenizer", transformers 5 would replace the normalizer of tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def to_tiktoken(tokenizer_json: Path, file: Path) -> bool:
    """Writes a tokenizer.json like Llama 3's as `file`, a tokenizer.model for `Llama3Tokenizer` and Meta's code.

    Returns False, and writes nothing, unless ids and text are the same for every text (that names no reserved
    token, and but for long runs of spaces, see `Llama3Tokenizer`):

    - text is split and mapped to bytes as in Llama 3, and nothing else is done to it;
    - the ids of the vocabulary are its ranks: no merge comes before one that makes a token of lower id;
    - each token that merging reaches has the merge by which byte pair encoding by ranks reaches it. There is one
      for each token, whatever the text: as long as nothing is merged across the ends of the token's bytes, they are
      merged as if they stood alone. Other merges of the file are therefore never used;
    - the special tokens are Llama 3's, with the ids after the vocabulary; reserved ones may have other names, as in
      Llama 3.0. BOS starts a text.

    Raises TokenizerError when `tokenizer_json` cannot be read, OSError when `file` cannot be written.
    """
    tokenizer = load_library_tokenizer(tokenizer_json)
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE" or not (_splits_as_llama3(content) and _special_as_llama3(tokenizer)):
        return False
    if model["dropout"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return False
    to_byte = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    try:
        ranks = {bytes(to_byte[symbol] for symbol in token): i for i, token in enumerate(tokens)}
    except KeyError:  # a letter that stands for no byte
        return False
    if any(model["vocab"][token] != i for i, token in enumerate(tokens)):
        return False
    if not all(bytes([byte]) in ranks for byte in range(256)) or max(map(len, ranks)) > MAX_TOKEN_BYTES:
        return False
    merges = [tuple(bytes(to_byte[symbol] for symbol in part) for part in merge) for merge in model["merges"]]
    if not _merges_by_rank(ranks, merges, model["ignore_merges"]):
        return False
    with open(file, "wb") as stream:
        stream.writelines(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
    return True


def _llama3(ranks: dict[bytes, int]) -> Tokenizer:
    symbols = _byte_symbols()
    names = {token: "".join(symbols[byte] for byte in token) for token in ranks}
    # Every way to put a token together, although one for each would do: so is the published file.
    merges = [
        (names[left], names[right])
        for token in ranks
        for left, right in sorted(_splits(token, ranks), key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    ]
    vocab = {names[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_special(name) for name in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _starts_with(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def _llama2(model: SentencePieceModel, file: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Raises TokenizerError for kinds of pieces that the tokenizers library has nothing like."""
    by_type = {kind: [piece.text for piece in model.pieces if piece.type is kind] for kind in PieceType}
    if odd := by_type[PieceType.USER_DEFINED] + by_type[PieceType.UNUSED]:
        raise TokenizerError(
            f"{file} has {len(odd)} user-defined or unused pieces, the first is {odd[0]!r}, which a tokenizer.json "
            "cannot express; use the tokenizer.model."
        )
    vocab = {piece.text: i for i, piece in enumerate(model.pieces)}
    scores = {piece.text: piece.score for piece in model.pieces if piece.type is PieceType.NORMAL}
    # sentencepiece joins the pair whose piece has the highest score; of equal ones, the leftmost. In Llama's models
    # only runs of spaces are equal. They grow from the left, as here: longer left parts first.
    merges = [(token, left, right) for token in scores for left, right in _splits(token, scores)]
    merges.sort(key=lambda merge: (-scores[merge[0]], -len(merge[1]), -len(merge[2])))
    (unknown,) = by_type[PieceType.UNKNOWN]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for _, left, right in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [piece.text for piece in model.pieces if piece.type in (PieceType.UNKNOWN, PieceType.CONTROL)]
    tokenizer.add_special_tokens([_special(name) for name in special])
    config = {"unk_token": unknown}
    if model.bos_id is not None:
        config["bos_token"] = model.pieces[model.bos_id].text
        tokenizer.post_processor = _starts_with(config["bos_token"], model.bos_id)
    if model.eos_id is not None:
        config["eos_token"] = model.pieces[model.eos_id].text
    return tokenizer, config


def _special(name: str) -> AddedToken:
    return AddedToken(name, normalized=False, special=True)


def _starts_with(bos: str, bos_id: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )


def _splits(token: AnyStr, tokens: Container[AnyStr]) -> list[tuple[AnyStr, AnyStr]]:
    """The ways to put a token together from two others."""
    pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
    return [(left, right) for left, right in pairs if left in tokens and right in tokens]


def _splits_as_llama3(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json splits text, maps it to bytes and back as Llama 3's does."""
    splitters = (content["pre_tokenizer"] or {}).get("pretokenizers", [])
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return (
        content["normalizer"] is None
        and len(splitters) == 2
        and splitters[0] == split
        and splitters[1].items() >= to_bytes.items()
        and (content["decoder"] or {}).get("type") == "ByteLevel"
    )


def _special_as_llama3(tokenizer: Tokenizer) -> bool:
    """Whether the added tokens are Llama 3's special ones, and the post-processor adds the first of them."""
    start = tokenizer.get_vocab_size(with_added_tokens=False)
    added = tokenizer.get_added_tokens_decoder()
    return (
        sorted(added) == list(range(start, start + len(SPECIAL_TOKENS)))
        and all(
            token.special
            and not (token.lstrip or token.rstrip or token.single_word)
            and (token.content == SPECIAL_TOKENS[i - start] or token.content.startswith("<|reserved_special_token_"))
            for i, token in added.items()
        )
        and added[start].content == BOS
        and tokenizer.encode("").ids == [start]
    )


def _merges_by_rank(ranks: dict[bytes, int], merges: list[tuple[bytes, bytes]], ignore_merges: bool) -> bool:
    """Whether byte pair encoding by these merges, in their order, is that by ranks; `to_tiktoken` tells why.

    `ignore_merges` is whether a word that is a token is never put together from parts.
    """
    order = [ranks[left + right] for left, right in merges]
    if order != sorted(order):
        return False
    known = set(merges)
    for token in ranks:
        if len(token) > 1:
            parts = _last_parts(token, ranks)
            if len(parts) > 2 and not ignore_merges:
                return False
            if len(parts) == 2 and tuple(parts) not in known:
                return False
    return True


def _last_parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What encoding a token's bytes by ranks makes of them before the last step; more than two if it gets stuck."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        best = min(joined)
        if best == len(ranks):
            break
        i = joined.index(best)  # the leftmost
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _byte_symbols() -> list[str]:
    """The letter by which byte-level tokenizers write each byte (GPT-2's `bytes_to_unicode`)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in printable else next(others)) for byte in range(0x100)]
